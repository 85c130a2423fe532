"""The reader of event streams: however the bytes are cut, and however lines end, the same events come of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from openai._streaming import SSEDecoder

from hotdesk.llm.events import MAX_EVENT_BYTES, EventParser

STREAM = (
    ": a comment\n\n"
    'data: {"text":"退款 🙂"}\n\n'
    "event: message\nid: 7\nretry: 10\ndata:no space\n\n"
    "data:  two spaces\ndata: and\ndata:\ndata: four lines\n\n"
    ":\n: keep-alive\n\n\n"
    "data: with: colons: in it\nunknown: field\ndata2: nothing\n\n"
    "data: \u2028 ends no line\n\n"
    "data: [DONE]\n\n"
)
EVENTS = [
    '{"text":"退款 🙂"}',
    "no space",
    " two spaces\nand\n\nfour lines",
    "with: colons: in it",
    "\u2028 ends no line",
    "[DONE]",
]
ENDS = {"LF": "\n", "CR": "\r", "CRLF": "\r\n"}


def parsed(pieces: list[bytes]) -> list[str]:
    parser = EventParser()
    return [event.decode() for piece in pieces for event in parser.feed(piece)]


def bytes_with(end: str) -> bytes:
    return STREAM.replace("\n", ENDS[end]).encode() + (b":" if end == "CR" else b"")  # else the last CR may yet be CRLF


@pytest.mark.parametrize("end", ENDS)
def test_every_cut_in_two_gives_the_same_events(end: str) -> None:
    """Also between a CR and its LF, and within a letter."""
    data = bytes_with(end)
    for at in range(len(data) + 1):
        assert parsed([data[:at], data[at:]]) == EVENTS, at


@pytest.mark.parametrize("end", ENDS)
def test_bytes_that_come_one_at_a_time_give_the_same_events(end: str) -> None:
    """As the slowest of servers sends them."""
    assert parsed([bytes([byte]) for byte in bytes_with(end)]) == EVENTS


@pytest.mark.parametrize("end", ENDS)
def test_random_cuts_give_the_same_events(end: str) -> None:
    """A thousand times, empty reads among them."""
    chance = random.Random(11)
    data = bytes_with(end)
    for _ in range(1000):
        cuts = sorted(chance.choices(range(len(data) + 1), k=chance.randrange(12)))
        assert parsed([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]) == EVENTS


def test_ends_of_lines_may_be_mixed() -> None:
    """A blank line is a blank line, by whichever end."""
    assert parsed([b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\ndata: d\n\n"]) == ["a", "b", "c", "d"]


def test_an_event_that_the_end_cuts_is_not_given() -> None:
    """Without its blank line nobody knows whether it is whole."""
    assert parsed([b"data: whole\n\ndata: cut\n"]) == ["whole"]
    assert parsed([b"data: whole\n\ndata: cu"]) == ["whole"]


def test_an_event_without_data_is_none() -> None:
    """Some servers keep a connection alive with them."""
    assert parsed([b"data:\n\ndata: \n\nevent: ping\n\nid: 1\n\ndata: x\n\n"]) == ["x"]


def test_two_streams_do_not_share_what_is_unfinished() -> None:
    """Each parser has its own rest."""
    one, two = EventParser(), EventParser()
    assert one.feed(b"data: of one") == []
    assert two.feed(b"data: of two\n\n") == [b"of two"]
    assert one.feed(b"\n\n") == [b"of one"]


@pytest.mark.parametrize(
    "block",
    [b"x" * 65536, b"data: " + b"x" * 65530 + b"\n", b"data:\n" * 10922, b"data: x\r\n" * 7281, b"\r" + b"y" * 65535],
    ids=["endless line", "endless event", "empty data lines", "short data lines", "lines of other fields"],
)
def test_what_has_no_end_is_given_up_before_it_fills_the_memory(block: bytes) -> None:
    """An event is refused soon after it is over its bound; lines that are passed over take no memory."""
    parser = EventParser()
    if block.startswith(b"\r"):
        for _ in range(100):
            assert parser.feed(block) == []
        assert sum(map(len, parser._parts)) < 2 * len(block)
        return
    with pytest.raises(ValueError, match="an event is over 2097152 bytes"):
        [parser.feed(block) for _ in range(MAX_EVENT_BYTES // len(block) + 2)]


def test_an_event_under_the_bound_is_taken_whole() -> None:
    """In as many reads as it likes."""
    parser = EventParser()
    long = b"x" * (MAX_EVENT_BYTES - 100)
    pieces = [long[at : at + 100_000] for at in range(0, len(long), 100_000)]
    for piece in [b"data: ", *pieces]:
        assert parser.feed(piece) == []
    assert parser.feed(b"\n\n") == [long]


PIECES = ["data: ", "data:", "data", ":", "event: e", "id: 3", "retry: x", "\n", "\n\n", "\r", "\r\n", "\n\n",
          "a", '{"x":1}', " ", "天", "\ufeff", "data: y\n\n", "data: z\r\n\r\n", "\x00", "\x85", "\u2029"]  # fmt: skip


def random_streams(count: int) -> Iterator[str]:
    chance = random.Random(23)
    for _ in range(count):
        yield "".join(chance.choices(PIECES, k=chance.randrange(1, 40)))


def test_the_official_decoder_reads_the_same_in_random_streams() -> None:
    """Where both see data: theirs also gives events without any, which its own caller then fails to read as JSON."""
    chance = random.Random(5)
    seen = 0
    for text in random_streams(5000):
        data = f"{text}\n\n".replace("data\n", "data:\n").replace("data\r", "data:\r").encode()
        cuts = sorted(chance.choices(range(len(data) + 1), k=4))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        theirs = [event.data for event in SSEDecoder().iter_bytes(iter(pieces)) if event.data]
        assert parsed(pieces) == theirs, text
        seen += len(theirs)
    assert seen > 3000


def test_a_byte_order_mark_costs_both_the_first_line() -> None:
    """No provider sends one; if one did, the role event would be lost, and nothing else."""
    data = "\ufeffdata: role\n\ndata: x\n\n".encode()
    assert parsed([data]) == [event.data for event in SSEDecoder().iter_bytes(iter([data]))] == ["x"]
