"""What the wasmtime package does not do safely is not used: each fence has a test that would fail without it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import wasmtime
from tests.wasm.alone import TURN, Alone, alone, code_of
from tests.wasm.components import FOREIGN, LOOP, NEXT, TRAP, component

from hotdesk.runtime.wasm import Code, Instance, Machine
from hotdesk.runtime.wasm_calls import GuestCall, GuestFault, GuestTimeout
from hotdesk.runtime.wasm_imports import IMPORTED

ASKS = component({"respond": f"(drop (call $base.time-left)) {NEXT}"}, imports={"base": ("time-left",)})
"""Calls a function of the host, and goes on."""

FINE = (True, ("next", None))


@pytest.fixture
def machine_with() -> Iterator[Callable[..., Machine]]:
    """Machines some of whose host functions are others."""
    made: list[Machine] = []

    def make(**functions: Callable[..., Any]) -> Machine:
        others = {name.replace("__", ".").replace("_", "-"): one for name, one in functions.items()}
        made.append(Machine({**IMPORTED, **others}, memory_bytes=1 << 26, output_bytes=1 << 22))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


class Unthinkable(BaseException):
    """What nobody catches by accident."""


@pytest.mark.parametrize(
    "exc",
    [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit, Unthinkable, RecursionError, MemoryError],
)
async def test_nothing_that_a_host_function_raises_ends_the_process(
    machine_with: Callable[..., Machine], exc: type[BaseException]
) -> None:
    """Fence 1: a `BaseException` in a host function, which the package lets abort the process, is a trap."""

    def fails(instance: Instance) -> int:
        raise exc("from a host function")

    async with alone(machine_with(base__time_left=fails), ASKS) as guest:
        await guest.call("")
        ended = (await guest.call("bot.respond", TURN)).value
    assert isinstance(ended, GuestFault)
    assert f"host function failed: {exc.__name__}" in str(ended)


async def test_an_exception_stays_with_the_call_that_it_belongs_to(machine_with: Callable[..., Machine]) -> None:
    """Fence 2: while host functions fail for one guest by the hundred, no call of another guest sees it."""
    failing: set[Any] = set()

    def fails(instance: Instance) -> int:
        if instance in failing:
            raise ValueError("for the bad one alone")
        return 7

    machine = machine_with(base__time_left=fails)
    machine_code = code_of(machine, ASKS)
    bad = good = 0
    async with alone(machine, machine_code) as steady:
        await steady.call("")

        async def fail() -> None:
            nonlocal bad
            for _ in range(150):
                async with alone(machine, machine_code) as guest:
                    failing.add(guest.instance)
                    await guest.call("")
                    assert "for the bad one alone" in str((await guest.call("bot.respond", TURN)).value)
                    bad += 1

        failures = asyncio.create_task(fail())
        while not failures.done():
            assert (await steady.call("bot.respond", TURN)).value == FINE
            good += 1
        await failures
    assert bad == 150
    assert good > 20


async def test_a_timeout_is_told_by_our_own_clock(machine: Machine) -> None:
    """Fence 3: what the host did not stop is a fault, also when a name in the trap says otherwise."""
    lies = component({"respond": f"(call $lie) {NEXT}"}, more='(func $lie (@name "hotdesk: stopped") (unreachable))')
    async with alone(machine, lies) as guest:
        await guest.call("")
        ended = await guest.call("bot.respond", TURN, timeout_s=5.0)
    assert type(ended.value) is GuestFault
    assert "hotdesk: stopped" in str(ended.value), "the lie is in the text"
    async with alone(machine, component({"respond": LOOP})) as guest:
        await guest.call("")
        ended = await guest.call("bot.respond", TURN, timeout_s=0.2)
    assert type(ended.value) is GuestTimeout
    assert ended.overrun >= 0


async def test_a_host_function_can_not_be_made_to_look_like_a_timeout(machine_with: Callable[..., Machine]) -> None:
    """Fence 3, the other way: a host function's error that has our own word in it is a fault and no timeout."""

    def fails(instance: Instance) -> int:
        raise ValueError("hotdesk: stopped")

    async with alone(machine_with(base__time_left=fails), ASKS) as guest:
        await guest.call("")
        ended = await guest.call("bot.respond", TURN, timeout_s=5.0)
    assert type(ended.value) is GuestFault


@pytest.mark.parametrize("body", [TRAP, LOOP, "(i32.const -4)"], ids=["trap", "stopped", "a result out of bounds"])
async def test_an_instance_that_trapped_is_not_used_again(machine: Machine, body: str) -> None:
    """Fence 4: after a trap the instance is dead, its Store is closed, and its thread ends by itself."""
    code = code_of(machine, component({"respond": body}))
    guest = Alone(machine, code, None)
    await guest.call("")
    assert guest.instance in machine.instances
    await guest.call("bot.respond", TURN, timeout_s=0.1)
    async with asyncio.timeout(5):
        await guest.instance.ended
    assert guest.instance.dead
    assert guest.instance not in machine.instances
    guest.instance._thread.join(5)
    assert not guest.instance._thread.is_alive()


async def test_an_instance_that_failed_to_start_leaves_no_store(machine: Machine) -> None:
    """Fence 4 at the first step: a trap while it is made closes the Store."""
    before = len(machine.instances), len(machine._by_context), len(machine._by_number)
    for _ in range(20):
        async with alone(machine, component({"respond": NEXT}, more="(func $s (unreachable)) (start $s)")) as guest:
            assert isinstance((await guest.call("")).value, GuestFault)
    assert (len(machine.instances), len(machine._by_context), len(machine._by_number)) == before


async def test_a_store_is_touched_by_one_thread_alone(machine_with: Callable[..., Machine]) -> None:
    """Fence 5: a Store is made, called into, called from and closed on the thread of its instance, and no other."""
    seen: dict[Any, set[int]] = {}
    touched: list[tuple[str, int]] = []

    def notes(instance: Instance) -> int:
        seen.setdefault(instance, set()).add(threading.get_ident())
        return 1

    machine = machine_with(base__time_left=notes)
    code = code_of(machine, ASKS)

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in (wasmtime.Store.__init__.__code__, wasmtime.Store._delete.__code__):
            touched.append((frame.f_code.co_name, threading.get_ident()))

    threading.setprofile(watch)  # of the threads that begin from now on
    sys.setprofile(watch)
    try:
        guests = [Alone(machine, code, None) for _ in range(4)]
        await asyncio.gather(*(guest.call("") for guest in guests))
        for _ in range(5):
            await asyncio.gather(*(guest.call("bot.respond", TURN) for guest in guests))
        threads = {guest.instance: guest.instance._thread.ident for guest in guests}
        for guest in guests:
            await guest.end()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert seen == {instance: {ident} for instance, ident in threads.items()}
    idents = sorted(threads.values())  # type: ignore[type-var]
    assert sorted(ident for what, ident in touched if what == "__init__") == idents
    assert sorted(ident for what, ident in touched if what == "_delete") == idents


async def test_a_guest_that_never_ends_is_over_within_its_time(machine: Machine) -> None:
    """An endless loop with 200 ms is over within 40 ms more, as its own thread sees it."""
    for body in (LOOP, "(loop $l (call $f) (br $l)) (unreachable)", FILLS):
        code = code_of(machine, component({"respond": body}, more="(func $f (drop (memory.grow (i32.const 0))))"))
        await is_over_in_time(machine, code)


async def is_over_in_time(machine: Machine, code: Code) -> None:
    """A call with 200 ms ends within 40 ms more; of four tries one, for other processes take their time too."""
    overruns: list[float] = []
    while not overruns or (overruns[-1] > 0.04 and len(overruns) < 4):
        async with alone(machine, code) as guest:
            await guest.call("")
            ended = await guest.call("bot.respond", TURN, timeout_s=0.2)
        assert type(ended.value) is GuestTimeout
        overruns.append(ended.overrun)
    assert overruns[-1] <= 0.04, overruns


FILLS = (
    "(drop (memory.grow (i32.const 1000)))"
    " (loop $l (memory.fill (i32.const 0) (i32.const 1) (i32.const 65000000)) (br $l)) (unreachable)"
)
"""One instruction that writes 65 MB, again and again: an epoch is looked at between two of them."""


@pytest.mark.parametrize(
    "where",
    [
        ('(func (export "freed") (param i32) (', '(func (export "freed") (param i32) (loop (br 0)) ('),
        ("(local.set $at (call $alloc (local.get 3)))", "(loop (br 0))"),
    ],
    ids=["after its result", "while its arguments are written"],
)
async def test_the_code_around_a_call_is_stopped_too(machine: Machine, where: tuple[str, str]) -> None:
    """A guest's `post-return` and its `realloc` run within the call's time."""
    await is_over_in_time(machine, code_of(machine, component({"respond": NEXT}, heap=where)))


async def test_a_guest_whose_call_is_given_up_is_stopped_at_once(machine_with: Callable[..., Machine]) -> None:
    """A call that nobody waits for any more ends within 100 ms, however much time it had; of four tries one."""
    running = asyncio.Event()
    loop = asyncio.get_running_loop()

    def notes(instance: Instance) -> int:
        loop.call_soon_threadsafe(running.set)
        return 1

    body = f"(drop (call $base.time-left)) {LOOP}"
    machine = machine_with(base__time_left=notes)
    code = code_of(machine, component({"respond": body}, imports={"base": ("time-left",)}))
    took: list[float] = []
    while not took or (took[-1] > 0.1 and len(took) < 4):
        running.clear()
        guest = Alone(machine, code, None)
        await guest.call("")
        call = GuestCall(loop, "bot.respond", (TURN,), time.monotonic() + 60, None)
        guest.instance.submit(call)
        waiting = asyncio.create_task(call.take())
        await running.wait()
        call.cancelled = True
        given_up = time.monotonic()
        assert isinstance((await waiting)[1], GuestTimeout)
        took.append(time.monotonic() - given_up)
        await guest.instance.ended
    assert took[-1] <= 0.1, took


async def test_a_guest_that_asks_when_nobody_listens_ends_quietly(machine: Machine) -> None:
    """A call given up while the guest asks for something, which nobody took, ends like any other."""
    asks = component(
        {"respond": f"(call $kv.delete (i32.const 16) (i32.const 1) (i32.const 8192)) {LOOP}"},
        imports={"kv": ("delete",)},
        data="k",
    )
    guest = Alone(machine, code_of(machine, asks), None)
    await guest.call("")
    call = GuestCall(asyncio.get_running_loop(), "bot.respond", (TURN,), time.monotonic() + 0.05, None)
    guest.instance.submit(call)
    async with asyncio.timeout(5):
        await guest.instance.ended  # its time was over before the loop looked
    assert isinstance((await call.take())[1], GuestTimeout)


async def test_the_loop_is_not_held_while_two_guests_compute(machine: Machine) -> None:
    """Two guests compute on both cores, and the loop comes round all the same."""
    guests = [Alone(machine, code_of(machine, component({"respond": LOOP})), None) for _ in range(2)]
    await asyncio.gather(*(guest.call("") for guest in guests))
    calls = [asyncio.create_task(guest.call("bot.respond", TURN, timeout_s=0.5)) for guest in guests]
    lags = []
    while not all(call.done() for call in calls):
        before = time.monotonic()
        await asyncio.sleep(0.001)
        lags.append(time.monotonic() - before - 0.001)
    for guest in guests:
        await guest.end()
    assert len(lags) > 20
    lags.sort()
    assert lags[int(len(lags) * 0.99) - 1] < 0.05


async def test_a_package_that_the_host_does_not_offer_traps_when_it_is_used(machine: Machine) -> None:
    """No WASI: a component that imports it loads, and each of its functions is a trap that says its name."""
    async with alone(machine, component({"respond": NEXT}, foreign=True)) as guest:
        await guest.call("")
        assert (await guest.call("bot.respond", TURN)).value == FINE
    async with alone(machine, component({"respond": f"(call $foreign) {NEXT}"}, foreign=True)) as guest:
        await guest.call("")
        ended = (await guest.call("bot.respond", TURN)).value
    assert isinstance(ended, GuestFault)
    assert f"{FOREIGN}#exit" in str(ended)


async def test_a_component_that_needs_wasi_to_begin_says_which(machine: Machine) -> None:
    """What is called while the component is made is named as well."""
    data = component({"respond": NEXT}, foreign=True, more="(func $begin (call $foreign)) (start $begin)")
    async with alone(machine, data) as guest:
        assert f"{FOREIGN}#exit" in str((await guest.call("")).value)


async def test_components_with_and_without_wasi_serve_side_by_side(machine: Machine) -> None:
    """The linker of one that imports more is its own: the host's functions work for both."""
    imports = {"base": ("time-left",)}
    body = f"(drop (call $base.time-left)) {NEXT}"
    for _ in range(3):
        async with (
            alone(machine, component({"respond": body}, imports=imports, foreign=True)) as one,
            alone(machine, component({"respond": body}, imports=imports)) as other,
        ):
            for guest in (one, other):
                await guest.call("")
                assert (await guest.call("bot.respond", TURN)).value == FINE


async def test_a_guest_that_asks_for_ever_rests(machine_with: Callable[..., Machine]) -> None:
    """After its first few hundred calls of the host it rests before each: the interpreter is the loop's meanwhile."""
    asked = 0

    def counts(instance: Instance) -> int:
        nonlocal asked
        asked += 1
        return 1

    guest = component(
        {"respond": "(loop $l (drop (call $base.time-left)) (br $l)) (unreachable)"}, imports={"base": ("time-left",)}
    )
    async with alone(machine_with(base__time_left=counts), guest) as flooding:
        await flooding.call("")
        ended = await flooding.call("bot.respond", TURN, timeout_s=0.3)
    assert type(ended.value) is GuestTimeout
    assert 250 < asked <= 250 + ended.seconds / 0.0002
