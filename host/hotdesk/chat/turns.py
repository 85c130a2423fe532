"""Turns: each conversation's messages one at a time, many conversations side by side.

A turn takes the current snapshot, runs its onion, and ends in one commit with its reply; then whoever listens hears
of it. A turn whose end is not on disk is run again at the next start.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from hotdesk_sdk import Message, Reply

from ..backend import SUSPECT_TRIES, Backend, ConversationRecord, StoredReply, TurnEnd
from ..errors import BackendUnavailable, StaleOwner, TurnAborted, describe
from ..logs import Logger
from ..metrics import Metrics
from ..runtime.active import Active, Snapshot
from ..runtime.call import Calls
from ..runtime.guards import host_task
from .background import Background
from .outbox import Event, Outbox
from .recent import Recent
from .streaming import Outcome, Streams, close_all, settle
from .turn import LOST, Ended, TurnRun, as_text

__all__ = ["Turns", "new_id"]

MAX_RERUNS = 3
"""How often a turn is run again because what it ran on was rolled back."""

CANCEL_S = 1.0
"""How long a turn that is cancelled at the stop may take to end."""

CANCELLED = ("cancelled", "this was cancelled; what was said so far, if anything, is the reply")
DEAD_LETTER = ("dead_letter", "this message could not be answered; it is kept for the operator")
PRESS_S = 0.5
"""A cancelled turn has this long to unwind before it is cancelled again, and then once more to be left behind."""

NO_ANSWER: Outcome = (None, {}, None)
RETRY_S = (0.05, 0.2, 0.5, 1.0)
"""The waits between tries to put a turn's end on disk; the last is repeated."""


_PROCESS = f"{time.time_ns() // 1_000_000:011x}{random.SystemRandom().getrandbits(62):016x}"
_COUNT = itertools.count()


def new_id(prefix: str) -> str:
    """Unique without asking anybody, and sorted by age: when this process began, 62 random bits, a count."""
    return f"{prefix}{_PROCESS}{next(_COUNT):08x}"


_OUTCOME_OF = {"turn_refused": "refused", "stream_cut": "cut", "cancelled": "cancelled"}
OUTCOMES = ("replied", "silent", "refused", "cut", "cancelled", "failed")


class _Lane:
    __slots__ = ("record", "running", "waiting")

    def __init__(self, record: ConversationRecord, running: TurnRun) -> None:
        self.record = record
        self.running = running
        self.waiting: deque[TurnRun] = deque()


class Turns:
    """The turns of this host."""

    def __init__(
        self,
        *,
        active: Active,
        calls: Calls,
        backend: Backend,
        recent: Recent,
        outbox: Outbox,
        background: Background,
        metrics: Metrics,
        log: Logger,
        max_reply_chars: int,
        max_tries: int,
        log_turns: bool,
        log_text: bool,
    ) -> None:
        self._active = active
        self._calls = calls
        self._backend = backend
        self._recent = recent
        self._outbox = outbox
        self.background = background
        self._metrics = metrics
        self._log = log
        self._max_reply_chars = max_reply_chars
        self._max_tries = max_tries
        self._suspects = asyncio.Lock()
        self._streams = Streams(outbox, log, max_reply_chars, backend)
        self._log_turns = log_turns
        self._log_text = log_text
        self._lanes: dict[str, _Lane] = {}
        self._live: dict[tuple[str, str], TurnRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self._stop_by = math.inf
        self._outcomes = {name: metrics.turns.labels(name) for name in OUTCOMES}
        outbox.on_change = self.make_room
        self.on_stale: Callable[[TurnRun], None] = lambda turn: None
        """Told of a turn that turns out to be another worker's."""

    @property
    def live(self) -> int:
        """Turns that were accepted and have not ended."""
        return len(self._live)

    def runs_in(self, conversation: str) -> bool:
        """Whether a turn of *conversation* has not ended."""
        return conversation in self._lanes

    def find(self, conversation: str, message_id: str) -> TurnRun | None:
        """A turn that has not ended."""
        return self._live.get((conversation, message_id))

    def begin(self, message: Message, record: ConversationRecord, *, attempt: int = 1, fence: Any = None) -> TurnRun:
        """Run *message*'s turn once those before it in its conversation have ended."""
        turn = TurnRun(message, record, self._recent, attempt, time.monotonic())
        turn.fence = fence
        turn.tries = attempt if attempt > 1 else 0
        self._live[(message.conversation, message.id)] = turn
        self._idle.clear()
        lane = self._lanes.get(message.conversation)
        if lane is None:
            self._lanes[message.conversation] = _Lane(record, turn)
            self._start(turn)
        else:
            lane.waiting.append(turn)
        return turn

    def drop(self, belongs: Callable[[str], bool]) -> list[TurnRun]:
        """Give up the turns of the conversations that *belongs* is true of, without an end: another worker runs them.

        Returns them, in order.
        """
        found = [conversation for conversation in self._lanes if belongs(conversation)]
        return [turn for conversation in found for turn in self._drop_lane(self._lanes.pop(conversation))]

    def drop_one(self, conversation: str, message_id: str) -> TurnRun | None:
        """Give up one turn: another worker has ended it. None when there is no such turn."""
        turn = self._live.get((conversation, message_id))
        if turn is None:
            return None
        lane = self._lanes[conversation]
        if turn is lane.running:
            self._drop_turn(turn)
            self._next(turn.message, lane, False)
        else:
            lane.waiting.remove(turn)
            turn.dropped = True
            self._next(turn.message, lane, True)
        return turn

    def _drop_lane(self, lane: _Lane) -> list[TurnRun]:
        self._drop_turn(lane.running)
        turns = [lane.running, *lane.waiting]
        for turn in turns:
            turn.dropped = True
            self._live.pop((turn.message.conversation, turn.id), None)
        if not self._live:
            self._idle.set()
        return turns

    def _drop_turn(self, turn: TurnRun) -> None:
        """Have what runs of it stop; what it comes to is nobody's."""
        turn.dropped = turn.abandoned = turn.clock.cancelled = True
        if turn.room is not None and not turn.room.done():
            turn.room.set_result(None)
        self._press(turn, 0)

    def cancel(self, conversation: str, message_id: str) -> bool:
        """Give a turn up, wherever it stands: what was said so far is its reply, marked cut. Twice is once.

        False when there is nothing to give up: no such turn, or its answer is complete and on its way to the disk.
        """
        turn = self._live.get((conversation, message_id))
        if turn is None or turn.ending:
            return False
        if turn.clock.cancelled:
            return True
        turn.clock.cancelled = True
        if turn.task is not None:
            self._press(turn, 0)
        elif turn in (waiting := self._lanes[conversation].waiting):
            waiting.remove(turn)
            self._spawn(self._end(turn, None, {}, CANCELLED, queued=True))
        return True  # else it is about to take its first step, and looks

    def leave(self, conversation: str, message_id: str | None = None) -> None:
        """Somebody who listened has gone: cancel the turn, or all of the conversation, that nobody waits for now."""
        if self._stop_by < math.inf or self._outbox.listened(conversation):
            return  # a stop is no leave: what it does not finish runs at the next start
        lane = self._lanes.get(conversation)
        for turn in (lane.running, *lane.waiting) if lane is not None else ():
            asked = message_id == turn.id or (message_id is None and not turn.remote)
            if asked and not turn.watchers and not turn.waiting:
                self.cancel(conversation, turn.id)

    def make_room(self, conversation: str) -> None:
        """Who listens in *conversation* can take more, came, or left: a stream that stood still goes on."""
        lane = self._lanes.get(conversation)
        if lane is not None:
            turn = lane.running
            turn.roomy = True  # also for one that was told just now that nobody can take more, and is yet to wait
            if (room := turn.room) is not None and not room.done():
                room.set_result(None)

    def _press(self, turn: TurnRun, times: int) -> None:
        """Cancel what *turn* waits for; a plugin that goes on all the same is left behind."""
        task, inner = turn.task, turn.clock.task
        if task is None or task.done() or (turn.ending and not turn.abandoned):
            return
        task.cancel()
        if inner is not None and inner is not task:  # a middleware awaits what is further in from a task of its own
            inner.cancel()
        if times == 2 and turn.clock.abandon is not None:
            turn.clock.abandon = None
            self._abandon(turn)
        if not self._stopping:
            self._loop.call_later(PRESS_S, self._press, turn, times + 1)

    def _spawn(self, coro: Coroutine[Any, Any, None]) -> None:
        task = host_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, turn: TurnRun) -> None:
        # a task of the host's, on no plugin's account; the loop is at hand, for asking costs a system call before 3.12
        task = asyncio.Task(self._run(turn), loop=self._loop, context=contextvars.Context())
        turn.clock.task = task
        turn.clock.about = {"conversation": turn.message.conversation, "message": turn.id}
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, turn: TurnRun) -> None:
        clock = turn.clock
        clock.abandon = lambda: self._abandon(turn)
        self._calls.start(clock)
        turn.task = clock.task
        try:
            if clock.cancelled:
                text, metadata, error = NO_ANSWER
            elif turn.tries > SUSPECT_TRIES:
                text, metadata, error = await self._answer_suspect(turn)
            else:
                text, metadata, error = await self._answer(turn)
        except (asyncio.CancelledError, GeneratorExit) as exc:
            if turn.abandoned:
                return
            if self._stopping and not clock.cancelled:
                raise  # the turn stays open in the journal
            text, metadata, error = self._failed(turn, problem=repr(exc))
        except Exception as exc:  # the turn loop: a fault of ours ends one turn, not the conversation
            text, metadata, error = self._failed(turn, exc_info=exc)
        finally:
            self._calls.stop(clock)
        if turn.abandoned:
            return
        if clock.cancelled:
            text, metadata, error = self._cut_short(turn)
            await settle()
        await self._end(turn, text, metadata, error)

    async def _answer_suspect(self, turn: TurnRun) -> Outcome:
        """Answer a message that may have ended its workers: no other such at the same time; not for ever."""
        message = turn.message
        if turn.tries > self._max_tries:
            self._metrics.dead_letters.inc()
            self._log.error(
                "dead_letter", conversation=message.conversation, message=turn.id, seq=message.seq, tries=turn.tries - 1
            )
            return None, {}, DEAD_LETTER
        async with self._suspects:
            while True:
                try:
                    await self._backend.count_try(message.conversation, message.seq, turn.fence)
                    break
                except BackendUnavailable:
                    await asyncio.sleep(RETRY_S[-1])
            return await self._answer(turn)

    def _failed(self, turn: TurnRun, **why: Any) -> Outcome:
        if not turn.clock.cancelled:
            self._log.error("turn_failed", conversation=turn.message.conversation, message=turn.id, **why)
        return None, {}, ("internal_error", "this turn failed inside hotdesk")

    @staticmethod
    def _cut_short(turn: TurnRun) -> Outcome:
        """The end of a cancelled turn."""
        if not turn.said or turn.streamed is None:
            return None, {}, CANCELLED
        own = turn.streamed.metadata if isinstance(turn.streamed.metadata, dict) else {}
        return "".join(turn.said), {**own, "cut": True, "cancelled": True}, CANCELLED

    async def _answer(self, turn: TurnRun) -> Outcome:
        """Run the onion, again if it was rolled back meanwhile."""
        reruns = 0
        while True:
            snapshot = turn.snapshot = self._active.acquire()
            try:
                try:
                    outcome = await self._run_onion(turn, snapshot)
                finally:
                    if turn.opened is not None:
                        await close_all(turn)
            finally:
                self._active.release(snapshot)
                del turn.snapshot
            if turn.rerun is None or turn.shown or turn.clock.cancelled or reruns == MAX_RERUNS:
                return outcome
            # shielded: the rollback is for all turns, and goes on when this one is given up
            if turn.rerun is not True and not await asyncio.shield(turn.rerun):
                return outcome
            reruns += 1
            self._metrics.reruns.inc()
            turn.begin_again()

    async def _run_onion(self, turn: TurnRun, snapshot: Snapshot) -> Outcome:
        try:
            reply: Reply | None = await snapshot.run(turn)
        except TurnAborted:
            reply = None
        if turn.rerun is not None or turn.clock.cancelled:
            return None, {}, None
        if turn.refused is not None:
            return None, {}, ("turn_refused", turn.refused.public)
        if reply is None:
            return None, {}, turn.unanswered
        if reply.chunks is not None:
            return await self._streams.run(turn, reply)
        if turn.silenced and not reply.text:
            return None, {}, None
        if len(reply.text) > self._max_reply_chars:
            self._log.error("reply_too_long", conversation=turn.message.conversation, message=turn.id)
            return None, {}, ("turn_refused", f"the reply is over {self._max_reply_chars} characters")
        return reply.text, reply.metadata, None

    async def _end(
        self,
        turn: TurnRun,
        text: str | None,
        metadata: dict[str, Any],
        error: tuple[str, str] | None,
        *,
        queued: bool = False,
    ) -> None:
        """Put the end on disk and tell it; then the next turn in line runs, unless this one was only *queued*."""
        if turn.dropped:
            return
        turn.ending = True
        message = turn.message
        lane = self._lanes[message.conversation]
        end, error = self._turn_end(turn, text, metadata, error)
        waits = iter(RETRY_S)
        while True:
            try:
                stored = await self._backend.finish(end)
                break
            except StaleOwner:  # who owns it answers it
                if not turn.dropped:  # it began when the others of its partition were dropped already
                    self.on_stale(turn)
                return
            except BackendUnavailable as exc:
                self._log.error(
                    "turn_end_not_kept", conversation=message.conversation, message=turn.id, problem=str(exc)
                )
                if self._stopping or turn.dropped:
                    return
                await asyncio.sleep(next(waits, RETRY_S[-1]))
            except Exception as exc:  # a fault of ours: the turn ends without what could not be kept
                self._log.error("turn_end_failed", conversation=message.conversation, message=turn.id, exc_info=exc)
                error = ("internal_error", "the reply can't be kept")
                end = TurnEnd(message.conversation, message.seq, to=turn.id, error=error, fence=turn.fence)
                await asyncio.sleep(next(waits, RETRY_S[-1]))
        if turn.dropped:
            return
        if stored is None and end.replies:
            self._log.error("message_lost", conversation=message.conversation, message=message.id)
            end, error = TurnEnd(message.conversation, message.seq, to=turn.id, error=LOST, fence=turn.fence), LOST
        if end.changed is not None:
            lane.record = (
                end.changed
                if not end.closed
                else ConversationRecord(end.changed.id, end.changed.channel, end.changed.locale)
            )
        self._told(turn, stored or (), end, error)
        self._next(message, lane, queued)

    def _turn_end(
        self, turn: TurnRun, text: str | None, metadata: dict[str, Any], error: tuple[str, str] | None
    ) -> tuple[TurnEnd, tuple[str, str] | None]:
        message, by = turn.message, turn.answered_by
        replies: tuple[StoredReply, ...] = ()
        if text is not None and by is not None:
            generation = by.generation
            replies = (
                StoredReply(
                    new_id("r"), message.conversation, 0, message.id, text, generation.plugin, generation.number,
                    metadata, time.time(),
                ),
            )  # fmt: skip
        deliver = bool(replies) and self.background.delivers(turn.record.channel)
        view = turn.touched
        try:
            changed = None if view is None else view.changed()
            if text is not None:
                as_text(text, "a reply")
            if not isinstance(metadata, dict):
                raise TypeError(f"a reply's metadata is a dict, not {type(metadata).__name__}")
            if metadata:
                msgspec.json.encode(metadata)
        except Exception as exc:  # what a plugin left may raise anything when it is looked at
            self._log.error("turn_not_json", conversation=message.conversation, message=turn.id, problem=describe(exc))
            refused = ("turn_refused", "a plugin left something that is not JSON; the log says what")
            return TurnEnd(message.conversation, message.seq, to=turn.id, error=refused, fence=turn.fence), refused
        closed = view is not None and changed is not None and view.closed
        tries = turn.tries - 1 if error is DEAD_LETTER else 0
        return TurnEnd(
            message.conversation, message.seq, replies, changed, closed, deliver, turn.id, error, turn.fence, tries
        ), error

    def _told(
        self, turn: TurnRun, stored: tuple[StoredReply, ...], end: TurnEnd, error: tuple[str, str] | None
    ) -> None:
        """Everyone who listens hears of the end, which is on disk now."""
        self._metrics.turn_stats.observe(time.monotonic() - turn.started)
        outcome = "silent" if error is None else _OUTCOME_OF.get(error[0], "failed")
        self._outcomes["replied" if stored and error is None else outcome].inc()
        heard = turn.watchers or self._outbox.listened(turn.message.conversation)
        for reply in stored:
            if heard:
                self._streams.tell(turn, Event.of(reply))
            self._recent.note(reply)
            self.background.observe("on_reply", reply)
            if end.deliver:
                self.background.deliver(reply, turn.record)
        if error is not None:
            self._streams.tell(turn, Event.error(turn.id, *error))
        if end.changed is not None:
            if end.closed:
                self.background.observe_conversation("on_conversation_closed", end.changed)
            view = turn.touched
            if end.changed.assignee != turn.record.assignee or (view is not None and view.handed_over):
                self.background.observe_conversation("on_assigned", end.changed)
        if (by := turn.answered_by) is not None and stored and by.generation.first_answer is not None:
            by.generation.first_answer()
        if self._log_turns:
            self._log_turn(turn, "replied" if stored and error is None else outcome)
        turn.end(Ended(stored, error))

    def _log_turn(self, turn: TurnRun, outcome: str) -> None:
        by = turn.answered_by
        self._log.debug(
            "turn_ended",
            conversation=turn.message.conversation,
            message=turn.id,
            plugin=by.generation.plugin if by else None,
            generation=by.generation.number if by else None,
            outcome=outcome,
            **({"text": turn.message.text} if self._log_text else {}),
        )

    def _next(self, message: Message, lane: _Lane, queued: bool) -> None:
        del self._live[(message.conversation, message.id)]
        if not self._live:
            self._idle.set()
        if queued:
            return
        if not lane.waiting:
            del self._lanes[message.conversation]
        elif not self._stopping:
            turn = lane.running = lane.waiting.popleft()
            turn.record = lane.record
            self._start(turn)

    def _abandon(self, turn: TurnRun) -> None:
        """A call ignores its cancellation: the conversation goes on without it."""
        turn.abandoned = True
        self._log.error("turn_abandoned", conversation=turn.message.conversation, message=turn.id)
        if turn.clock.cancelled:
            self._spawn(self._end(turn, *self._cut_short(turn)))
            return
        turn.answered_by = None
        error = ("turn_refused", "a plugin did not stop when its time was over")
        self._spawn(self._end(turn, None, {}, error))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no turn is live; False when *timeout_s* went by first. `aclose` then waits no longer."""
        self._stop_by = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self, timeout_s: float) -> int:
        """Let what runs finish within *timeout_s*; what did not stays in the journal. Returns how many that are."""
        self._stopping = True
        timeout_s = max(0.0, min(timeout_s, self._stop_by - time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                while running := [task for task in self._tasks if not task.done()]:
                    await asyncio.wait(running)
        except TimeoutError:
            pass
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:  # a plugin may ignore that; its generation's release names it
            await asyncio.wait(self._tasks, timeout=CANCEL_S)
        left = len(self._live)
        for turn in self._live.values():
            for waiter in turn.waiters or ():
                waiter.cancel()
        return left
