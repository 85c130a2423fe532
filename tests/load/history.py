"""What a run writes down: one typed line for everything that was sent, promised, shown and read back.

Times are seconds on the sender's own monotonic clock. The record, as a door gave it afterwards, goes into the
same file, so that one file is a whole case for the checker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

__all__ = [
    "Accepted",
    "Event",
    "Heard",
    "History",
    "Joined",
    "Owned",
    "Recorded",
    "Replied",
    "Sent",
    "Streamed",
    "read_history",
]


class _Event(msgspec.Struct, frozen=True, tag_field="event", tag=str.lower, kw_only=True, omit_defaults=True):
    conversation: str
    id: str
    time: float


class Sent(_Event, frozen=True):
    """A message left. Written again, with the same id, for each further try."""

    expects_reply: bool = True


class Accepted(_Event, frozen=True):
    """The host promised that the message is on disk, as *seq*."""

    seq: int


class Replied(_Event, frozen=True):
    """A reply was shown; `id` is the reply's. `marks` are what the code that made it said of its version.

    `count` is how many turns of the conversation the bot had counted in its state, this one included, and `by` the
    process that ran the turn; 0 where the bot does not say.
    """

    seq: int
    to: str | None
    generation: int
    plugin: str
    text: str
    marks: tuple[str, ...] = ()
    count: int = 0
    by: int = 0


class Streamed(_Event, frozen=True):
    """A stream of chunks for message `id` is over: by its proper end, or else `ended` is False.

    A turn that begins anew on another host streams anew: `restarts` says how often the index went back, `text` is what
    came since. `holes` are indexes that were passed over: a chunk is not kept, so the news of one may be lost.
    """

    text: str
    ended: bool
    restarts: int = 0
    holes: int = 0


class Joined(_Event, frozen=True):
    """A reader came; `id` names its stay. It is to be shown every reply above *after*, each once, in order."""

    after: int


class Heard(_Event, frozen=True):
    """In the stay `id` the reply *seq* was shown.

    `again`: its message was sent a second time in this stay, and a repeat gets the first one's answer, whenever.
    """

    seq: int
    again: bool = False


class Owned(_Event, frozen=True):
    """Somebody looked and found *epoch* and an owner, process *by* (0: nobody, -1: not known), of a partition.

    Written when either has changed, in the order of looking; a conversation is in partition crc32 % *partitions*.
    """

    partition: int
    partitions: int
    epoch: int
    by: int


class Recorded(_Event, frozen=True):
    """One entry of the record, in the order in which the host gave it. `to` and the rest are a reply's."""

    type: str
    seq: int
    to: str | None = None
    generation: int = 0
    plugin: str = ""
    text: str = ""
    marks: tuple[str, ...] = ()
    count: int = 0
    by: int = 0


Event = Sent | Accepted | Replied | Streamed | Recorded | Joined | Heard | Owned


class History:
    """The events of one run in memory; `save` writes them as JSON lines, so that no disk disturbs the run."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.add = self.events.append

    def save(self, path: Path) -> Path:
        """Write everything to *path*, and return it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encode_lines(self.events))
        return path


def read_history(path: Path) -> Iterator[Event]:
    """The events of a saved history, in order."""
    decode = msgspec.json.Decoder(Event).decode
    with path.open("rb") as lines:
        for line in lines:
            yield decode(line)


def _encode_lines(events: Iterable[Event]) -> bytes:
    return msgspec.json.Encoder().encode_lines(list(events))
