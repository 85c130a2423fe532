"""What of a conversation no longer fits into a prompt, in short; written beside the turns, so that none waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hotdesk_sdk import LlmError, Message

from ..backend import Entry
from ..llm.client import Llm
from ..llm.request import Asked
from ..logs import Logger
from ..runtime.guards import host_task
from .prompt import Prompt
from .recent import ENTRIES
from .turn import TurnRun

__all__ = ["Summaries"]

KEY = "summary"
"""Where in `conversation.state` it is kept: `{"to": SEQ, "text"}`, with all up to that seq in it."""

FULL = 0.75
"""A budget that is so full is near its end: the older half is put in short before anything has to be cut."""

MAX_MADE = 10_000
"""How many finished ones wait for their conversation's next turn; the oldest is made anew should it be wanted."""

MAX_TOKENS = 400
PROMPT = (
    "Put this part of a customer-service conversation in short, for the assistant who goes on with it. Keep names, "
    "numbers, what was asked, promised and settled, and what is still open. No more than 150 words, in the "
    "conversation's language."
)


class Summaries:
    """Summaries in the making. A finished one goes into the conversation's state with the next turn."""

    def __init__(self, llm: Llm, log: Logger) -> None:
        self._llm = llm
        self._log = log
        self._making: dict[str, asyncio.Task[None]] = {}
        self._made: dict[str, dict[str, Any]] = {}

    def of(self, turn: TurnRun) -> tuple[str, int]:
        """The summary of what was said before, and the seq up to which it goes; ("", 0) when there is none."""
        state = turn.conversation.state
        made = self._made.pop(turn.message.conversation, None)
        kept = state.get(KEY)
        if not isinstance(kept, dict) or not isinstance(kept.get("to"), int) or not isinstance(kept.get("text"), str):
            kept = None
        if made is not None and (kept is None or made["to"] > kept["to"]):
            state[KEY] = kept = made
        return (kept["text"], kept["to"]) if kept is not None else ("", 0)

    def consider(self, turn: TurnRun, prompt: Prompt, budget: int, model: str | None) -> None:
        """Begin a summary of the older half of what *prompt* was made of, if it is near its bounds."""
        conversation = turn.message.conversation
        told = prompt.entries
        near = prompt.cut or prompt.tokens > budget * FULL or len(told) >= ENTRIES * FULL
        if not near or len(told) < 2 or conversation in self._making:
            return
        # by seq and not by turn: `to` says that all up to it is in the summary, and what came meanwhile is not in it
        seqs = sorted(entry.seq for entry in told if entry.seq < turn.message.seq)
        to = seqs[: len(prompt.cut) + max(1, (len(told) - len(prompt.cut)) // 2)]
        if not to:
            return
        older = [entry for entry in told if entry.seq <= to[-1]]
        before, _ = self.of(turn)
        task = self._making[conversation] = host_task(self._make(conversation, before, older, model))
        task.add_done_callback(lambda _: self._making.pop(conversation, None))

    async def _make(self, conversation: str, before: str, entries: Sequence[Entry], model: str | None) -> None:
        lines = [f"{'Visitor' if isinstance(entry, Message) else 'Assistant'}: {entry.text}" for entry in entries]
        if before:
            lines.insert(0, f"In short, until then: {before}")
        messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": "\n".join(lines)}]
        try:
            answer = await self._llm.complete(Asked(messages, max_tokens=MAX_TOKENS), model)
        except LlmError as exc:
            self._log.warning("summary_failed", conversation=conversation, problem=str(exc))
            return
        if answer.text:
            while len(self._made) >= MAX_MADE:  # of conversations that nobody went on with
                del self._made[next(iter(self._made))]
            self._made[conversation] = {"to": max(entry.seq for entry in entries), "text": answer.text}

    def forget_all(self) -> None:
        """The journal lost something: keep nothing that was made of it."""
        self._made.clear()
        for task in self._making.values():
            task.cancel()

    async def aclose(self) -> None:
        """Give up what is in the making: it is made again when it is wanted."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
