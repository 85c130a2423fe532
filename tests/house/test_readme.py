"""The README is a session that runs: every `$` line in order, its output compared, `…` standing for anything."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from tests.wasm.toolchains import Unavailable, js

from conftest import ADMIN_TOKEN, StartDesk, wait_until
from hotdesk.config import load_config

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("README.md", "[!.]*/README.md", "sdk/*/README.md", "examples/*/README.md")
    for page in ROOT.glob(pattern)
)


def steps(block: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that is shown under it."""
    found: list[tuple[str, str]] = []
    heredoc = ""
    for line in block.splitlines():
        if line.startswith("$ ") and not heredoc:
            found.append((line[2:], ""))
            if match := re.search(r"<<'(\w+)'$", line):
                heredoc = match[1]
        elif heredoc:
            found[-1] = (found[-1][0] + "\n" + line, "")
            heredoc = "" if line == heredoc else heredoc
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def matches(shown: str, real: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in shown.strip().split("…"))
    return re.fullmatch(pattern, real.strip(), re.S) is not None


@pytest.mark.parametrize(
    "about",
    ["Python", pytest.param("components", marks=pytest.mark.timeout(300))],  # those may install a toolchain
)
async def test_the_readme_runs(about: str, start_desk: StartDesk, tmp_path: Path) -> None:
    """Somebody who types what the README says sees what it shows."""
    plugins = tmp_path / "plugins"
    shutil.copytree(ROOT / "plugins", plugins, ignore=shutil.ignore_patterns("__pycache__"))
    desk = await start_desk(folder=plugins)
    blocks = [body for language, body in FENCE.findall((ROOT / "README.md").read_text()) if language == "console"]
    blocks = [block for block in blocks if ("--lang" in block) is (about == "components")]
    assert blocks
    toolchain: dict[str, str] = {}
    if about == "components":
        try:
            toolchain = await asyncio.to_thread(js.ensure)
        except Unavailable as exc:
            pytest.skip(str(exc))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{toolchain.get('PATH', os.environ['PATH'])}",
        "HOTDESK_URL": desk.url,
        "HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    for command, shown in [step for block in blocks for step in steps(block)]:
        if command.startswith("export "):
            continue
        changes = "plugins/" in command and not command.startswith("hotdesk")
        seen = sum(len(e.kept) + (e.problem is not None) + e.last_number for e in desk.host.plugins.entries)
        process = await asyncio.create_subprocess_shell(
            command.replace("http://127.0.0.1:8080", desk.url),
            cwd=tmp_path,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert matches(shown, out.decode()), f"$ {command}\n{out.decode()}\n-- the README shows:\n{shown}"
        if changes:
            await wait_until(
                lambda seen=seen: (
                    sum(len(e.kept) + (e.problem is not None) + e.last_number for e in desk.host.plugins.entries)
                    != seen
                ),
                f"the change of {command!r} to be taken or refused",
            )


@pytest.mark.parametrize("readme", ["README.md", "host/README.md"])
def test_the_settings_of_the_readmes_are_taken(readme: str, tmp_path: Path) -> None:
    """Every block of settings is a settings file."""
    blocks = [body for language, body in FENCE.findall((ROOT / readme).read_text()) if language == "toml"]
    assert blocks
    for block in blocks:
        file = tmp_path / "hotdesk.toml"
        file.write_text(block.replace("…", "key"))
        assert load_config({}, {}, file=str(file)).llm.models


def test_the_commands_of_the_readmes_are_there() -> None:
    """Every `make` target that a README names exists."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for readme in ROOT.glob("**/README.md"):
        if ".venv" not in readme.parts:
            named = set(re.findall(r"^    make (\w+)|`make (\w+)`", readme.read_text(), re.M))
            assert {a or b for a, b in named} <= targets, readme


def test_ci_says_make_test_like_the_readme() -> None:
    """CI runs the tests with the same words as the README."""
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(), re.M)
    assert "make test" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Of every link within the repository the file exists, and the heading where it names one."""
    for target in re.findall(r"\]\(([^):]*)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


async def test_the_sdk_readme_runs(tmp_path: Path) -> None:
    """The SDK's README shows a plugin and its test; the test passes."""
    blocks = [
        body for language, body in FENCE.findall((ROOT / "sdk/python/README.md").read_text()) if language == "python"
    ]
    for block in blocks:
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "test_hours.py"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    assert "1 passed" in out.decode()
