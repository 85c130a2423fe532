"""Bad updates under traffic: what serves goes on answering every message, and the next good save is taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from tests.runtime.traffic import Traffic, traffic

from conftest import Desk, StartDesk, wait_until

ROUNDS = 20

HEAD = "from hotdesk_sdk import hookimpl\n\n"


def good(version: int) -> str:
    """A bot that says its version and hands over state, so that `import_state` has something to fail on."""
    return (
        f"{HEAD}VERSION = {version}\n\n"
        "@hookimpl\nasync def respond(turn):\n    return f'{VERSION}'\n\n"
        "@hookimpl\nasync def export_state(ctx):\n    return {'from': VERSION}\n"
    )


def with_hook(hook: str, body: str) -> Callable[[int], str]:
    return lambda number: f"{good(-number)}\n@hookimpl\nasync def {hook}:\n    {body}\n"


@dataclass(frozen=True)
class Bad:
    """One kind of bad update: its source by round, and what is to be said of it."""

    source: Callable[[int], str | bytes]
    step: str
    says: str
    line: int | None = None
    """The line that is to be named; 0 where only the file is known."""


LAST = len(good(1).splitlines()) + 4
"""The line of the body of what `with_hook` adds."""

KINDS = {
    "syntax error": Bad(lambda n: f"{HEAD}\ndef broken{n}(:\n", "parse", "SyntaxError", 4),
    "import error": Bad(lambda n: f"{HEAD}import no_such_module_{n}\n", "import", "ModuleNotFoundError", 3),
    "no hooks": Bad(lambda n: f"X = {n}\n", "hooks", "no hooks", 0),
    "wrong hook signature": Bad(
        lambda n: f"{HEAD}X = {n}\n@hookimpl\nasync def respond(turn, colour):\n    return ''\n", "hooks", "colour", 4
    ),
    "sync hook": Bad(lambda n: f"{HEAD}X = {n}\n@hookimpl\ndef respond(turn):\n    return ''\n", "hooks", "async", 4),
    "setup raises": Bad(
        with_hook("setup(ctx)", "raise ValueError('no (really) key')"), "setup", "no (really) key", LAST
    ),
    "setup hangs": Bad(with_hook("setup(ctx)", "await __import__('asyncio').Event().wait()"), "setup", "100 ms", 0),
    "setup exits": Bad(with_hook("setup(ctx)", "__import__('sys').exit(3)"), "setup", "SystemExit: 3", LAST),
    "probe fails": Bad(with_hook("probe(ctx)", "assert 1 == 2, 'not fit'"), "probe", "not fit", LAST),
    "import_state fails": Bad(
        with_hook("import_state(ctx, state, version)", "state['missing']"), "import_state", "KeyError", LAST
    ),
    "empty": Bad(lambda n: b"\n" * n, "parse", "empty", 0),
    "binary garbage": Bad(lambda n: bytes([n, 0, 255, 254, 128]) * 40, "parse", "", 0),
}


def named(desk: Desk, kind: str) -> list[dict[str, Any]]:
    return [event for event in desk.events if event["kind"] == kind]


def has_failed(desk: Desk, times: int) -> bool:
    return len(named(desk, "plugin_failed")) == times


async def check_refusals(
    desk: Desk, seen: Traffic, bad: Bad, spoil: Callable[[int], Awaitable[None]], mend: Callable[[int], None]
) -> None:
    """*spoil* and *mend* in turns: after each the failure is told in full, the old one answered, the fix serves."""
    path = str(desk.folder / "bot.py")
    for number in range(1, ROUNDS + 1):
        mended = time.monotonic()
        await spoil(number)
        await wait_until(partial(has_failed, desk, number), f"failure {number}")
        await seen.wait_more(3)
        assert seen.generations_since(mended) == {number}, "only the old generation answered"
        failed = named(desk, "plugin_failed")[-1]
        shown = await desk.plugin("bot")
        assert failed["step"] == shown["error"]["step"] == bad.step, failed
        assert bad.says in failed["message"], failed
        assert (failed["serving"], shown["generation"], shown["state"]) == (number, number, "ACTIVE")
        if bad.line is not None:
            assert (failed["file"], failed["line"]) == (path, bad.line or None) or not bad.line, failed
            assert (shown["error"]["file"], shown["error"]["line"]) == (failed["file"], failed["line"])
            assert failed["file"] == path
        mend(number)
        await desk.wait_event("plugin_swapped", plugin="bot", generation=number + 1)
        assert (await desk.plugin("bot"))["error"] is None
    await seen.wait_more(3)
    assert max(seen.generations) == seen.generations[-1] == ROUNDS + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_a_bad_update_changes_nothing(start_desk: StartDesk, kind: str) -> None:
    """Twenty times: the old generation answers all, the failure is told with step, file and line, the fix serves."""
    bad = KINDS[kind]
    desk = await start_desk({"bot.py": good(1)}, setup_timeout_s=0.1)

    async def spoil(number: int) -> None:
        desk.write("bot.py", bad.source(number))

    def mend(number: int) -> None:
        desk.write("bot.py", good(number + 1))

    async with traffic(desk) as seen:
        await check_refusals(desk, seen, bad, spoil, mend)


@pytest.mark.slow
async def test_a_half_written_update_that_stays_half_is_refused(start_desk: StartDesk) -> None:
    """A writer that stops in the middle for good: the half is refused like a syntax error, and the rest mends it."""
    desk = await start_desk({"bot.py": good(1)})
    path = desk.folder / "bot.py"
    bad = Bad(lambda n: "", "parse", "IndentationError", None)

    async def spoil(number: int) -> None:
        whole = good(number + 1)
        path.write_text(whole[: whole.index("return") - 5])

    def mend(number: int) -> None:
        desk.write("bot.py", good(number + 1))

    async with traffic(desk) as seen:
        await check_refusals(desk, seen, bad, spoil, mend)


@pytest.mark.slow
async def test_a_name_clash_changes_nothing(start_desk: StartDesk) -> None:
    """A second source of a name that serves is refused with both paths; taking it away mends it."""
    desk = await start_desk({"bot.py": good(1)})
    rival = desk.folder / "bot"
    rival.mkdir()
    async with traffic(desk) as seen:
        for number in range(1, ROUNDS + 1):
            desk.write("bot/__init__.py", good(-number))
            await wait_until(partial(has_failed, desk, number), f"clash {number}")
            failed = named(desk, "plugin_failed")[-1]
            assert (failed["step"], failed["file"], failed["serving"]) == ("find", str(rival), number)
            assert str(desk.folder / "bot.py") in failed["message"]
            await seen.wait_more(3)
            assert (await desk.plugin("bot"))["error"]["step"] == "find"
            (rival / "__init__.py").unlink()
            desk.write("bot.py", good(number + 1))
            await desk.wait_event("plugin_swapped", plugin="bot", generation=number + 1)

            async def clean() -> bool:
                return (await desk.plugin("bot"))["error"] is None

            await wait_until(clean, "the clash is forgotten")
        await seen.wait_more(3)
    assert all(int(text) > 0 for text in seen.texts)


async def test_a_bad_update_leaves_nothing_of_itself(start_desk: StartDesk) -> None:
    """What a refused generation did before it was refused is undone: tasks, handlers, metrics, modules, ctx.defer."""
    import logging
    import sys

    from prometheus_client import REGISTRY

    from hotdesk.runtime.python import PREFIX

    desk = await start_desk({"bot.py": good(1)})
    handlers, collectors = len(logging.getLogger().handlers), len(REGISTRY._collector_to_names)
    tasks = len(asyncio.all_tasks())
    dirty = (
        "import asyncio, logging, threading\nfrom prometheus_client import Counter\n"
        "logging.getLogger().addHandler(logging.NullHandler())\n"
        "C = Counter('left_by_a_bad_update', 'x')\n"
    )
    late = (
        f"{good(2)}{dirty}\n@hookimpl\nasync def setup(ctx):\n    T = asyncio.create_task(asyncio.sleep(99))\n"
        "    ctx.task(asyncio.sleep(99))\n    raise ValueError\n"
    )
    early = f"{dirty}raise ValueError('while it is imported')\n"
    for number, source in enumerate((late, early, late, early), 1):
        desk.write("bot.py", f"{source}# {number}\n")
        await wait_until(partial(has_failed, desk, number), f"failure {number}")
        assert named(desk, "plugin_failed")[-1]["message"].count("ValueError") == 1
    await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "no task is left")
    assert (len(logging.getLogger().handlers), len(REGISTRY._collector_to_names)) == (handlers, collectors)
    assert sum(name.startswith(PREFIX) for name in sys.modules) == 1


async def test_an_import_that_does_not_end_is_given_up(start_desk: StartDesk) -> None:
    """A module that loops for ever is interrupted after `setup_timeout_s`, in a thread that held nobody up."""
    desk = await start_desk({"bot.py": good(1)}, setup_timeout_s=0.2)
    async with traffic(desk, pause_s=0.02) as seen:
        desk.write("bot.py", f"{good(2)}\nimport time\nwhile True:\n    time.sleep(0.001)\n")
        failed = await desk.wait_event("plugin_failed", plugin="bot")
        await seen.wait_more(3)
    assert (failed["step"], set(seen.generations)) == ("import", {1})


async def test_a_fault_that_nobody_thought_of_is_a_failed_update(start_desk: StartDesk) -> None:
    """Also an error of an unexpected kind in a step, here state nested too deeply to encode, is told and retried."""
    deep = good(1).replace("return {'from': VERSION}", "x = []\n    for _ in range(100000): x = [x]\n    return x")
    desk = await start_desk({"bot.py": deep})
    take = "@hookimpl\nasync def import_state(ctx, state, version): ...\n"
    desk.write("bot.py", good(2) + take)
    failed = await desk.wait_event("plugin_failed", plugin="bot")
    assert failed["step"] in ("export_state", "load")
    assert (await desk.plugin("bot"))["error"]
    desk.write("bot.py", good(3))
    await desk.wait_generation("bot", 2)


async def test_the_first_version_may_be_bad_too(start_desk: StartDesk) -> None:
    """A host starts with a broken plugin in its folder, shows why, and takes the fix at the next save."""
    desk = await start_desk({"bot.py": "import", "other.py": good(5)})
    assert await desk.reply() == "5"
    started = time.monotonic()
    desk.write("bot.py", good(1))
    await desk.wait_event("plugin_loaded", plugin="bot", generation=1)
    assert time.monotonic() - started < 1
    assert await desk.reply() == "1"
