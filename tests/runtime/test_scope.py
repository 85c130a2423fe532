"""What a plugin got through `ctx` is undone when its generation ends; what it took behind the host's back is caught."""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from prometheus_client import REGISTRY

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.config import PluginSettings
from hotdesk.runtime.active import Generation
from hotdesk.runtime.python import PREFIX
from hotdesk_sdk import ScopeClosed

HEAD = "import asyncio, logging\nfrom hotdesk_sdk import hookimpl\n@hookimpl\nasync def respond(turn): return 'x'\n"

BOOK: list[Any] = []
"""Where the plugins of these tests write what they do: `import hotdesk_test_book` in their source."""


@pytest.fixture(autouse=True)
def book(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    import types

    module = types.ModuleType("hotdesk_test_book")
    module.__dict__.update(write=BOOK.append, kept={})
    monkeypatch.setitem(sys.modules, "hotdesk_test_book", module)
    yield BOOK
    BOOK.clear()
    module.__dict__["kept"].clear()


async def swap(desk: Desk, number: int, source: str = HEAD, name: str = "bot") -> None:
    """Save *source* as generation *number*, and wait until the one before is closed."""
    entry = desk.host.plugins.entry(name)
    old = entry.current
    desk.write(f"{name}.py", f"{source}\n# {number}\n")
    await desk.wait_generation(name, number)
    if old is not None:
        await wait_until(lambda: old.state.value == "CLOSED", "the old generation is closed")


async def leftovers(desk: Desk, name: str = "bot") -> list[str]:
    event = await desk.wait_event("plugin_leftover", plugin=name)
    assert (await desk.plugin(name))["leftovers"] == event["leftovers"]
    return event["leftovers"]  # type: ignore[no-any-return]


# -- through ctx -------------------------------------------------------------------------------------------------


async def test_everything_is_undone_in_reverse(start_desk: StartDesk, book: list[Any]) -> None:
    """Teardown first, then what came last goes first, each awaited before the next, complete despite errors."""
    source = f"""{HEAD}
from contextlib import asynccontextmanager, contextmanager
from hotdesk_test_book import write

@asynccontextmanager
async def opened(name):
    yield
    await asyncio.sleep(0.02)
    write(f"left {{name}}")

@contextmanager
def plain(name):
    yield
    write(f"left {{name}}")

async def job():
    try:
        await asyncio.sleep(99)
    finally:
        await asyncio.sleep(0.01)
        write("job ended")

async def late():
    await asyncio.sleep(0.02)
    write("deferred")

def broken():
    write("broken")
    raise ValueError("no")

def leaving():
    write("leaving")
    raise SystemExit(1)

async def cancelling():
    write("cancelling")
    raise asyncio.CancelledError

@hookimpl
async def setup(ctx):
    await ctx.enter(opened("a"))
    ctx.task(job(), "job")
    ctx.defer(late)
    ctx.defer(broken)
    ctx.defer(leaving)
    ctx.defer(cancelling)
    await ctx.enter(plain("b"))
    await asyncio.sleep(0)

@hookimpl
async def teardown(ctx):
    write("teardown")
"""
    desk = await start_desk({"bot.py": source})
    await swap(desk, 2)
    assert book == [
        "teardown",
        "left b",
        "cancelling",
        "leaving",
        "broken",
        "deferred",
        "job ended",
        "left a",
    ]
    left = await leftovers(desk)
    assert [what.split(":")[0] for what in left] == ["defer 'cancelling'", "defer 'leaving'", "defer 'broken'"]


async def test_a_teardown_that_fails_is_told_and_all_else_undone(start_desk: StartDesk, book: list[Any]) -> None:
    """An error in `teardown` keeps nothing from being undone."""
    source = (
        f"{HEAD}from hotdesk_test_book import write\n"
        "@hookimpl\nasync def setup(ctx): ctx.defer(lambda: write('undone'))\n"
        "@hookimpl\nasync def teardown(ctx): raise ValueError('in teardown')\n"
    )
    desk = await start_desk({"bot.py": source})
    await swap(desk, 2)
    assert book == ["undone"]
    assert "in teardown" in (await leftovers(desk))[0]


async def test_a_closed_scope_refuses_new_work(start_desk: StartDesk, book: list[Any]) -> None:
    """At its end a generation can begin nothing more, though what is undone may use `ctx`; after it, nothing at all."""
    source = f"""{HEAD}
from contextlib import nullcontext
from hotdesk_test_book import write

async def nothing(): ...

@hookimpl
async def setup(ctx):
    kv = ctx.kv
    http = ctx.http

    async def try_all():
        for name, use in {{
            "task": lambda: ctx.task(nothing()),
            "every": lambda: ctx.every(1, nothing),
            "metric": lambda: ctx.metric("counter", "n"),
            "defer": lambda: ctx.defer(print),
            "enter": lambda: ctx.enter(nullcontext()),
            "send": lambda: ctx.send("c", "x"),
            "kv": lambda: ctx.kv,
            "http": lambda: ctx.http,
            "kv, kept": lambda: kv.set("a", 1),
            "http, kept": lambda: http.get("http://localhost:1/"),
        }}.items():
            try:
                result = use()
                if asyncio.iscoroutine(result):
                    await result
                write((name, "allowed"))
            except Exception as exc:
                write((name, type(exc).__name__))

    ctx.defer(try_all)
    write(("ctx", ctx))
"""
    capabilities = 'capabilities = ["kv", "http:localhost"]'
    desk = await start_desk(
        {"bot.py": source, "bot.toml": capabilities},
        settings={"bot": PluginSettings(grant=("kv", "http:localhost"))},
    )
    await swap(desk, 2)
    [ended] = [value for name, value in book if name == "ctx"][:1]
    outcomes = {name: outcome for name, outcome in book if name != "ctx"}
    begun = {"task", "every", "metric", "defer", "enter"}
    assert {name for name, outcome in outcomes.items() if outcome == "ScopeClosed"} == begun, book
    assert (outcomes["kv"], outcomes["kv, kept"]) == ("allowed", "allowed")
    await wait_until(lambda: ended._scope.undone, "all is undone")
    with pytest.raises(ScopeClosed):
        ended.kv  # noqa: B018
    with pytest.raises(ScopeClosed):
        await ended.send("c", "x")
    book.clear()


async def test_tasks_that_ended_are_forgotten(start_desk: StartDesk) -> None:
    """A plugin that starts a task for each message does not grow: what has ended needs no undoing."""
    source = HEAD.replace("(turn): return 'x'", "(ctx, turn):\n    ctx.task(asyncio.sleep(0))\n    return 'x'")
    desk = await start_desk({"bot.py": source})
    for _ in range(20):
        await desk.reply()
    current = desk.host.plugins.entry("bot").current
    assert current is not None
    await wait_until(lambda: not current.scope._undo, "nothing is left to undo")


async def test_a_timed_job_runs_in_one_generation_at_a_time(start_desk: StartDesk, book: list[Any]) -> None:
    """A job begins when its generation serves, and not before one that the old generation still runs has ended."""
    source = f"""{HEAD}
from hotdesk_test_book import write

@hookimpl
async def setup(ctx):
    async def job():
        write(("begin", ctx.generation))
        await asyncio.sleep(0.06)
        write(("end", ctx.generation))
    ctx.every(0.005, job)
    await asyncio.sleep(0.1)
"""
    desk = await start_desk({"bot.py": source}, standby_s=0.3)
    for number in range(2, 6):
        await wait_until(partial(book.__contains__, ("begin", number - 1)), "the job runs")
        desk.write("bot.py", f"{source}# {number}\n")
        await desk.wait_generation("bot", number)
    await wait_until(lambda: ("begin", 5) in book, "the last one runs")
    for begin, end in zip(book[::2], book[1::2], strict=False):
        assert (begin[0], end) == ("begin", ("end", begin[1])), book
    numbers = [number for _, number in book]
    assert numbers == sorted(numbers)


async def test_a_timed_job_goes_on_after_a_rollback(start_desk: StartDesk, book: list[Any]) -> None:
    """The generation that comes back runs its jobs again, and the one that failed none."""
    source = (
        f"{HEAD}from hotdesk_test_book import write\n@hookimpl\nasync def setup(ctx):\n"
        "    async def job(): write(ctx.generation)\n    ctx.every(0.005, job)\n"
    )
    desk = await start_desk({"bot.py": source}, standby_s=5.0)
    await wait_until(lambda: 1 in book, "it runs")
    desk.write("bot.py", source.replace("return 'x'", "raise ValueError"))
    await desk.wait_generation("bot", 2)
    await wait_until(lambda: 2 in book, "the new one runs")
    assert await desk.reply() == "x"
    book.clear()
    await wait_until(lambda: len(book) > 5, "it runs again")
    assert set(book) == {1}


async def test_a_timed_job_of_a_deleted_plugin_stops_at_once(start_desk: StartDesk, book: list[Any]) -> None:
    """Also while a turn still drains, an unloaded plugin's jobs rest."""
    source = (
        f"{HEAD.replace('return', 'await asyncio.sleep(0.5); return')}from hotdesk_test_book import write\n"
        "@hookimpl\nasync def setup(ctx):\n    async def job(): write(1)\n    ctx.every(0.005, job)\n"
    )
    desk = await start_desk({"bot.py": source})
    under_way = asyncio.create_task(desk.reply())
    await wait_until(lambda: desk.host.turns.live and book, "turn and job run")
    (desk.folder / "bot.py").unlink()
    await desk.wait_event("plugin_unloaded", plugin="bot")
    await asyncio.sleep(0)
    book.clear()
    assert await under_way == "x"
    assert book == []


async def test_a_metric_is_of_both_generations_and_goes_with_the_last(start_desk: StartDesk) -> None:
    """`ctx.metric` counts on over a swap, and is gone from `/metrics` with the plugin."""
    source = (
        f"{HEAD.replace('(turn):', '(ctx, turn):').replace('return', 'N.inc(); return')}"
        "@hookimpl\nasync def setup(ctx):\n    global N\n    N = ctx.metric('counter', 'answers')\n"
    )
    desk = await start_desk({"bot.py": source, "echo.py": echo(1)})

    async def shown() -> str:
        async with desk.http.get(f"{desk.url}/metrics") as response:
            return "\n".join(line for line in (await response.text()).splitlines() if "bot_answers_total " in line)

    await desk.reply()
    await swap(desk, 2, source)
    await desk.reply()
    assert (await shown()).splitlines()[-1].endswith("bot_answers_total 2.0")
    (desk.folder / "bot.py").unlink()

    async def gone() -> bool:
        return not await shown()

    await wait_until(gone, "the metric is gone")


# -- behind the host's back --------------------------------------------------------------------------------------

DIRTY = {
    "raw task": ("asyncio.create_task(forever())", "task 'forever'"),
    "call_later": ("asyncio.get_running_loop().call_later(99, print)", "timer "),
    "Timer": ("threading.Timer(99, print).start()", "thread "),
    "thread": ("threading.Thread(target=STOP.wait, name='mine', daemon=True).start()", "thread 'mine' (still there)"),
    "logging handler": (
        "logging.getLogger('some.lib').addHandler(logging.NullHandler())",
        "logging handler NullHandler",
    ),
    "metric": ("prometheus_client.Counter('dirty_things', 'x')", "metric dirty_things"),
    "singledispatch": ("pkgutil.iter_importer_modules.register(Own, print)", "singledispatch entry iter_importer_mod"),
    "atexit": ("atexit.register(lambda: print('bye'))", "atexit '"),
}

DIRTY_HEAD = f"""{HEAD}
import atexit, pkgutil, threading
import prometheus_client
from hotdesk_test_book import kept

STOP = kept.setdefault("stop", threading.Event())

class Own: ...

async def forever():
    await asyncio.Event().wait()
"""


def census() -> dict[str, int]:
    return {
        "threads": len([t for t in threading.enumerate() if not t.name.startswith(("asyncio_", "AnyIO"))]),
        "handlers": len(logging.getLogger("some.lib").handlers),
        "metrics": len(REGISTRY._collector_to_names),
        "modules": sum(name.startswith(PREFIX) for name in sys.modules),
        "finders": len(sys.meta_path),
    }


MOMENTS = [
    (what, when)
    for what, (statement, _) in DIRTY.items()
    for when in ("setup", "respond", "import")
    if when != "import" or "asyncio." not in statement  # no loop runs where a module is imported
]


@pytest.mark.parametrize(("what", "when"), MOMENTS)
async def test_what_is_left_is_caught_undone_and_named(start_desk: StartDesk, what: str, when: str) -> None:
    """Whatever the way and the moment, the next generation finds it gone, and the operator its name."""
    if what == "singledispatch":
        gc.unfreeze()  # as in a process of its own, where all is loose until its host has looked through it
    statement, named = DIRTY[what]
    source = DIRTY_HEAD
    if when == "import":
        source += f"{statement}\n"
    elif when == "setup":
        source += f"@hookimpl\nasync def setup(ctx):\n    global T\n    T = {statement}\n"
    else:
        source = source.replace("return 'x'", f"\n    global T\n    T = {statement}\n    return 'x'")
    desk = await start_desk({"bot.py": HEAD})
    before = census()
    await swap(desk, 2, source)
    if when == "respond":
        assert await desk.reply() == "x"
    await swap(desk, 3)
    left = await leftovers(desk)
    assert len(left) == 1
    assert left[0].startswith(named), left
    sys.modules["hotdesk_test_book"].kept["stop"].set()
    await wait_until(lambda: census() == before, f"{before}, not {census()}")


async def test_a_proxy_of_a_library_is_left_asleep(start_desk: StartDesk) -> None:
    """A host that looks for what plugins could register with asks no object that imports something when it is asked."""
    asked = []

    class Proxy:
        @property
        def __class__(self) -> type:
            asked.append(self)
            return object

    proxies = [Proxy()]
    await start_desk({"bot.py": HEAD})
    assert not asked
    assert len(proxies) == 1


async def test_an_exit_function_is_not_called_for_a_plugin_that_is_gone(start_desk: StartDesk) -> None:
    """What `atexit` kept of a plugin is let go with it; what the plugin took back itself is not held against it."""
    source = f"{HEAD}import atexit\n@atexit.register\ndef bye(): ...\n"
    desk = await start_desk({"bot.py": source})
    current = desk.host.plugins.entry("bot").current
    assert current is not None
    bye = weakref.ref(sys.modules[current.module_name].bye)
    del current
    await swap(desk, 2, f"{source}@hookimpl\nasync def teardown(ctx): atexit.unregister(bye)\n")
    assert await leftovers(desk) == ["atexit 'bye'"]

    def let_go() -> bool:
        gc.collect()
        return bye() is None

    await wait_until(let_go, "the function is collected")
    desk.events.clear()
    await swap(desk, 3)
    assert "plugin_leftover" not in [event["kind"] for event in desk.events]


async def test_two_plugins_that_load_at_once_keep_their_own(start_desk: StartDesk) -> None:
    """What one plugin adds while another is being set up is not put on the other's account."""
    slow = (
        f"{HEAD}@hookimpl\nasync def setup(ctx):\n    await asyncio.sleep(0.1)\n"
        "    logging.getLogger('some.lib').addHandler(logging.NullHandler())\n    await asyncio.sleep(0.1)\n"
    )
    quiet = f"{HEAD}@hookimpl\nasync def setup(ctx):\n    await asyncio.sleep(0.2)\n"
    desk = await start_desk({"slow.py": slow, "quiet.py": quiet})
    handlers = len(logging.getLogger("some.lib").handlers)
    await swap(desk, 2, name="quiet")
    assert len(logging.getLogger("some.lib").handlers) == handlers
    assert (await desk.plugin("quiet"))["leftovers"] == []
    await swap(desk, 2, name="slow")
    assert (await leftovers(desk, "slow"))[0].startswith("logging handler")


async def test_a_module_that_somebody_holds_is_named_with_its_holder(start_desk: StartDesk) -> None:
    """What can't be collected because a library keeps it is reported: the object, and who has it."""
    source = f"{HEAD}import hotdesk_test_book\nclass Kept: ...\nhotdesk_test_book.kept['it'] = Kept\n"
    desk = await start_desk({"bot.py": source})
    await swap(desk, 2)
    event = await desk.wait_event("plugin_leftover", plugin="bot", generation=1)
    assert "Kept is still held by" in event["leftovers"][0]
    assert "hotdesk_test_book.kept" in event["leftovers"][0]


@pytest.mark.slow
async def test_generations_are_collected(start_desk: StartDesk) -> None:
    """Over 50 swaps of a plugin that tidies nothing up each generation is proven gone, and three at most are alive."""
    dirty = f"""{HEAD}
import functools
BIG = bytearray(1 << 20)

class Own:
    table = {{}}
    def __init__(self): self.me = self
Own.table[Own] = Own()

@functools.lru_cache
def cached(x): return Own()
cached(1)

@hookimpl
async def setup(ctx):
    global T
    T = asyncio.create_task(asyncio.Event().wait())
    asyncio.get_running_loop().call_later(999, cached, 1)
    logging.getLogger("some.lib").addHandler(logging.NullHandler())
    try:
        raise ValueError
    except ValueError as exc:
        Own.error = exc
"""
    desk = await start_desk({"bot.py": dirty})
    refs: list[weakref.ref[Generation]] = []
    classes: list[weakref.ref[Any]] = []
    worst = 0.0
    for number in range(2, 52):
        current = desk.host.plugins.entry("bot").current
        assert current is not None
        refs.append(weakref.ref(current))
        classes.append(weakref.ref(sys.modules[current.module_name].Own))
        del current
        desk.write("bot.py", f"{dirty}# {number}\n")
        await desk.wait_event("plugin_swapped", plugin="bot", generation=number)
        assert await desk.reply() == "x"
        async with desk.http.get(f"{desk.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        worst = max(worst, *(float(x.split()[1]) for x in lines if x.startswith("hotdesk_generations_alive ")))
    assert worst <= 3

    def alive() -> int:
        gc.collect()
        return sum(ref() is not None for ref in (*refs, *classes))

    await wait_until(lambda: alive() == 0, "all but the last are collected")
    assert sum(name.startswith(PREFIX) for name in sys.modules) <= 2
    assert len(logging.getLogger("some.lib").handlers) <= 2


async def test_hosts_on_one_loop_end_in_any_order(start_desk: StartDesk, book: list[Any]) -> None:
    """The guards on loop and process are shared by all hosts, and are gone with the last one."""
    from hotdesk.runtime.guards import Guards

    loop = asyncio.get_running_loop()
    before = (loop.get_task_factory(), loop.call_later, atexit.register, logging.Logger.addHandler)
    first, second = Guards(loop), Guards(loop)
    assert loop.get_task_factory() is not before[0]
    first.remove()
    assert atexit.register is not before[2]
    second.remove()
    assert (loop.get_task_factory(), loop.call_later, atexit.register, logging.Logger.addHandler) == before
