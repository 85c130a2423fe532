"""What was said lately in conversations that a model or a plugin looks back at: in memory once it was read.

Holds nothing of conversations whose history nobody asks for, so those cost a failed look-up an entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ..backend import Backend, Entry

__all__ = ["Recent"]

ENTRIES = 64
"""How many entries of one conversation are held; who wants more reads the journal."""

MAX_CHARS = 64 * 1024 * 1024
"""How much text is held of all conversations together; those that were looked at longest ago go first."""

NEWEST = 2**63 - 1


class _Window:
    """The newest entries of one conversation: by their seq, with none missing between them."""

    __slots__ = ("chars", "complete", "entries", "loading")

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.complete = False
        """Nothing was said before the first of `entries`."""
        self.loading = True
        self.chars = 0

    def add(self, entry: Entry) -> int:
        """Hold *entry*; returns by how many characters it grew."""
        entries = self.entries
        before = self.chars
        late = bool(entries) and entry.seq < next(reversed(entries))
        if entry.seq not in entries:
            self.chars += len(entry.text) + 200
        entries[entry.seq] = entry
        if late:  # told out of order: a reply and a message of one commit
            self.entries = entries = dict(sorted(entries.items()))
        while len(entries) > ENTRIES and not self.loading:
            self.chars -= len(entries.pop(next(iter(entries))).text) + 200
            self.complete = False
        return self.chars - before

    def covers(self) -> bool:
        """Whether no entry is missing between the first and the last."""
        entries = self.entries
        return not entries or next(reversed(entries)) - next(iter(entries)) + 1 == len(entries)


class Recent:
    """The windows of all conversations that were looked back at; with *eager*, of those that began here, too."""

    def __init__(self, backend: Backend, *, eager: bool = False) -> None:
        self._backend = backend
        self._eager = eager
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._chars = 0
        self.hits = 0
        self.misses = 0

    def note(self, entry: Entry) -> None:
        """*entry* is on disk."""
        window = self._windows.get(entry.conversation)
        if window is None:
            if not self._eager or entry.seq != 1:
                return
            window = self._windows[entry.conversation] = _Window()  # nothing was said before: there is nothing to read
            window.loading, window.complete = False, True
        self._chars += window.add(entry)
        if self._chars > MAX_CHARS:
            self._bound()

    def forget_all(self) -> None:
        """The journal lost something: hold nothing that it may not have."""
        self._windows.clear()
        self._chars = 0

    def forget(self, belongs: Callable[[str], bool]) -> None:
        """Hold nothing of the conversations that *belongs* is true of: what is said there is not heard here."""
        for conversation in [name for name in self._windows if belongs(name)]:
            self._chars -= self._windows.pop(conversation).chars

    async def newest(self, conversation: str, limit: int) -> list[Entry]:
        """The newest *limit* entries, oldest first."""
        return await self._read(conversation, NEWEST, limit)

    async def history(self, conversation: str, before: int, limit: int) -> list[Entry]:
        """The newest *limit* entries below the seq *before*, oldest first."""
        return await self._read(conversation, before, limit)

    async def _read(self, conversation: str, before: int, limit: int) -> list[Entry]:
        if limit > ENTRIES:
            return await self._backend.history(conversation, before, limit)
        window = self._windows.get(conversation)
        if window is not None and not window.loading:
            self._windows.move_to_end(conversation)
            if window.covers():
                found = [entry for entry in window.entries.values() if entry.seq < before]
                if len(found) >= limit or window.complete:
                    self.hits += 1
                    return found[-limit:] if limit else []
        self.misses += 1
        page = await self._load(conversation)
        found = [entry for entry in page if entry.seq < before]
        if len(found) >= limit or len(page) < ENTRIES:
            return found[-limit:] if limit else []
        return await self._backend.history(conversation, before, limit)

    async def _load(self, conversation: str) -> list[Entry]:
        """Read a window from the journal; what is said meanwhile goes into it too."""
        old = self._windows.pop(conversation, None)
        if old is not None:
            self._chars -= old.chars
        window = self._windows[conversation] = _Window()
        try:
            page = await self._backend.history(conversation, NEWEST, ENTRIES)
        except BaseException:
            if self._windows.get(conversation) is window:
                del self._windows[conversation]
                self._chars -= window.chars
            raise
        noted = window.entries
        window.entries = {entry.seq: entry for entry in page} | noted
        if noted:
            window.entries = dict(sorted(window.entries.items()))
        window.complete = len(page) < ENTRIES
        window.loading = False
        chars = sum(len(entry.text) + 200 for entry in window.entries.values())
        if self._windows.get(conversation) is window:
            self._chars += chars - window.chars
        window.chars = chars
        self._bound()
        return list(window.entries.values())

    def _bound(self) -> None:
        while self._chars > MAX_CHARS and len(self._windows) > 1:
            _, window = self._windows.popitem(last=False)
            self._chars -= window.chars
