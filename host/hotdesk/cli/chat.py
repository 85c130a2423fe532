"""`hotdesk chat`: a visitor in the terminal, over the WebSocket door.

Owns the visitor's side of that door: ids, resume by seq, coming back after a lost connection. The terminal is
`terminal.py`.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
import click
import msgspec

from .admin_client import DEFAULT_URL, ClientFailed, HostAbsent, no_host, refusal
from .terminal import Lines, Screen

__all__ = ["chat"]

# "Service restart" and "try again later" (RFC 6455 registry), the host going away, and no close frame at all.
COME_BACK = frozenset({1001, 1006, 1011, 1012, 1013})

BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)

GIVE_UP_S = 30.0
"""How long a chat without a person looks for a lost host. A person sees what goes on and leaves when they like."""

QUIET_S = 1.0
"""After this long without a sign the host is asked whether the turn has ended: a turn may end without a reply."""


@dataclass(slots=True)
class Asked:
    """A message of ours until something has come back for it."""

    id: str
    text: str
    accepted: bool = False
    failed: bool = False
    heard_at: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Chat:
    """One conversation over as many connections as it takes. A message is sent again, under its id, until accepted."""

    def __init__(self, url: str, conversation: str, token: str | None, screen: Screen, *, patient: bool) -> None:
        self._url = url.rstrip("/")
        self._conversation = conversation
        self._token = {"token": token} if token else {}
        self._screen = screen
        self._patient = patient
        self._asked: dict[str, Asked] = {}
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._last_reply: int | None = None
        self._first_seq: int | None = None
        self._proven = False

    # -- the connection --------------------------------------------------------------------------------------

    async def connect(self, session: aiohttp.ClientSession) -> None:
        """Open the door, or raise `ClientFailed`. What was missed since the last time follows as frames."""
        after = self._last_reply if self._last_reply is not None else self._first_seq
        resume = {} if after is None else {"after": str(after)}
        query = {"conversation": self._conversation, **resume, **self._token}
        try:
            self._ws = await session.ws_connect(
                f"{self._url}/v1/ws", params=query, heartbeat=20.0, max_msg_size=64 * 1024 * 1024
            )
        except aiohttp.WSServerHandshakeError as exc:
            raise await self._refused(session, exc.status) from exc
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            raise no_host(self._url, exc) from exc
        for asked in list(self._asked.values()):
            asked.heard_at = asyncio.get_running_loop().time()
            if not asked.accepted:
                await self._send(asked)

    async def listen(self, session: aiohttp.ClientSession) -> None:
        """Take frames and come back whenever the connection is lost. Ends by `ClientFailed` or by being cancelled."""
        while self._ws is not None:
            code, reason = await self._hear(self._ws)
            self._ws = None
            if code not in COME_BACK:
                raise ClientFailed(f"the host ended the connection: {reason or 'no reason given'} (code {code})")
            await self._come_back(session, f"{reason or 'connection lost'} ({code})")

    async def _hear(self, ws: aiohttp.ClientWebSocketResponse) -> tuple[int, str]:
        """Take frames until the connection ends; its close code and the reason that came with it."""
        reason = ""
        while True:
            message = await ws.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                self._proven = True
                self._take(message.data)
            elif message.type is aiohttp.WSMsgType.CLOSE:
                reason = message.extra or ""
            if ws.closed:
                return ws.close_code or 1006, reason

    async def _come_back(self, session: aiohttp.ClientSession, why: str) -> None:
        self._screen.note(f"{why}; reconnecting…")
        loop = asyncio.get_running_loop()
        lost_at, attempt = loop.time(), 0 if self._proven else 2
        self._proven = False
        while self._ws is None:
            await asyncio.sleep(BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)])
            attempt += 1
            try:
                await self.connect(session)
            except ClientFailed as failed:
                if not isinstance(failed, HostAbsent) and failed.code not in (
                    "stopping",
                    "overloaded",
                    "backend_unavailable",
                ):
                    raise
                if not self._patient and loop.time() - lost_at > GIVE_UP_S:
                    raise
        self._screen.note("back.")

    async def _refused(self, session: aiohttp.ClientSession, status: int) -> ClientFailed:
        """Why the door stayed shut. A handshake's body is not to be had, so the record's door is asked the same."""
        async with session.get(self._messages, params={"limit": "1", **self._token}) as response:
            body = await response.read() if response.status == status else b""
        if status == 401:
            given = "this visitor token is not valid (any more)" if self._token else "the host wants a visitor token"
            return ClientFailed(given, "Give one for this conversation with --visitor-token.", code="unauthorized")
        if status >= 500 and not body:
            return HostAbsent(f"the host at {self._url} is not ready ({status})")
        if not body:
            return HostAbsent(f"what answers at {self._url} has no WebSocket door ({status})")
        return refusal(self._url, status, body, token_given=bool(self._token))

    def greet(self) -> None:
        """Tell a person where they are."""
        if self._patient:
            self._screen.note(f"conversation {self._conversation} at {self._url} · Ctrl-D leaves")

    async def aclose(self) -> None:
        """Leave by the door."""
        if self._ws is not None:
            await self._ws.close()

    @property
    def _messages(self) -> str:
        return f"{self._url}/v1/conversations/{quote(self._conversation, safe='')}/messages"

    # -- saying ----------------------------------------------------------------------------------------------

    async def say(self, text: str) -> Asked:
        """Send *text*, now or as soon as there is a connection again."""
        asked = Asked(secrets.token_hex(8), text, heard_at=asyncio.get_running_loop().time())
        self._asked[asked.id] = asked
        await self._send(asked)
        return asked

    async def _send(self, asked: Asked) -> None:
        if self._ws is None or self._ws.closed:
            return
        try:
            await self._ws.send_json({"type": "message", "id": asked.id, "text": asked.text})
        except (ConnectionError, aiohttp.ClientError):
            pass  # `listen` sees the same, comes back, and sends it again

    async def wait_answered(self, session: aiohttp.ClientSession, asked: Asked, wait_s: float) -> bool:
        """Wait until *asked* has its reply or error, or gets none for sure; True when it got a reply."""
        answer = asyncio.create_task(asked.done.wait())
        silence = asyncio.create_task(self._silence(session, asked, wait_s))
        try:
            await asyncio.wait({answer, silence}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done.is_set():
                self._screen.note(silence.result())
        finally:
            answer.cancel()
            silence.cancel()
            await asyncio.gather(answer, silence, return_exceptions=True)
            self._asked.pop(asked.id, None)
        return asked.done.is_set() and not asked.failed

    async def _silence(self, session: aiohttp.ClientSession, asked: Asked, wait_s: float) -> str:
        """Return once *asked* has been without a sign for too long, or its turn ended without one: the words for it."""
        loop = asyncio.get_running_loop()
        inquired = False
        while True:
            await asyncio.sleep(QUIET_S)
            quiet_s = loop.time() - asked.heard_at
            if self._ws is None or quiet_s < QUIET_S:
                continue
            if quiet_s > wait_s:
                return f"no answer within {wait_s:g} s; what comes later is shown here"
            if asked.accepted and not inquired:
                inquired = True
                if (ending := await self._inquire(session, asked, wait_s)) is not None:
                    return ending

    async def _inquire(self, session: aiohttp.ClientSession, asked: Asked, wait_s: float) -> str | None:
        """Ask how the turn ended: the same id once more gets the first one's answer. None: with a reply, or not yet."""
        query = {"wait": f"{min(wait_s, 300):g}", **self._token}
        try:
            async with session.post(
                self._messages, params=query, json={"id": asked.id, "text": asked.text}
            ) as response:
                answer = msgspec.json.decode(await response.read(), type=dict[str, Any])
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            return None
        if response.status != 200 or answer.get("replies") != []:
            return None
        error = answer.get("error")
        return f"{error.get('message')} ({error.get('code')})" if isinstance(error, dict) else "(no plugin answered)"

    # -- hearing ---------------------------------------------------------------------------------------------

    def _take(self, data: str) -> None:
        try:
            frame: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.DecodeError:
            return
        asked = self._asked.get(str(frame.get("to") or frame.get("id")))
        if asked is not None:
            asked.heard_at = asyncio.get_running_loop().time()
        match frame.get("type"):
            case "accepted":
                if asked is not None:
                    asked.accepted = True
                if self._first_seq is None:
                    self._first_seq = int(frame["seq"])
            case "chunk":
                if asked is not None:
                    self._screen.chunk(asked.id, int(frame.get("index", 0)), str(frame.get("text", "")))
            case "reply":
                self._take_reply(frame, self._asked.get(str(frame.get("to"))))
            case "error":
                self._take_error(frame, asked)

    def _take_reply(self, frame: dict[str, Any], asked: Asked | None) -> None:
        seq = int(frame["seq"])
        if self._last_reply is not None and seq <= self._last_reply:
            return
        self._last_reply = seq
        self._screen.reply(frame)
        if asked is not None:
            asked.done.set()

    def _take_error(self, frame: dict[str, Any], asked: Asked | None) -> None:
        if frame.get("to") is None:  # a frame that was not understood answers to no id: it is the oldest not accepted
            asked = next((one for one in self._asked.values() if not one.accepted), None)
        self._screen.problem(frame)
        if asked is not None:
            asked.failed = True
            asked.done.set()


async def _talk(chat: Chat, session: aiohttp.ClientSession, lines: Lines, wait_s: float) -> bool:
    """Say line after line, each once the one before is answered; True when all of them were."""
    all_answered = True
    while (line := await lines.next()) is not None:
        if line.strip():
            asked = await chat.say(line)
            all_answered &= await chat.wait_answered(session, asked, wait_s)
    return all_answered


async def _run(chat: Chat, lines: Lines, wait_s: float) -> bool:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=5)) as session:
        await chat.connect(session)
        chat.greet()
        talking = asyncio.create_task(_talk(chat, session, lines, wait_s))
        listening = asyncio.create_task(chat.listen(session))
        try:
            await asyncio.wait({talking, listening}, return_when=asyncio.FIRST_COMPLETED)
            return await (talking if talking.done() else listening) is not False
        finally:
            for task in (talking, listening):
                task.cancel()
            await asyncio.gather(talking, listening, return_exceptions=True)
            await chat.aclose()


@click.command(short_help="Talk to a running host from the terminal, streaming.")
@click.option("--conversation", "-c", metavar="ID", help="The conversation to be in. [default: a new one]")
@click.option(
    "--url",
    metavar="URL",
    envvar="HOTDESK_URL",
    show_envvar=True,
    default=DEFAULT_URL,
    show_default=True,
    help="The host's address.",
)
@click.option(
    "--visitor-token",
    "--token",
    "token",
    metavar="TOKEN",
    envvar="HOTDESK_VISITOR_TOKEN",
    show_envvar=True,
    help="A visitor token for the conversation, where the host asks for one (visitor_tokens = true).",
)
@click.option(
    "--wait",
    "wait_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=30.0,
    show_default=True,
    help="How long to wait for a sign of an answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Each reply and error as one line of JSON.")
def chat(conversation: str | None, url: str, token: str | None, wait_s: float, as_json: bool) -> None:
    """Talk to a running host: type a line, read the answer as it is written.

    Behind each reply stands who gave it: [faq 4] is plugin faq in its fourth generation. A lost connection is
    taken up again where it broke, and nothing is said or heard twice.

    From a pipe each line is a message, sent once the one before is answered; the end of the input ends the chat,
    with exit code 1 if a message got no reply.

    \b
    Examples:
      hotdesk chat
      hotdesk chat --conversation order-1042
      echo "refund?" | hotdesk chat
      hotdesk chat --json < questions.txt | jq -r .text
    """
    conversation = conversation or f"cli-{secrets.token_hex(4)}"
    lines = Lines()
    screen = Screen(lines, as_json=as_json)
    visitor = Chat(url, conversation, token, screen, patient=lines.interactive)
    try:
        all_answered = asyncio.run(_run(visitor, lines, wait_s))
    except KeyboardInterrupt:
        if not lines.interactive:
            raise SystemExit(130) from None
        all_answered = True
    finally:
        screen.end()
        lines.close()
    if lines.interactive:
        screen.note(f"come back with: hotdesk chat --conversation {conversation}")
    elif not all_answered:
        raise SystemExit(1)
