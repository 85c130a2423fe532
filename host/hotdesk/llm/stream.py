"""An answer as it comes: pulled off the provider's socket a read at a time, under three clocks.

The clocks are for the first token, for the gap between tokens, and for all of it. Only what the model says moves
them: comments, empty events and usage do not. They stand still while nobody pulls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from hotdesk_sdk import LlmError, LlmRefused, LlmTimeout, LlmUnavailable, ToolCall, Usage

from .events import EventParser, ToolDelta, decode_chunk
from .model import Model
from .request import TRANSIENT, Asked, Failed, Plan, post
from .whole import MAX_ANSWER_BYTES, Resting, answer_of, read_rest, reason_of
from .wire import Response

__all__ = ["LlmStream", "Tell"]

END_S = 1.0
"""How long a connection may take to end its body after the last event; then it is closed and not used again."""

BROKE_OFF = "the language model broke off"

HUNG_UP = "it was hung up on"

MAX_TOOL_CALLS = 128

monotonic = time.monotonic
INFINITE = float("inf")

Tell = Callable[[list[str]], bool]
"""Takes the texts that came together; true when nobody can take more."""


class LlmStream:
    """One streamed completion: an async iterator of texts. Nothing is sent before the first is pulled.

    Raises `LlmError`. Before the first text it has tried again, and the other models; after it, it tries nothing.
    Whoever stops pulling calls `aclose`, which hangs up.
    """

    of_host = True
    """It has clocks and a fault wall of its own: nobody need put a call around each pull."""

    __slots__ = (
        "__weakref__",
        "_asked",
        "_by",
        "_clock",
        "_done",
        "_ended",
        "_failed",
        "_gap_s",
        "_left_at",
        "_loop",
        "_model",
        "_parser",
        "_places",
        "_plan",
        "_progress",
        "_ready",
        "_response",
        "_shown",
        "_tell",
        "_timer",
        "finish",
        "tool_calls",
        "usage",
    )

    def __init__(self, asked: Asked, models: Sequence[Model], clock: Resting | None = None) -> None:
        self._asked = asked
        self._plan = Plan(models)
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._model: Model | None = None
        """Whose place is held, while a request is under way."""
        self._response: Response | None = None
        self._parser: EventParser | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._by = INFINITE
        self._left_at = self._plan.started
        self._gap_s = 0.0
        self._progress = False
        self._shown = False
        self._ended = False
        self._failed: Failed | None = None
        self._ready: list[str] = []
        self._tell: Tell | None = None
        self._done: asyncio.Future[bool] | None = None
        self.finish = ""
        self.usage: Usage | None = None
        self.tool_calls: list[ToolCall] = []
        self._places: dict[int, int] = {}

    @property
    def model(self) -> str:
        """Who answers, or is asked just now: its name in the settings."""
        return self._plan.model.name

    def __aiter__(self) -> LlmStream:
        return self

    async def __anext__(self) -> str:
        if not self._ready:
            self._ready = await self.next_batch()
            if not self._ready:
                raise StopAsyncIteration
            self._ready.reverse()
        return self._ready.pop()

    async def next_batch(self) -> list[str]:
        """The texts that came since the last pull, one for each of the model's; empty at the end."""
        if self._ended:
            return []
        clock = self._clock
        if clock is not None:
            clock.rest()
        self._plan.total_by += monotonic() - self._left_at
        try:
            if not self._shown:
                return await self._first()
            if self._failed is not None:
                raise self._failed
            self._by = min(monotonic() + self._gap_s, self._plan.total_by)
            return await self._read()
        except BaseException as exc:
            raise self._put_down(exc) from None
        finally:
            self._by = INFINITE
            self._left_at = monotonic()
            if clock is not None:
                clock.go_on()

    async def push(self, tell: Tell) -> bool:
        """Give each batch to *tell* in the moment in which it comes; true at the end.

        False when *tell* returned true, which says that nobody can take more just now: push again later. From the
        first text on that costs no task and no future a batch; *tell* is called from the socket's own callback.
        """
        while True:
            response = self._response
            if self._shown and self._failed is None and not self._ready and not self._ended:
                assert response is not None
                if self._parser is not None and not response.waiting:
                    return await self._pushed(response, tell)
            batch = self._ready[::-1] if self._ready else await self.next_batch()
            self._ready = []
            if not batch:
                return True
            if tell(batch):
                return False

    async def _pushed(self, response: Response, tell: Tell) -> bool:
        clock = self._clock
        if clock is not None:
            clock.rest()
        self._plan.total_by += monotonic() - self._left_at
        self._by = min(monotonic() + self._gap_s, self._plan.total_by)
        self._see_to_timer()
        done: asyncio.Future[bool] = self._loop.create_future()
        self._tell, self._done = tell, done
        response.listen(self._arrived)
        try:
            return await done
        except BaseException as exc:
            raise self._put_down(exc) from None
        finally:
            response.listen(None)
            self._tell = self._done = None
            self._by = INFINITE
            self._left_at = monotonic()
            if clock is not None:
                clock.go_on()

    def _arrived(self, data: bytes) -> None:
        """The socket's callback while texts are pushed. Raises nothing: whoever pushes is told through its future."""
        response, parser, tell, done = self._response, self._parser, self._tell, self._done
        if response is None or parser is None or tell is None or done is None or done.done():
            return
        texts: list[str] = []
        failed: BaseException | None = None
        try:
            if not data:
                if response.error is not None and not self.finish:
                    raise self._broken(response.error)
                self._end_of_body()
            else:
                self._take_data(parser, data, texts)
        except Exception as exc:  # a fault of ours must reach who waits: nobody else would end the turn
            failed = exc
        try:
            full = tell(texts) if texts else False
        except BaseException as exc:
            failed, full = exc, False
        if failed is not None:
            done.set_exception(failed)
        elif self._ended:
            done.set_result(True)
        elif full:
            response.listen(None)
            response.pause()
            done.set_result(False)

    def _put_down(self, exc: BaseException) -> BaseException:
        """End it for *exc*, and say what to raise."""
        if isinstance(exc, Failed):
            self._end("cut")
            exc.error.shown = True
            exc.error.public = BROKE_OFF
            return exc.error
        if isinstance(exc, LlmError):  # its tries have been counted, one by one
            self._release()
            self._ended = True
        else:
            self._end("cancelled")
        return exc

    async def aclose(self) -> None:
        """Hang up, if it has not ended by itself."""
        self.close()

    def close(self) -> None:
        """See `aclose`; it never has to wait."""
        if not self._ended:
            self._end("cancelled")

    def __del__(self) -> None:
        if not self._ended and self._model is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_hang_up, self._model, self._response, self._timer)

    # -- tries -----------------------------------------------------------------------------------------------------

    async def _first(self) -> list[str]:
        """Connect, and read until there is something to show, in as many tries as the plan has."""
        plan = self._plan
        while True:
            try:
                if self._response is None:
                    await self._connect(plan.model)
                texts = await self._read()
                if self._failed is not None and not texts:
                    raise self._failed
            except Failed as failed:
                if self._ended:
                    raise failed.error from None
                self._hang_up("failed")
                self.finish, self.usage, self.tool_calls, self._failed = "", None, [], None
                self._places = {}
                await plan.after(failed)
                if self._ended:  # hung up on while it waited
                    raise failed.error from None
                continue
            if texts:
                self._shown = True
                plan.model.first_token.observe(monotonic() - plan.started)
            return texts

    async def _connect(self, model: Model) -> None:
        seconds = model.settings.first_token_s
        self._by = by = min(monotonic() + seconds, self._plan.total_by)
        self._progress, self._gap_s = False, model.settings.gap_s
        body = self._asked.body(model, stream=True)
        try:
            await model.enter(by, seconds)
        except LlmError as exc:
            raise Failed(exc, retry=False) from None
        if self._ended:
            model.leave()
            raise Failed(LlmUnavailable(model.name, HUNG_UP), retry=False)
        self._model = model
        response = await post(model, body, by, seconds)
        if self._ended:
            response.close()
            raise Failed(LlmUnavailable(model.name, HUNG_UP), retry=False)
        self._response = response
        kind = response.content_type
        if kind == "text/html":
            raise Failed(LlmUnavailable(model.name, "answered with a web page; look at base_url"), retry=False)
        self._parser = EventParser() if kind != "application/json" else None

    # -- reading ---------------------------------------------------------------------------------------------------

    async def _read(self) -> list[str]:
        """Read until there is text, or the end. Raises `Failed`."""
        response, parser = self._response, self._parser
        assert response is not None
        self._see_to_timer()
        texts: list[str] = []
        while True:
            try:
                data = await response.read()
                if parser is None:
                    self._take_whole(await read_rest(response, data), texts)
                    return texts
            except (LlmTimeout, *TRANSIENT) as exc:
                if not self.finish:
                    raise self._broken(exc) from None
                data = b""  # all was said; only the end of the body did not come
            assert parser is not None
            try:
                if not data:
                    self._end_of_body()
                    return texts
                self._take_data(parser, data, texts)
                if self._ended:
                    return texts
            except Failed as failed:
                if not texts:
                    raise
                self._failed = failed  # what came before it is shown first
            if texts:
                return texts

    def _broken(self, exc: BaseException) -> Failed:
        """What came instead of more."""
        if isinstance(exc, LlmTimeout):
            return Failed(exc, retry=False)
        return Failed(LlmUnavailable(self.model, self._plan.model.in_words(exc)), retry=True)

    def _take_data(self, parser: EventParser, data: bytes, texts: list[str]) -> None:
        """Read the events that *data* completes, at the most to the end of the answer. Raises `Failed`."""
        try:
            events = parser.feed(data)
        except ValueError as exc:
            raise Failed(LlmUnavailable(self.model, str(exc)), retry=False) from None
        for event in events:
            if event.startswith(b"[DONE]"):
                self._finish()
                return
            self._take(event, texts)

    def _take(self, event: bytes, texts: list[str]) -> None:
        """Read one event; its text goes to *texts*. Raises `Failed`."""
        try:
            chunk = decode_chunk(event)
        except (ValueError, RecursionError) as exc:
            raise Failed(LlmUnavailable(self.model, f"sent an event that can't be read: {exc}"), retry=True) from None
        choices = chunk.choices
        if choices:
            choice = choices[0]
            delta = choice.delta
            if choice.index:  # another answer to the same question; nobody is shown two
                delta = None
            elif choice.finish_reason:
                self.finish = choice.finish_reason
                self._gap_s = END_S  # usage and [DONE] may follow, and need not
                self._by = min(self._by, monotonic() + END_S)
                self._see_to_timer()
            if delta is not None:
                if delta.content:
                    texts.append(delta.content)
                if delta.refusal:
                    texts.append(delta.refusal)
                if delta.tool_calls:
                    self._take_calls(delta.tool_calls)
                if delta.content or delta.tool_calls or delta.refusal or delta.reasoning_content or delta.reasoning:
                    self._moved()
        if chunk.usage is not None:
            self.usage = chunk.usage.usage()
        if chunk.error:
            raise Failed(LlmUnavailable(self.model, reason_of(self._plan.model, chunk.error)), retry=True)

    def _moved(self) -> None:
        """The model said something: the clock of the gap begins anew."""
        by, total_by = monotonic() + self._gap_s, self._plan.total_by
        self._by = by if by < total_by else total_by
        if not self._progress:
            self._progress = True
            self._arm()  # a gap is shorter than the wait for the first token, for which the timer is set

    def _take_calls(self, deltas: list[ToolDelta]) -> None:
        calls, places = self.tool_calls, self._places
        for delta in deltas:
            index = len(calls) if delta.index is None else delta.index
            at = places.get(index)
            if at is None or (delta.id and calls[at].id and delta.id != calls[at].id):  # some use one index for all
                if len(calls) == MAX_TOOL_CALLS:
                    error = LlmUnavailable(self.model, f"asks for more than {MAX_TOOL_CALLS} tool calls")
                    raise Failed(error, retry=False)
                at = places[index] = len(calls)
                calls.append(ToolCall())
            call = calls[at]
            if delta.id:
                call.id = delta.id
            if delta.function is not None:
                call.name += delta.function.name or ""
                call.arguments += delta.function.arguments or ""
            if len(call.arguments) > MAX_ANSWER_BYTES:
                raise Failed(LlmUnavailable(self.model, "the arguments of a tool call have no end"), retry=False)

    def _take_whole(self, body: bytes, texts: list[str]) -> None:
        """An answer that came in one piece, of a server that does not stream."""
        text, self.finish, self.usage, self.tool_calls = answer_of(self._plan.model, body)
        if text:
            texts.append(text)
        self._finish()

    def _end_of_body(self) -> None:
        if not self.finish:
            raise Failed(LlmUnavailable(self.model, "the stream ended before the answer did"), retry=True)
        self._finish()

    def _finish(self) -> None:
        if self.finish == "content_filter":
            raise Failed(LlmRefused(self.model, "its content filter stopped the answer"), retry=False)
        response, self._response = self._response, None
        if response is not None and not response.ended:
            response.let_end(END_S)
        self._end("answered")

    # -- the end ---------------------------------------------------------------------------------------------------

    def _end(self, outcome: str) -> None:
        if not self._ended:
            self._hang_up(outcome)
            self._ended = True

    def _hang_up(self, outcome: str) -> None:
        model = self._model or self._plan.model
        self._release()
        model.count(outcome, self.usage)

    def _release(self) -> None:
        model, response, timer = self._model, self._response, self._timer
        self._model = self._response = self._timer = None
        _hang_up(model, response, timer)

    def _see_to_timer(self) -> None:
        """Have the timer fire no later than at `_by`."""
        timer = self._timer
        if timer is None or timer.when() - self._loop.time() > self._by - monotonic():
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._by - monotonic(), self._look)

    def _look(self) -> None:
        """The timer fired; most often the deadline has moved meanwhile."""
        self._timer = None
        response, settings, by = self._response, self._plan.model.settings, self._by
        if by == INFINITE or response is None:
            return  # nobody pulls; the next pull arms it
        if monotonic() < by:
            self._arm()
            return
        if by >= self._plan.total_by:
            phase, seconds = "total", settings.total_s
        elif self._progress:
            phase, seconds = "gap", settings.gap_s
        else:
            phase, seconds = "first token", settings.first_token_s
        response.fail(LlmTimeout(self.model, phase, seconds))


def _hang_up(model: Model | None, response: Response | None, timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
    if response is not None:
        response.close()
    if model is not None:
        model.leave()
