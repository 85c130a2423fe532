"""A component's exports as the hooks of a plugin: the same onion, deadlines and receipts as for Python."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from hotdesk_sdk import Answer, Attachment, InboundMessage, Intake, Reply, Request, Sender, Tool

from ..metrics import CallStats
from .active import BoundHook, Generation
from .answers import check_answer
from .scope import Context
from .wasm_calls import GuestFault
from .wasm_guest import Guest
from .wasm_imports import decoded
from .wasm_operations import as_text

__all__ = ["bind_guest"]

EVENTS = {
    "on_message": "message",
    "on_reply": "reply",
    "on_conversation_opened": "conversation-opened",
    "on_conversation_closed": "conversation-closed",
    "on_assigned": "assigned",
}

_encode = msgspec.json.Encoder().encode


def bind_guest(
    generation: Generation, guest: Guest, ctx: Context, stats: Callable[[str, str], CallStats]
) -> dict[str, BoundHook]:
    """The hooks that *guest* has, by the interfaces that it exports."""
    hooks = _Hooks(guest, ctx)
    has = frozenset(guest.code.inspected.exports)
    found: dict[str, Callable[..., Any]] = {"setup": guest.open}
    if "lifecycle" in has:
        found |= {
            "configure": guest.configure,
            "probe": hooks.probe,
            "export_state": hooks.export_state,
            "import_state": hooks.import_state,
        }
    if has & {"middleware", "chunks"}:
        found["middleware"] = hooks.middleware if "middleware" in has else hooks.only_chunks
    if "bot" in has:
        found["respond"] = hooks.respond
    if "tools" in has:
        found["tools"] = hooks.tools
    if "intake" in has:
        found["intake"] = hooks.intake
    if "delivery" in has:
        found["deliver"] = hooks.deliver
    if "events" in has:
        found |= {hook: hooks.event(name) for hook, name in EVENTS.items()}
    return {name: BoundHook(name, call, False, stats(generation.plugin, name)) for name, call in found.items()}


class _Hooks:
    """The hooks of one guest. A decision that makes no sense where it is given is a `GuestFault`."""

    def __init__(self, guest: Guest, ctx: Context) -> None:
        self._guest = guest
        self._ctx = ctx
        self._has_chunks = "chunks" in guest.code.inspected.exports

    # -- turns -----------------------------------------------------------------------------------------------

    async def middleware(self, turn: Any, call_next: Any) -> Any:
        case, given = await self._guest.call("middleware.before", turn_record(turn), turn=turn)
        if case == "rewrite":
            turn.text = given
        elif case not in ("next", "leave"):
            return await self._decided(turn, case, given)
        reply: Reply | None = await call_next()
        if reply is None or case == "leave":
            return reply
        if reply.streamed:
            if self._has_chunks:
                reply.chunks = self._pieces(turn, reply.chunks)
                return reply
            await reply.read()
        case, given = await self._guest.call(
            "middleware.after", turn_record(turn), (reply.text, _extra({"metadata": reply.metadata})), turn=turn
        )
        if case in ("next", "leave"):
            return reply
        if case == "rewrite":
            reply.text = given
            return reply
        return await self._decided(turn, case, given)

    async def only_chunks(self, turn: Any, call_next: Any) -> Any:
        reply: Reply | None = await call_next()
        if reply is not None and reply.streamed:
            reply.chunks = self._pieces(turn, reply.chunks)
        return reply

    async def _pieces(self, turn: Any, chunks: Any) -> AsyncIterator[str]:
        record = turn_record(turn)
        held = ""
        async for chunk in chunks:
            text, held = await self._guest.call("chunks.transform", record, held + chunk, False, turn=turn)
            if text:
                yield text
        text, _ = await self._guest.call("chunks.transform", record, held, True, turn=turn)
        if text:
            yield text

    async def respond(self, turn: Any) -> Any:
        if self._guest.code.emits:
            case, given = await self._respond_streaming(turn)
        else:
            case, given = await self._guest.call("bot.respond", turn_record(turn), turn=turn)
        if case in ("next", "leave"):
            return None
        if case == "rewrite":
            raise GuestFault("it decided 'rewrite', which is not for a bot")
        return await self._decided(turn, case, given)

    async def _respond_streaming(self, turn: Any) -> Any:
        """Call the bot beside the stream that it feeds.

        It is done as soon as it can be, however slowly the stream is read; else a slow reader would hold its instance,
        and its own `chunks`, which the stream passes, would wait for it for ever.
        """
        emitted = _Emitted(waits=not self._has_chunks)
        call = self._guest.call("bot.respond", turn_record(turn), turn=turn, emit=emitted.put)
        task = asyncio.get_running_loop().create_task(call)
        task.add_done_callback(emitted.wake)
        try:
            while True:
                done = task.done()
                if emitted.chunks:
                    for text in emitted.take():
                        handed = turn.stream(text)
                    await handed
                elif done:
                    return task.result()
                else:
                    await emitted.wait()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # it is known, or nobody's any more

    async def _decided(self, turn: Any, case: str, given: Any) -> Any:
        """What ends a turn."""
        if case == "answer":
            return _reply(turn, *given)
        if case == "hand-over":
            reason, text = given
            turn.conversation.hand_over(reason)
            return text or _silence(turn)
        if case == "drop":
            about = {"conversation": turn.message.conversation, "message": turn.id}
            self._ctx.log.info("turn_dropped", reason=given[:500], **about)
            return _silence(turn)
        if case == "model":
            options = _decoded(given or "{}", "the decision 'model'")
            unknown = options.keys() - MODEL_OPTIONS
            if unknown:
                raise GuestFault(f"its decision 'model' has '{min(unknown)}'; there are {', '.join(MODEL_OPTIONS)}")
            return await self._ctx.llm.reply(turn, **options)
        raise GuestFault(f"it decided '{case}' ({str(given)[:100]}), which this host does not know")

    # -- beside turns ----------------------------------------------------------------------------------------

    async def probe(self) -> None:
        await self._guest.call("lifecycle.probe")

    async def export_state(self) -> Any:
        state = await self._guest.call("lifecycle.export-state")
        return None if state is None else _json(state, "what export-state gave")

    async def import_state(self, state: Any, version: str) -> None:
        if state is not None:
            await self._guest.import_state(_encode(state).decode(), version)

    async def tools(self) -> list[Tool]:
        return [
            Tool(name, description, self._tool(name), _decoded(parameters, f"the parameters of tool '{name}'"))
            for name, description, parameters, _ in await self._guest.call("tools.list-tools")
        ]

    def _tool(self, name: str) -> Callable[..., Any]:
        async def call(**arguments: Any) -> Any:
            return _json(
                await self._guest.call("tools.call-tool", name, _encode(arguments).decode()), f"what tool '{name}' gave"
            )

        return call

    async def intake(self, request: Request) -> Intake:
        body, extra = as_text(request.body)
        messages, answer = await self._guest.call(
            "intake.receive",
            (request.method, request.path, request.query_string, _encode(dict(request.headers)).decode(), body, extra),
        )
        return Intake([_inbound(*one) for one in messages], _answer(*answer))

    async def deliver(self, conversation: Any, reply: Any) -> None:
        about = {name: getattr(reply, name) for name in ("id", "seq", "to", "plugin", "generation", "metadata", "at")}
        await self._guest.call("delivery.deliver", conversation.id, (reply.text, _extra(about)))

    def event(self, name: str) -> Callable[..., Any]:
        async def tell(what: Any) -> None:
            await self._guest.call("events.on-event", name, _described(what))

        return tell


MAX_AHEAD = 256 * 1024
"""Characters that a bot may be ahead of who reads its stream; then it waits."""


MAX_HELD = 1024 * 1024
"""The same for a bot whose own `chunks` the stream passes: it can't wait, for they wait for its instance."""


class _Emitted:
    """The chunks of a bot that nobody has taken yet."""

    def __init__(self, *, waits: bool) -> None:
        self._waits = waits
        self.chunks: list[str] = []
        self._size = 0
        self._come = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, text: str) -> None:
        if not self._waits and self._size + len(text) > MAX_HELD:
            raise OverflowError(f"over {MAX_HELD} characters are waiting to be read")
        self.chunks.append(text)
        self._size += len(text)
        self._come.set()
        while self._waits and self._size > MAX_AHEAD:
            self._room.clear()
            await self._room.wait()

    def take(self) -> list[str]:
        chunks, self.chunks, self._size = self.chunks, [], 0
        self._room.set()
        return chunks

    async def wait(self) -> None:
        """Until there are chunks, or `wake` was called."""
        await self._come.wait()
        self._come.clear()

    def wake(self, task: object = None) -> None:
        self._come.set()


NOT_FOR_GUESTS = frozenset(["content-encoding", "date", "server", "set-cookie"])
"""Headers by which an answer could speak for the whole origin, beside those that no plugin sets."""

MAX_TAGS, MAX_TAG_CHARS = 32, 128

MODEL_OPTIONS = ("system", "model", "temperature", "max_tokens", "history_tokens", "summarise", "tools")


def turn_record(turn: Any) -> tuple[str, str, str, str]:
    """A turn as the contract has it."""
    message, conversation = turn.message, turn.conversation
    about = {
        "sender": message.sender,
        "channel": conversation.channel,
        "locale": conversation.locale,
        "assignee": conversation.assignee,
        "tags": conversation.tags,
        "attachments": message.attachments,
        "metadata": message.metadata,
        "seq": message.seq,
        "at": message.at,
        "attempt": turn.attempt,
    }
    return turn.id, message.conversation, turn.text, _encode(about).decode()


def _silence(turn: Any) -> Reply:
    """An answer that ends the turn and is not shown."""
    turn.silenced = True
    return Reply("")


def _described(what: Any) -> str:
    if isinstance(what, msgspec.Struct):
        return _encode(what).decode()
    names = ("id", "channel", "locale", "assignee", "tags", "state")
    return _encode({name: getattr(what, name, None) for name in names}).decode()


def _extra(about: dict[str, Any]) -> str:
    return _encode(about).decode()


def _json(text: str, what: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise GuestFault(f"{what} is not JSON: {exc}") from None


def _decoded(text: str, what: str) -> dict[str, Any]:
    try:
        found = decoded(text or "{}")
    except (ValueError, RecursionError) as exc:
        raise GuestFault(f"{what} is not JSON: {exc}") from None
    if not isinstance(found, dict):
        raise GuestFault(f"{what} is no JSON object")
    return found


def _converted(value: Any, kind: Any, what: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise GuestFault(f"{what}: {exc}") from None


class _ReplyExtra(msgspec.Struct):
    metadata: dict[str, Any] = {}
    tags: tuple[str, ...] = ()
    locale: str | None = None
    close: bool = False


class _InboundExtra(msgspec.Struct):
    sender: Sender = Sender()
    attachments: tuple[Attachment, ...] = ()
    metadata: dict[str, Any] = {}
    locale: str | None = None


def _reply(turn: Any, text: str, extra: str) -> Reply:
    if not extra or extra == "{}":
        return Reply(text)
    about = _converted(_decoded(extra, "a reply's extra"), _ReplyExtra, "a reply's extra")
    conversation = turn.conversation
    if about.tags:
        if len(about.tags) > MAX_TAGS or any(len(tag) > MAX_TAG_CHARS for tag in about.tags):
            raise GuestFault(f"a reply adds at most {MAX_TAGS} tags of {MAX_TAG_CHARS} characters")
        known = dict.fromkeys(conversation.tags)
        conversation.tags += [tag for tag in dict.fromkeys(about.tags) if tag not in known]
    if about.locale is not None:
        conversation.locale = about.locale
    if about.close:
        conversation.close()
    return Reply(text, about.metadata)


def _inbound(conversation: str, text: str, id: str, extra: str) -> InboundMessage:
    about = _converted(_decoded(extra, "a message's extra"), _InboundExtra, "a message's extra")
    return InboundMessage(conversation, text, id or None, about.sender, about.attachments, about.metadata, about.locale)


def _answer(status: int, headers: str, body: str, extra: str) -> Answer:
    data: str | bytes = body
    named = _converted(_decoded(headers, "an answer's headers"), dict[str, str], "its headers")
    for name in named:
        if name.lower() in NOT_FOR_GUESTS:
            raise GuestFault(f"an answer's header {name!r} is the host's to set")
    if _decoded(extra, "an answer's extra").get("base64"):
        try:
            data = base64.b64decode(body, validate=True)
        except binascii.Error as exc:
            raise GuestFault(f"an answer's body is not base64: {exc}") from None
    try:
        return check_answer(Answer(status, data, named))
    except ValueError as exc:
        raise GuestFault(str(exc)) from None
