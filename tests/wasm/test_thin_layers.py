"""The thin layers that are kept by hand, at their edges: memory, errors, and texts that nobody writes on purpose."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.wasm.alone import TURN, alone
from tests.wasm.toolchains import Unavailable, c, go, zig

from hotdesk.cli.scaffold import CONTRACT, new
from hotdesk.runtime.wasm import Machine

pytestmark = pytest.mark.timeout(600)  # the first test of a language installs its toolchain

KIB, MIB = 1024, 1024 * 1024
PAGE = 64 * KIB
ENSURE: dict[str, Callable[[], Mapping[str, str]]] = {"c": c.ensure, "go": go.ensure, "zig": zig.ensure}

WORLD = f"""
package author:shop;

world plugin {{
    include hotdesk:plugin/imports@{CONTRACT};
    export hotdesk:plugin/middleware@{CONTRACT};
    export hotdesk:plugin/bot@{CONTRACT};
    export hotdesk:plugin/lifecycle@{CONTRACT};
}}
"""

IN_C = r"""
#include "hotdesk.h"

extern char __heap_base;
static volatile char filler[FILLER];

static hd_decision before(const hd_turn *turn) { return hd_next(); }
static hd_decision after(const hd_turn *turn, const hd_reply *reply) {
    return hd_rewrite(hd_format("%t", reply->text));
}

static hd_decision respond(const hd_turn *turn) {
    const hd_text *keys;
    size_t count;
    hd_response response;
    filler[turn->text.len] = 1;
    if (hd_is(turn->text, "where the data end")) return hd_answer(hd_format("%d", (int)(uintptr_t)&__heap_base));
    if (hd_is(turn->text, "percent")) return hd_answer(hd_format("100%"));
    if (hd_is(turn->text, "digits")) return hd_answer(hd_format("<%t>", hd_digits_after(HD("1 or none"), "")));
    bool none = hd_is(turn->text, "keys") ? hd_kv_keys(HD("k"), &keys, &count).none
                                          : hd_http_fetch(HD("GET"), HD("a"), HD("{}"), HD(""), &response).none;
    return hd_answer(none ? HD("none") : HD("something"));
}

static hd_outcome configure(hd_text config) { return hd_done(); }
static hd_outcome import_state(hd_text state, hd_text version) { return hd_done(); }

HD_MIDDLEWARE(before, after)
HD_BOT(respond)
HD_LIFECYCLE(configure, configure, hd_done, hd_done, import_state)
"""

IN_ZIG = r"""
const hotdesk = @import("hotdesk");

pub fn after(_: hotdesk.Turn, reply: hotdesk.Reply) !hotdesk.Decision {
    return .{ .rewrite = hotdesk.format("{s}", .{reply.text}) };
}

pub fn respond(turn: hotdesk.Turn) !hotdesk.Decision {
    if (hotdesk.has(turn.text, "ann")) return hotdesk.fail("nothing for {s}", .{turn.text});
    return error.Invalid; // a name that the layer has, too
}

pub fn probe() !void {}

comptime {
    hotdesk.plugin(@This());
}
"""

IN_GO = r"""
package main

import "hotdesk"

func init() { hotdesk.Serve(hotdesk.Plugin{Configure: configure, Respond: respond}) }

func main() {}

func configure(config string) error { return hotdesk.LoadAnew }

func respond(turn hotdesk.Turn) (hotdesk.Decision, error) { return hotdesk.Other(turn.Extra), nil }
"""


def made(folder: Path, language: str, source: str) -> bytes:
    """The component that a scaffold's `make` builds of *source*. Skips where there is no toolchain."""
    try:
        environment = {**os.environ, **ENSURE[language]()}
    except Unavailable as exc:
        pytest.skip(str(exc))
    ran = CliRunner().invoke(new, ["shop", "--lang", language, "--dir", str(folder)])
    assert ran.exit_code == 0, ran.output
    shop = folder / "shop"
    (shop / "wit" / "world.wit").write_text(WORLD)
    (shop / f"plugin.{language}").write_text(source)
    done = subprocess.run(["make", "-s"], cwd=shop, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return (shop / "plugin.wasm").read_bytes()


def in_c(folder: Path, *, filler: int = 4 * KIB) -> bytes:
    return made(folder, "c", IN_C.replace("FILLER", str(filler)))


@pytest.fixture(scope="module")
def c_plugin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return in_c(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def zig_plugin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return made(tmp_path_factory.mktemp("zig"), "zig", IN_ZIG)


def turn(text: str) -> tuple[str, str, str, str]:
    return (*TURN[:2], text, TURN[3])


def answered(text: str) -> tuple[bool, Any]:
    """What a bot's call gives that answers with *text*."""
    return True, ("answer", (text, ""))


@pytest.mark.parametrize(("plugin", "most"), [("c_plugin", 4 * MIB), ("zig_plugin", 3 * MIB)], ids=["c", "zig"])
async def test_calls_that_ask_for_more_and_more_do_not_need_the_sum(
    machine: Machine, plugin: str, most: int, request: pytest.FixtureRequest
) -> None:
    """Texts that grow to what a host takes, or to what a README says, are answered, though all are over the memory."""
    assert most <= machine.output_bytes
    sizes = range(128 * KIB, most, 128 * KIB)
    assert 2 * sum(sizes) > machine.memory_bytes, "in and out"
    async with alone(machine, request.getfixturevalue(plugin)) as guest:
        await guest.call("")
        for size in sizes:
            text = "x" * size
            gave = await guest.call("middleware.after", TURN, (text, "{}"), timeout_s=10)
            assert gave.value == (True, ("rewrite", text)), f"{size} bytes: {str(gave.value)[:500]}"


async def test_data_that_end_where_a_page_does_leave_room(machine: Machine, c_plugin: bytes, tmp_path: Path) -> None:
    """Then the first text lies in a page of its own; every other size of a plugin's data is as good."""
    async with alone(machine, c_plugin) as guest:
        await guest.call("")
        _, (_, (end, _)) = (await guest.call("bot.respond", turn("where the data end"))).value
    longer = in_c(tmp_path, filler=4 * KIB + -int(end) % PAGE)
    async with alone(machine, longer) as guest:
        await guest.call("")
        gave = (await guest.call("bot.respond", turn("where the data end"))).value
        assert gave == answered(str(int(end) + -int(end) % PAGE)), gave


@pytest.mark.parametrize(("asked", "said"), [("percent", "100%"), ("digits", "<>")])
async def test_texts_that_end_too_early_are_taken_in_c(
    machine: Machine, c_plugin: bytes, asked: str, said: str
) -> None:
    """A format that ends in a percent sign ends there; right behind nothing there are no digits."""
    async with alone(machine, c_plugin) as guest:
        await guest.call("")
        assert (await guest.call("bot.respond", turn(asked))).value == answered(said)


async def test_what_c_gives_through_a_pointer_is_not_none(machine: Machine, c_plugin: bytes) -> None:
    """Keys and a response are there, though `text` is empty; when they are refused, nothing is."""
    fine: dict[str, Any] = {"kv.keys": (True, ["k"]), "http.fetch": (True, (200, "{}", "", "{}"))}
    async with alone(machine, c_plugin, answer=lambda operation, _: fine[operation]) as guest:
        await guest.call("")
        for asked in ("keys", "fetch"):
            assert (await guest.call("bot.respond", turn(asked))).value == answered("something")
    async with alone(machine, c_plugin, answer=lambda *_: (False, ("denied", "it"))) as guest:
        await guest.call("")
        for asked in ("keys", "fetch"):
            assert (await guest.call("bot.respond", turn(asked))).value == answered("none")


async def test_zig_tells_no_call_what_another_failed_of(machine: Machine, zig_plugin: bytes) -> None:
    """An author's own error has its own name, also when the layer has one of that name and an earlier text for it."""
    async with alone(machine, zig_plugin) as guest:
        await guest.call("")
        assert (await guest.call("bot.respond", turn("ann"))).value == (False, "nothing for ann")
        assert (await guest.call("bot.respond", turn("bob"))).value == (False, "Invalid")


async def test_go_can_ask_to_be_loaded_anew(machine: Machine, tmp_path: Path) -> None:
    """What takes no change live is set up with its config, and loaded anew for another. `Other` is a decision."""
    async with alone(machine, made(tmp_path, "go", IN_GO)) as guest:
        await guest.call("")
        assert (await guest.call("lifecycle.setup", "{}")).value == (True, None)
        assert (await guest.call("lifecycle.configure", "{}")).value == (True, False)
        assert (await guest.call("bot.respond", turn("hello"))).value == (True, ("other", "{}"))
