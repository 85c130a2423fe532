"""The contract as text: it parses, its versions keep their promises, and the bindings kept by hand match it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.wasm.toolchains import Unavailable, c, wasm_tools, zig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first run on a machine builds wasm-tools

SDK = Path(__file__).parents[2] / "sdk"
VERSIONS = sorted(
    (one for one in (SDK / "wit").iterdir() if one.is_dir()),
    key=lambda folder: [int(part) for part in folder.name.split(".")],
)
NEWEST = VERSIONS[-1]

Contract = dict[str, dict[str, list[str]]]
"""What has names: records with fields, variants and enums with cases, interfaces with functions, in their order."""


def environment(ensure: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    """The environment with a toolchain in it; the test is skipped where that can't be had."""
    try:
        return {**os.environ, **ensure()}
    except Unavailable as exc:
        pytest.skip(str(exc))


@functools.cache
def wasm_tools_program() -> Path:
    return wasm_tools.program()


def ask(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `wasm-tools component`."""
    try:
        program = wasm_tools_program()
    except Unavailable as exc:
        pytest.skip(str(exc))
    return subprocess.run([program, "component", *args], capture_output=True, text=True, timeout=60, check=False)


def told(*args: str | Path) -> str:
    done = ask(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def resolved(wit: Path) -> dict[str, Any]:
    """A WIT package or a component, resolved, as wasm-tools says it in JSON."""
    document: dict[str, Any] = json.loads(told("wit", "--json", wit))
    return document


def interfaces(document: dict[str, Any], world: str, side: str) -> Contract:
    """The functions of the interfaces that a world imports or exports."""
    chosen = next(one for one in document["worlds"] if one["name"] == world)
    found = [document["interfaces"][item["interface"]["id"]] for item in chosen[side].values()]
    return {"functions": {one["name"]: sorted(one["functions"]) for one in found if one["functions"]}}


def contract() -> Contract:
    found: Contract = {"record": {}, "variant": {}, "enum": {}}
    for one in resolved(NEWEST)["types"]:
        (kind, what), *_ = one["kind"].items() if isinstance(one["kind"], dict) else [("", {})]
        if kind in found and one["name"]:
            found[kind][one["name"]] = [item["name"] for item in what["fields" if kind == "record" else "cases"]]
    return found


def breaks(old: Path, new: Path, folder: Path) -> str:
    """What of the contract *new* a plugin that was built for *old* would trip over; empty if nothing.

    Compared are two worlds of the interfaces of *old*, each with the side that a plugin has it on: what is gone is not
    found, what is new is not asked for.
    """
    worlds = ["package check:versions;"]
    for which, number in (("before", old.name), ("after", new.name)):
        lines = [f"world {which} {{"]
        for side, verb in (("imports", "import"), ("exports", "export")):
            names = interfaces(resolved(old), "full-plugin", side)["functions"]
            lines += [f"    {verb} hotdesk:plugin/{name}@{number};" for name in names]
        worlds.append("\n".join([*lines, "}"]))
    for version in (old, new):
        shutil.copytree(version, folder / "deps" / version.name)
    (folder / "check.wit").write_text("\n".join(worlds), "utf-8")
    done = ask("semver-check", folder, "--prev", "before", "--new", "after")
    return done.stderr if done.returncode else ""


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
def test_a_version_is_the_package_that_its_folder_says(version: Path) -> None:
    """Each folder of sdk/wit parses, and holds the one package of its version."""
    assert [one["name"] for one in resolved(version)["packages"]] == [f"hotdesk:plugin@{version.name}"]


@pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
def test_every_world_can_be_a_component(version: Path, tmp_path: Path) -> None:
    """A module made from each world alone becomes a component that imports and exports what the world says."""
    document = resolved(version)
    for world in (one["name"] for one in document["worlds"]):
        core, whole = tmp_path / f"{world}.core.wasm", tmp_path / f"{world}.wasm"
        told("embed", "--dummy", version, "--world", world, "-o", core)
        told("new", core, "-o", whole)
        for side in ("imports", "exports"):
            assert interfaces(resolved(whole), "root", side) == interfaces(document, world, side)


def test_each_version_keeps_the_promises_of_the_one_before(tmp_path: Path) -> None:
    """A plugin that was built for a version fits every later one of the same major version."""
    for old, new in itertools.pairwise(VERSIONS):
        if old.name.partition(".")[0] == new.name.partition(".")[0]:
            assert breaks(old, new, tmp_path / new.name) == ""


def doctored(tmp_path: Path, changes: Mapping[str, str]) -> str:
    """What the check says of a next version in which these texts are others."""
    text = (NEWEST / "hotdesk.wit").read_text("utf-8")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    major, minor, _ = NEWEST.name.split(".")
    following = tmp_path / f"{major}.{int(minor) + 1}.0"
    following.mkdir()
    (following / "hotdesk.wit").write_text(text.replace(f"@{NEWEST.name}", f"@{following.name}"), "utf-8")
    assert resolved(following)["packages"], "it is a contract still"
    return breaks(NEWEST, following, tmp_path / "check")


@pytest.mark.parametrize(
    "changes",
    [
        {"time-left: func() -> u32;": "time-left: func() -> u64;"},
        {"    time-left: func() -> u32;": ""},
        {"        /// For the agent, not for the visitor.": "        urgent: bool,"},
        {"        drop(string),": ""},
        {"        timeout(string),": "        timeout(string),\n        busy(string),"},
        {"respond: func": "greet: func() -> string;\n    respond: func"},
        {"interface kv {": "interface store {", "import kv;": "import store;"},
        {"interface chunks {": "interface pieces {", "export chunks;": "export pieces;"},
    ],
    ids=["type", "function gone", "field", "case gone", "case", "function to export", "import gone", "export gone"],
)
def test_a_break_between_versions_is_found(tmp_path: Path, changes: Mapping[str, str]) -> None:
    """What an older plugin would trip over fails the check: a changed type, something gone, one more to export."""
    assert doctored(tmp_path, changes) != ""


@pytest.mark.parametrize(
    "changes",
    [
        {"world imports {": "interface clock {\n    now: func() -> u64;\n}\n\nworld imports {\n    import clock;"},
        {"world full-plugin {": "interface pages {\n    page: func();\n}\n\nworld full-plugin {\n    export pages;"},
        {"time-left: func() -> u32;": "time-left: func() -> u32;\n    more: func();"},
        {"/// Answers a turn, ": "/// Gives an answer, "},
    ],
    ids=["interface to import", "interface to export", "function to import", "comment"],
)
def test_an_addition_is_no_break(tmp_path: Path, changes: Mapping[str, str]) -> None:
    """A later version may have more: interfaces of either side, and functions that a plugin may call."""
    assert doctored(tmp_path, changes) == ""


# ---- bindings that are kept by hand ----------------------------------------------------------------------------------

EVERYTHING_IN_C = r"""
#include "hotdesk.h"

static const hd_tool list[] = {{.name = HD("tool"), .description = HD(""), .parameters = HD("{}")}};

static hd_decision before(const hd_turn *turn) { return hd_rewrite(turn->text); }
static hd_decision after(const hd_turn *turn, const hd_reply *reply) { return hd_answer_with(reply->text, turn->id); }
static hd_piece transform(const hd_turn *turn, hd_text text, bool last) { return (hd_piece){.text = text}; }

static hd_decision respond(const hd_turn *turn) {
    const hd_text *keys;
    size_t count;
    hd_response response;
    hd_log(HD_INFO, turn->text, hd_config());
    hd_emit(hd_format("%d", (int)hd_time_left()));
    hd_result state = hd_state_get(turn->id);
    hd_state_set(turn->id, state.none ? NULL : &state.text);
    hd_send(turn->conversation, hd_history(3).text);
    hd_kv_set(turn->id, hd_kv_get(turn->id).text);
    hd_kv_keys(turn->id, &keys, &count);
    hd_kv_delete(keys[count - 1]);
    hd_http_fetch(turn->id, turn->text, turn->extra, hd_llm_complete(turn->text).text, &response);
    return hd_answer(response.body);
}

static hd_outcome call(hd_text name, hd_text arguments) { return hd_done_with(arguments); }
static hd_intake receive(const hd_request *asked) { return (hd_intake){.answer = hd_json_response(200, asked->body)}; }
static hd_outcome deliver(hd_text conversation, const hd_reply *reply) { return hd_error(reply->text); }
static void on_event(hd_text name, hd_text data) { hd_log(HD_DEBUG, name, data); }
static hd_outcome configure(hd_text config) { return hd_load_anew(); }
static hd_outcome import_state(hd_text state, hd_text version) { return hd_done(); }

HD_MIDDLEWARE(before, after)
HD_CHUNKS(transform)
HD_BOT(respond)
HD_TOOLS(list, call)
HD_INTAKE(receive, deliver)
HD_EVENTS(on_event)
HD_LIFECYCLE(configure, configure, hd_done, hd_done, import_state)
"""

EVERYTHING_IN_ZIG = r"""
const hotdesk = @import("hotdesk");
const Text = hotdesk.Text;

pub fn before(turn: hotdesk.Turn) !hotdesk.Decision {
    return .{ .rewrite = turn.text };
}

pub fn after(turn: hotdesk.Turn, reply: hotdesk.Reply) !hotdesk.Decision {
    return .{ .answer = .{ .text = reply.text, .extra = turn.id } };
}

pub fn transform(_: hotdesk.Turn, text: Text, _: bool) !hotdesk.Piece {
    return .{ .text = text };
}

pub fn respond(turn: hotdesk.Turn) !hotdesk.Decision {
    hotdesk.log(.info, turn.text, .{ .config = hotdesk.config() });
    try hotdesk.emit(hotdesk.format("{d}", .{hotdesk.timeLeft()}));
    try hotdesk.state.set(turn.id, try hotdesk.state.get(turn.id));
    _ = try hotdesk.send(turn.conversation, try hotdesk.history(3));
    try hotdesk.kv.set(turn.id, try hotdesk.kv.get(turn.id) orelse "");
    for (try hotdesk.kv.keys(turn.id)) |key| try hotdesk.kv.delete(key);
    const response = try hotdesk.fetch(turn.id, turn.text, turn.extra, try hotdesk.complete(turn.text));
    return hotdesk.answer("{s}", .{response.body});
}

pub const tools = [_]hotdesk.Tool{.{ .name = "tool", .description = "", .parameters = "{}" }};

pub fn callTool(_: Text, arguments: Text) ![]const u8 {
    return arguments;
}

pub fn receive(request: hotdesk.Request) !hotdesk.Intake {
    return .{ .answer = hotdesk.response(200, request.body) };
}

pub fn deliver(_: Text, reply: hotdesk.Reply) !void {
    return hotdesk.fail("{s}", .{reply.text});
}

pub fn onEvent(name: Text, _: Text) void {
    hotdesk.log(.debug, name, .{});
}

pub fn setup(_: Text) !void {}

comptime {
    hotdesk.plugin(@This());
}
"""


@pytest.mark.parametrize(
    ("language", "ensure", "plugin"),
    [("c", c.ensure, EVERYTHING_IN_C), ("zig", zig.ensure, EVERYTHING_IN_ZIG)],
    ids=["c", "zig"],
)
def test_bindings_kept_by_hand_fit_the_whole_contract(
    tmp_path: Path, language: str, ensure: Callable[[], Mapping[str, str]], plugin: str
) -> None:
    """A plugin that uses all of a language's thin layer becomes a component of the whole contract: every function, on
    either side, with the signature that wasm-tools works out from the WIT."""
    env = environment(ensure)
    shutil.copytree(SDK / language / "template" / "all", tmp_path, dirs_exist_ok=True)
    for file in (SDK / language).glob("hotdesk.*"):
        shutil.copy(file, tmp_path)
    shutil.copytree(NEWEST, tmp_path / "wit" / "deps" / "hotdesk-plugin")
    world = f"package author:plugin;\nworld plugin {{ include hotdesk:plugin/full-plugin@{NEWEST.name}; }}\n"
    (tmp_path / "wit" / "world.wit").write_text(world, "utf-8")
    (tmp_path / f"plugin.{language}").write_text(plugin, "utf-8")
    made = subprocess.run(["make", "-s"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    assert not made.stderr, "the thin layer compiles without a warning"
    component = resolved(tmp_path / "plugin.wasm")
    for side in ("imports", "exports"):
        assert interfaces(component, "root", side) == interfaces(resolved(NEWEST), "full-plugin", side)


def names_in(source: str, pattern: str) -> list[str]:
    """The names of a declaration's fields or cases, as the WIT would write them."""
    found = re.search(pattern, source, re.DOTALL)
    assert found, f"nothing like {pattern}"
    body = re.sub(r"//[^\n]*|/\*.*?\*/|:[^,\n]*|=[^,\n]*", "", found[1])
    names = re.findall(r"(\w+)\s*(?:[,;]|$)", body.strip())
    return [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().replace("_", "-") for name in names]


def test_the_names_in_c_are_in_the_order_of_the_contract() -> None:
    """Text is text to the ABI: that no two fields or cases are mixed up is seen in their names alone."""
    header, body = ((SDK / "c" / name).read_text("utf-8") for name in ("hotdesk.h", "hotdesk.c"))
    wit = contract()
    for record in ("turn", "reply", "tool", "request", "inbound", "response"):
        assert names_in(header, rf"typedef struct {{([^}}]*)}} hd_{record};") == wit["record"][record]
    assert names_in(header, r"typedef struct {([^}]*)} hd_piece;") == [*wit["record"]["piece"], "error"]
    assert names_in(header, r"hd_hand_over\(([^)]*)\)") == wit["record"]["handover"]
    assert names_in(body, r"enum { (NEXT[^}]*) }") == [*wit["variant"]["decision"], "failed"]
    errors = [f"hd-{case}" for case in wit["variant"]["error"]]
    assert names_in(header, r"typedef enum { ([^}]*) } hd_why;") == ["hd-ok", *errors]
    assert names_in(header, r"typedef enum { ([^}]*) } hd_level;") == [f"hd-{case}" for case in wit["enum"]["level"]]


def test_the_names_in_zig_are_in_the_order_of_the_contract() -> None:
    """The same for Zig."""
    source = (SDK / "zig" / "hotdesk.zig").read_text("utf-8")
    wit = contract()
    for record in ("turn", "reply", "handover", "piece", "tool", "request", "inbound", "response"):
        assert names_in(source, rf"pub const {record.title()} = struct {{(.*?)}};\n") == wit["record"][record]
    for record in ("response", "inbound", "tool"):
        assert names_in(source, rf"const Raw{record.title()} = extern struct {{(.*?)}};\n") == wit["record"][record]
    assert names_in(source, r"pub const Decision = union\(enum\(u8\)\) {([^}]*)};") == wit["variant"]["decision"]
    assert names_in(source, r"pub const Error = error{([^}]*)};") == wit["variant"]["error"]
    assert re.findall(r"=> error\.(\w+),", source) == re.findall(r"error{ ([^}]*) };", source)[0].split(", ")
    levels = [case.replace("error", "err") for case in wit["enum"]["level"]]
    assert names_in(source, r"pub const Level = enum\(u32\) {([^}]*)};") == levels
