"""`hotdesk chat`: from a pipe, on a terminal, and over connections that break."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable

import pytest
from tests.cli.stand_in import Hotdesk, StandIn


async def test_a_line_from_a_pipe_is_answered_and_signed(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """Behind the reply stands who gave it; the end of the input is the end of the chat."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="refund?\n")
    assert (ran.code, ran.out) == (0, "you said refund?  [faq 4]\n")


async def test_lines_go_one_after_the_other(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """The last line needs no newline, an empty one is no message, and characters of any script arrive whole."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="one\n\n退款要多久?\r\nthree")
    assert ran.code == 0
    assert stand_in.messages == ["one", "退款要多久?", "three"]
    assert ran.out.splitlines()[1] == "you said 退款要多久?  [faq 4]"


async def test_the_conversation_and_the_visitor_token_go_along(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    stand_in.visitor_token = "v1"
    args = ("chat", "--url", stand_in.url, "--conversation", "order-1", "--visitor-token", "v1")
    ran = await hotdesk(*args, stdin="hi\n")
    assert ran.code == 0
    assert stand_in.connections == [{"conversation": "order-1", "token": "v1"}]


async def test_a_closed_door_says_which_token_it_wants(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    stand_in.visitor_token = "v1"
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="hi\n")
    assert ran.code == 1
    assert "--visitor-token" in ran.err


async def test_json_is_one_reply_a_line(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    ran = await hotdesk("chat", "--url", stand_in.url, "--json", stdin="one\nrefuse\n")
    first, second = map(json.loads, ran.out.splitlines())
    assert (first["text"], first["plugin"], first["generation"]) == ("you said one", "faq", 4)
    assert second["code"] == "turn_refused"


async def test_an_error_is_shown_and_the_exit_code_says_so(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="refuse\nhi\n")
    assert ran.code == 1
    assert "plugin 'pay' failed (turn_refused)" in ran.err
    assert ran.out == "you said hi  [faq 4]\n"


async def test_a_turn_without_a_reply_does_not_hold_the_chat_up(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """No frame says that nobody answers; asking under the same id does, and makes no second message."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="silence\nhi\n")
    assert ran.code == 1
    assert "no plugin answered" in ran.err
    assert ran.out == "you said hi  [faq 4]\n"
    assert stand_in.messages == ["silence", "hi"]


async def test_a_restart_in_an_answer_is_taken_up_where_it_broke(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """The rest comes from the record after the last seq, and is shown once."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="one\ncut\nthree\n")
    assert ran.code == 0
    assert ran.out == "you said one  [faq 4]\nhalf of \nhalf of it and the rest  [faq 4]\nyou said three  [faq 4]\n"
    assert "too slow (1013); reconnecting…" in ran.err
    assert "back." in ran.err
    assert [connection.get("after") for connection in stand_in.connections] == [None, "2"]


async def test_a_message_that_was_not_accepted_is_sent_again(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """Under its id, so that it is one message whether or not the host had it already."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="vanish\n")
    assert (ran.code, ran.out) == (0, "you said vanish  [faq 4]\n")
    assert stand_in.messages == ["vanish"]
    assert len(stand_in.connections) == 2


async def test_a_close_that_means_stay_away_ends_the_chat(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="banned\n")
    assert ran.code == 1
    assert "you are banned (code 1008)" in ran.err
    assert len(stand_in.connections) == 1


async def test_no_host_is_exit_code_3(hotdesk: Hotdesk) -> None:
    ran = await hotdesk("chat", "--url", "http://127.0.0.1:9", stdin="hi\n")
    assert ran.code == 3
    assert "hotdesk run" in ran.err


async def test_a_reply_does_not_steer_the_terminal(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """A bot may repeat what a visitor wrote, escape sequences and all."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="escape\n")
    assert ran.out == "a[2Jb  [faq 4]\n"


async def test_an_answer_that_begins_anew_is_shown_anew(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """A turn that is run again after a rollback streams from index 0 once more."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="anew\n")
    assert ran.out == "old code\nnew code  [faq 4]\n"


async def test_an_answer_whose_beginning_was_missed_is_shown_whole(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """Not its end first."""
    ran = await hotdesk("chat", "--url", stand_in.url, stdin="late\n")
    assert ran.out == "the beginning and the end of it  [faq 4]\n"


# -- on a terminal -----------------------------------------------------------------------------------------


class Terminal:
    """A chat in a pseudo-terminal: what a person types, and what stands there by then."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process = process
        self.shown = ""
        self._waited_for = 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode  # a read may end within a character
        self._fd = fd
        self._grown = asyncio.Event()
        asyncio.get_running_loop().add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            self.shown += self._decode(os.read(self._fd, 65536))
        except OSError:  # how a pseudo-terminal says that the other side is gone
            asyncio.get_running_loop().remove_reader(self._fd)
        self._grown.set()

    async def wait_shown(self, words: str) -> None:
        """Wait until *words* stand behind those that were waited for before."""
        try:
            async with asyncio.timeout(15):
                while (at := self.shown.find(words, self._waited_for)) < 0:
                    self._grown.clear()
                    await self._grown.wait()
        except TimeoutError:
            raise AssertionError(f"{words!r} is not behind {self._waited_for} of {self.shown!r}") from None
        self._waited_for = at + len(words)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)


@pytest.fixture
async def terminal(stand_in: StandIn) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hotdesk", "chat", "--url", stand_in.url, "--conversation", "c"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(theirs)
    terminal = Terminal(process, ours)
    yield terminal
    if process.returncode is None:
        process.kill()
        await process.wait()
    terminal.close()


def leave_with_ctrl_d(terminal: Terminal) -> None:
    terminal.type("\x04")


def leave_with_ctrl_c(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize("leave", [leave_with_ctrl_d, leave_with_ctrl_c])
async def test_a_person_talks_and_leaves(terminal: Terminal, leave: Callable[[Terminal], None]) -> None:
    """The reply is dimly signed, and both ways out are clean: exit code 0 and no traceback."""
    await terminal.wait_shown("› ")
    terminal.type("refund?\r")
    await terminal.wait_shown("you said refund?\x1b[2m  [faq 4]")
    await terminal.wait_shown("\r\n")
    await terminal.wait_shown("› ")
    leave(terminal)
    assert await asyncio.wait_for(terminal.process.wait(), 10) == 0
    await terminal.wait_shown("\r\n\x1b[2mcome back with: hotdesk chat --conversation c")
    assert "Traceback" not in terminal.shown
    assert "Aborted" not in terminal.shown


async def test_chunks_are_shown_as_they_come(terminal: Terminal, stand_in: StandIn) -> None:
    await terminal.wait_shown("› ")
    terminal.type("hold\r")
    await terminal.wait_shown("you said ")
    assert "[faq 4]" not in terminal.shown
    stand_in.hold.set()
    await terminal.wait_shown("hold\x1b[2m  [faq 4]")
