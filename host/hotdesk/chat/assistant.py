"""`ctx.llm`: what a plugin says to the model, and the model's whole answer to a turn, tool calls and all."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hotdesk_sdk import Attachment, Completion, Reply, ToolCall, Usage

from ..errors import ImageUnusable
from ..llm.client import Llm, as_messages
from ..llm.request import Asked
from ..llm.stream import LlmStream
from ..metrics import Metrics
from ..runtime.active import Generation
from ..runtime.call import CLOCK, Calls
from ..runtime.guards import CURRENT, host_task
from ..runtime.scope import Scope
from .images import Images, described
from .prompt import MAX_IMAGES, Prompt, build_prompt, in_turn_order
from .recent import ENTRIES, Recent
from .summaries import Summaries
from .tools import Toolbox, ToolCalls
from .turn import TurnRun

__all__ = ["Assistant", "PluginLlm"]

MAX_ROUNDS = 6
"""How often a model may call tools in one answer; then it has to answer with what it knows."""

IMAGES_S = 12.0
"""How long a prompt waits for all its images together; a model is told of the others in words."""

IMAGES_BYTES = 8 * 1024 * 1024
"""How much of images goes into one prompt, the newest first."""

INLINE_BYTES = 256 * 1024
"""Larger images are encoded in a thread."""

Messages = str | Sequence[Mapping[str, Any]]


class Assistant:
    """What all plugins' `ctx.llm` share."""

    def __init__(
        self, llm: Llm, *, recent: Recent, images: Images, calls: Calls, metrics: Metrics, summaries: Summaries
    ) -> None:
        self.llm = llm
        self.recent = recent
        self.images = images
        self.summaries = summaries
        self.tool_calls = ToolCalls(calls, metrics)

    def for_plugin(self, generation: Generation, scope: Scope) -> PluginLlm:
        """`ctx.llm` of one generation."""
        return PluginLlm(self, generation, scope)


class _Wait:
    """While a plugin waits for the model: its own clock rests, and what is begun is the host's and not the plugin's."""

    __slots__ = ("_call", "_clock", "_plugin")

    def __init__(self) -> None:
        self._clock = CLOCK.get()
        self._call: object = None
        self._plugin: Generation | None = None

    def rest(self) -> None:
        self._plugin = CURRENT.get()
        if self._plugin is not None:
            CURRENT.set(None)
        if self._clock is not None:
            self._call = self._clock.rest()

    def go_on(self) -> None:
        if self._plugin is not None:
            CURRENT.set(self._plugin)
        if self._clock is not None:
            self._clock.go_on(self._call)


class PluginLlm:
    """See `hotdesk_sdk.Llm`."""

    def __init__(self, assistant: Assistant, generation: Generation, scope: Scope) -> None:
        self._assistant = assistant
        self._generation = generation
        self._scope = scope
        self._open: weakref.WeakSet[LlmStream] = weakref.WeakSet()
        scope.push("ctx.llm", self.close)

    def close(self) -> None:
        """Hang up on what the generation left open."""
        for stream in list(self._open):
            stream.close()

    @property
    def available(self) -> bool:
        return bool(self._assistant.llm.models)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._assistant.llm.models)

    async def complete(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **extra: Any,
    ) -> Completion:
        self._scope.serve("ctx.llm")
        asked = Asked(as_messages(messages), temperature, max_tokens, tools, extra)
        return await self._assistant.llm.complete(asked, model, _Wait())

    def stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **extra: Any,
    ) -> LlmStream:
        self._scope.serve("ctx.llm")
        return self._begin(Asked(as_messages(messages), temperature, max_tokens, tools, extra), model)

    def _begin(self, asked: Asked, model: str | None) -> LlmStream:
        stream = self._assistant.llm.stream(asked, model, _Wait())
        self._open.add(stream)
        return stream

    async def reply(
        self,
        turn: TurnRun,
        *,
        system: str = "",
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        history_tokens: int = 8000,
        summarise: bool = False,
        tools: bool | Sequence[str] = True,
        **extra: Any,
    ) -> Reply:
        self._scope.serve("ctx.llm")
        assistant = self._assistant
        chosen = assistant.llm.choose(model)
        wait = _Wait()
        wait.rest()
        try:
            sees = {model.settings.vision for model in chosen}
            prompt = await self._prompt(turn, system, history_tokens, summarise, sees=True in sees)
            blind = None
            if len(sees) == 2 and prompt.images:
                blind = (await self._prompt(turn, system, history_tokens, summarise, sees=False)).messages
        finally:
            wait.go_on()
        if summarise:
            assistant.summaries.consider(turn, prompt, history_tokens, model)
        toolbox: Toolbox = turn.snapshot.tools
        offer = toolbox.offer(tools)
        asked = Asked(prompt.messages, temperature, max_tokens, offer, extra, blind)
        reply = Reply()
        reply.chunks = Answering(self, turn, reply, asked, model)
        return reply

    async def _prompt(self, turn: TurnRun, system: str, budget: int, summarise: bool, *, sees: bool) -> Prompt:
        assistant, message = self._assistant, turn.message
        entries = await assistant.recent.newest(message.conversation, ENTRIES)
        before = in_turn_order(entries, message.seq)
        if not before and message.seq > 1:  # so many wait behind this one that nothing older was among the newest
            before = in_turn_order(
                await assistant.recent.history(message.conversation, message.seq, ENTRIES), message.seq
            )
        summary = ""
        if summarise:
            summary, covered = assistant.summaries.of(turn)
            if covered:
                before = [entry for entry in before if entry.seq > covered]
        wanted = [*message.attachments]
        for entry in reversed(before):
            wanted += getattr(entry, "attachments", ())
        urls = await self._load(wanted[:MAX_IMAGES], message.conversation) if sees and wanted else {}

        async def show(attachment: Attachment) -> str | None:
            return urls.get(attachment)

        return await build_prompt(
            before,
            turn.text,
            message.attachments,
            system=system,
            summary=summary,
            budget=budget,
            show=show,
            describe=described,
        )

    async def _load(self, wanted: Sequence[Attachment], conversation: str) -> dict[Attachment, str]:
        """The images among *wanted* (newest first) that can be had in time, as data URLs, up to a bound together."""
        images = self._assistant.images
        tasks = {one: host_task(images.load(one, conversation)) for one in dict.fromkeys(wanted)}
        try:
            await asyncio.wait(tasks.values(), timeout=IMAGES_S)
        finally:
            for task in tasks.values():
                task.cancel()
        urls: dict[Attachment, str] = {}
        size = 0
        for attachment, task in tasks.items():
            if not task.done() or task.cancelled() or isinstance(task.exception(), ImageUnusable):
                continue
            image = task.result()
            size += len(image.data)
            if size > IMAGES_BYTES:
                break
            large = len(image.data) > INLINE_BYTES
            urls[attachment] = await asyncio.to_thread(image.data_url) if large else image.data_url()
        return urls


class Answering:
    """The model's answer to a turn, as chunks: what it says between its tool calls, and after them."""

    of_host = True

    __slots__ = (
        "_asked",
        "_llm",
        "_messages",
        "_model",
        "_offered",
        "_ready",
        "_reply",
        "_rounds",
        "_said",
        "_stream",
        "_turn",
        "_usage",
    )

    def __init__(self, llm: PluginLlm, turn: TurnRun, reply: Reply, asked: Asked, model: str | None) -> None:
        self._llm = llm
        self._turn = turn
        self._reply = reply
        self._asked = asked
        self._model = model
        self._offered = frozenset(tool["function"]["name"] for tool in asked.tools)
        self._rounds = 0
        self._said: list[str] = []
        """What the model said in this round; it is to know that when it goes on after its tools' results."""
        self._usage: Usage | None = None
        self._ready: list[str] = []
        self._stream = llm._begin(asked, model)

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> str:
        if not self._ready:
            self._ready = await self.next_batch()
            if not self._ready:
                raise StopAsyncIteration
            self._ready.reverse()
        return self._ready.pop()

    async def next_batch(self) -> list[str]:
        """See `LlmStream.next_batch`."""
        while True:
            stream = self._stream
            try:
                batch = await stream.next_batch()
            finally:
                self._reply.metadata["model"] = stream.model  # now, for it may be cut between two pulls
            if batch:
                if self._offered:
                    self._said += batch
                return batch
            self._count(stream)
            if not (calls := _named(stream)) or not self._offered or self._rounds == MAX_ROUNDS:
                return []
            await self._call_tools(calls)

    async def push(self, tell: Callable[[list[str]], bool]) -> bool:
        """See `LlmStream.push`."""

        def note(batch: list[str]) -> bool:
            self._said += batch
            return tell(batch)

        while True:
            stream = self._stream
            try:
                if not await stream.push(note if self._offered else tell):
                    return False
            finally:
                self._reply.metadata["model"] = stream.model  # see `next_batch`
            self._count(stream)
            if not (calls := _named(stream)) or not self._offered or self._rounds == MAX_ROUNDS:
                return True
            await self._call_tools(calls)

    def _count(self, stream: LlmStream) -> None:
        if (usage := stream.usage) is not None:
            before = self._usage or Usage()
            self._usage = Usage(
                before.prompt_tokens + usage.prompt_tokens, before.completion_tokens + usage.completion_tokens
            )
        metadata = self._reply.metadata
        if self._usage is not None:
            metadata["usage"] = {"in": self._usage.prompt_tokens, "out": self._usage.completion_tokens}
        if stream.finish not in ("", "stop", "tool_calls"):
            metadata["finish"] = stream.finish

    async def _call_tools(self, calls: list[ToolCall]) -> None:
        """Make the calls, and ask the model anew with their results; in the last round without an offer."""
        self._rounds += 1
        assistant, turn = self._llm._assistant, self._turn
        used: set[str] = set()
        for index, call in enumerate(calls):
            if not call.id or call.id in used:
                call.id = f"{call.id or 'call'}_{self._rounds}_{index}"
            used.add(call.id)
        wait = _Wait()
        wait.rest()
        try:
            results = await assistant.tool_calls.run(turn, turn.snapshot.tools, self._offered, calls)
        finally:
            wait.go_on()
        text, self._said = "".join(self._said), []
        asked = {
            "role": "assistant",
            "content": text or None,
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ],
        }
        answers = [
            {"role": "tool", "tool_call_id": call.id, "content": text}
            for call, text in zip(calls, results, strict=True)
        ]
        before = self._asked
        extra = {**before.extra, "tool_choice": "none"} if self._rounds == MAX_ROUNDS else before.extra
        said: list[Mapping[str, Any]] = [asked, *answers]
        self._asked = Asked(
            [*before.messages, *said], before.temperature, before.max_tokens, before.tools, extra,
            None if before.blind is None else [*before.blind, *said],
        )  # fmt: skip
        self._stream = self._llm._begin(self._asked, self._model)

    async def aclose(self) -> None:
        """Hang up."""
        self._stream.close()


def _named(stream: LlmStream) -> list[ToolCall]:
    """The tool calls of an answer; one without a name is none."""
    return [call for call in stream.tool_calls if call.name] if stream.tool_calls else []
