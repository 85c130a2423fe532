"""sdk/wit/README.md and the suite's section of sdk/python/README.md tell the truth, and what they show runs."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.wasm.built import ROOT, built
from tests.wasm.toolchains import Unavailable, wasm_tools

from hotdesk.config import SETTINGS, Config
from hotdesk.runtime import capabilities, sources, wasm, wasm_imports, wasm_operations
from hotdesk.runtime.wit_contract import EXPORTS, IMPORTS, VERSIONS
from hotdesk.runtime.wit_engine import MAX_STACK
from hotdesk_sdk import Manifest
from hotdesk_sdk.conformance import CASES
from hotdesk_sdk.testing import Desk

WIT = (ROOT / "sdk" / "wit" / "README.md").read_text()
SDK = (ROOT / "sdk" / "python" / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KIB, MIB = 1024, 1024 * 1024

pytestmark = pytest.mark.timeout(600)  # the first test of a language installs its tools and builds its plugin


def table(text: str, head: str) -> dict[str, str]:
    """The rows below a table's head, by their first cell."""
    rest = text.partition(f"| {head} |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in rest.splitlines()[2:]]
    return {row[0].strip("`"): " | ".join(row[1:]) for row in rows}


@pytest.mark.parametrize(("head", "contract"), [("export", EXPORTS), ("import", IMPORTS)])
def test_every_function_of_the_contract_is_in_its_table(head: str, contract: dict[str, dict[str, object]]) -> None:
    """An interface that comes or goes, and a function of one, fails here."""
    shown = {name: tuple(re.findall(r"`([a-z-]+)`", row.split(" | ")[0])) for name, row in table(WIT, head).items()}
    assert shown == {name: tuple(functions) for name, functions in contract.items()}


def test_every_limit_is_the_hosts() -> None:
    """Each number of the table is the one that the host has; each setting is one."""
    config, rows = Config(), table(WIT, "of")
    burst = f"{wasm_imports.LOG_RATE:g} a second, {wasm_imports.LOG_BURST:g} at once"
    assert [row.split(" | ")[0].rstrip(" |") for row in rows.values()] == [
        f"{sources.MAX_WASM_BYTES // MIB} MiB",
        f"{config.wasm_memory_mb} MiB",
        f"{MAX_STACK // KIB} KiB",
        f"{wasm.MAX_TABLE_ELEMENTS:,}",
        f"{config.wasm_output_bytes // MIB} MiB",
        f"{Manifest().timeout_ms} ms",
        f"{config.setup_timeout_s:g} s",
        f"{config.wasm_instances}",
        "1",
        burst,
        f"{wasm_imports.MAX_LOG_CHARS:,} characters",
        f"{capabilities.MAX_KEY_CHARS} characters",
        f"{wasm_imports.MAX_STATE_BYTES // KIB} KiB",
        f"{wasm_imports.MAX_STATE_TOTAL // KIB} KiB in all",
        f"{wasm_imports.MAX_DEPTH}",
        f"{capabilities.MAX_VALUE_BYTES // MIB} MiB",
        f"{wasm_operations.KV_RATE / KIB:g} KiB a second, {wasm_operations.KV_BURST / MIB:g} MiB at once",
        f"{wasm_operations.SEND_RATE:g} a second, {wasm_operations.SEND_BURST:g} at once",
        f"{capabilities.MAX_FETCHED_BYTES // MIB} MiB in {wasm_operations.HTTP_S:g} s",
    ]
    assert wasm.MAX_MEMORIES == 4
    assert wasm_imports.MAX_KEY_CHARS == capabilities.MAX_KEY_CHARS
    named = {name for row in rows.values() for name in re.findall(r"`(\w+)`", row)}
    assert named <= {*SETTINGS, "timeout_ms"}


def test_the_page_begins_with_the_newest_version() -> None:
    """The first contract that it names is the newest that the host speaks."""
    assert re.findall(r"`([^`]*/hotdesk\.wit)`", WIT)[0] == f"{VERSIONS[-1]}/hotdesk.wit"


async def test_a_language_that_is_not_listed(tmp_path: Path) -> None:
    """The world of the page is one, its commands make a component of a core module, and a host takes it."""
    blocks = dict(FENCE.findall(WIT))
    assert [*blocks] == ["wit", "sh"]
    shop = tmp_path / "shop"
    contract = shop / "wit" / "deps" / "hotdesk-plugin" / "hotdesk.wit"
    contract.parent.mkdir(parents=True)
    shutil.copy(ROOT / "sdk" / "wit" / VERSIONS[-1] / "hotdesk.wit", contract)
    (shop / "wit" / "world.wit").write_text(blocks["wit"])
    try:
        environment = {**os.environ, **wasm_tools.ensure()}
    except Unavailable as exc:
        pytest.skip(str(exc))
    dummy = "wasm-tools component embed --dummy wit --world plugin -o core.wasm"
    made = await asyncio.to_thread(run, ["sh", "-ec", f"{dummy}\n{blocks['sh']}"], shop, environment)
    assert made.returncode == 0, made.stderr
    async with Desk.with_plugin(shop) as desk:
        assert not await desk.say("hello")  # the dummy traps, and nobody else is there


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `orders/plugin.wasm`, of whichever language is to be had."""
    folder = tmp_path_factory.mktemp("author")
    reasons = []
    for language in ("c", "zig", "rust", "js"):
        try:
            shutil.copytree(built(language), folder / "orders")
        except Unavailable as exc:
            reasons.append(str(exc))
        else:
            return folder
    pytest.skip("; ".join(reasons))


def test_the_command_of_the_sdks_page(beside: Path) -> None:
    """As it stands there, it tries every claim."""
    [command] = [body.strip() for kind, body in FENCE.findall(SDK) if kind == "sh"]
    done = run([sys.executable, *command.split()[1:]], beside)
    assert done.stdout.splitlines()[-1] == f"{len(CASES)} of {len(CASES)} claims are kept", done.stdout + done.stderr
    assert done.returncode == 0


def test_the_test_of_the_sdks_page(beside: Path) -> None:
    """As it stands there, it passes."""
    [source] = [body for kind, body in FENCE.findall(SDK) if kind == "python" and "conformance" in body]
    (beside / "test_orders.py").write_text(source)
    options = ["-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = run([sys.executable, "-m", "pytest", *options, "test_orders.py"], beside)
    assert f"{len(CASES)} passed" in done.stdout, done.stdout + done.stderr


def test_every_word_of_a_desk_is_in_the_sdks_page() -> None:
    """What `Desk` has, its table has."""
    named = set(re.findall(r"`(\w+)(?:\(.*?\))?`", "\n".join(f"`{name}`" for name in table(SDK, "word"))))
    named |= {"call_tool"}  # beside `tools`
    assert named == {name for name in vars(Desk) if not name.startswith("_")} - {"with_plugin"}


def run(
    command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
