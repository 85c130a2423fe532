"""host/README.md tells the truth: every setting, metric, error code, frame and event is in it, and its commands run."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo
from hotdesk.config import LLM_SETTINGS, SETTINGS, Config, ModelSettings
from hotdesk.errors import DOOR_ERRORS
from hotdesk.runtime.active import PluginState

ROOT = Path(__file__).parents[2]
HOST = ROOT / "host" / "hotdesk"
README = (ROOT / "host" / "README.md").read_text()
DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Config)}


def section(title: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"there is no section '{title}'"
    return found[1]


def rows(title: str, column: str) -> dict[str, str]:
    """The table of a section whose first column is *column*: the first cell's name, and the rest of its row."""
    _, head, rest = section(title).partition(f"| {column} |")
    assert head, f"section '{title}' has no table of {column}s"
    found = {}
    for line in rest.split("\n\n", 1)[0].splitlines()[2:]:
        name, _, row = line.removeprefix("| ").partition(" | ")
        found[name.strip("`")] = row
    return found


def test_every_setting_has_its_row_with_its_default() -> None:
    """A setting that is missing, gone, or has another default fails here."""
    table = rows("Settings", "setting")
    assert tuple(table) == SETTINGS
    shown = {name: row.partition(" | ")[0].strip("`") for name, row in table.items()}
    assert shown == {name: json.dumps(DEFAULTS[name]) for name in SETTINGS}


def test_every_setting_of_a_language_model_has_its_row_with_its_default() -> None:
    """As for the host's own settings; what is unset is null."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(ModelSettings)}
    defaults |= {field.name: {} for field in msgspec.structs.fields(ModelSettings) if field.name in ("headers", "body")}
    table = rows("Language models", "llm setting")
    shown = {name: row.partition(" | ")[0].strip("`") for name, row in table.items()}
    assert shown == {name: json.dumps(defaults[name]) for name in LLM_SETTINGS}


def test_every_setting_is_in_the_file_that_init_writes() -> None:
    """`hotdesk init` shows every setting too."""
    template = (HOST / "cli" / "templates" / "hotdesk.toml").read_text()
    named = set(re.findall(r"^# (\w+) = ", template, re.MULTILINE))
    assert {"plugins" if name == "plugin_folders" else name for name in named} >= set(SETTINGS)


def test_every_error_code_has_its_row_with_its_status() -> None:
    """Code, status and meaning are those of DOOR_ERRORS, in its order."""
    assert rows("Errors", "code") == {code: f"{status} | {text} |" for code, (status, text) in DOOR_ERRORS.items()}


async def test_every_metric_has_its_row(desk: Desk) -> None:
    """What /metrics shows of hotdesk's own is what the table has, no more and no less."""
    async with desk.http.get(f"{desk.url}/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    served = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if family.name.startswith("hotdesk_") and not family.name.endswith("_created")
    }
    assert set(rows("Metrics", "metric")) == served


def test_every_frame_has_its_row() -> None:
    """The frame types that the door reads and writes, and the events of both streams, are in their tables."""
    source = "".join(path.read_text() for room in ("web", "chat") for path in (HOST / room).glob("*.py"))
    told = set(re.findall(r'Event\("(\w+)"', source)) | set(re.findall(r'cls\(\s*"(\w+)"', source))
    told |= set(re.findall(r'cls\("(\w+)" if [^"]*else "(\w+)"', source).pop())
    sent = set(re.findall(r'"type": ?"(\w+)"', source)) | set(re.findall(r'"type":"(\w+)"', source))
    taken = set(re.findall(r'frame\.type [!=]= "(\w+)"', source))
    sent -= {"text", "image_url", "function"}  # of the model's protocol
    events = set(rows("Server-sent events", "event"))
    frames = set(re.findall(r'^\| `\{"type": "(\w+)"', section("WebSocket frames"), re.MULTILINE))
    assert {"accepted", "chunk", "done", "error", "message", "reply"} <= told
    assert taken == {"message", "cancel", "ping"}
    assert told <= events
    assert sent | taken <= frames
    assert frames == {"message", "cancel", "ping", "accepted", "spooled", "chunk", "reply", "error", "pong"}


def test_every_admin_event_has_its_row() -> None:
    """Each kind of event that the host tells is in the table, and no other."""
    source = "".join(path.read_text() for path in HOST.rglob("*.py"))
    calls = re.findall(r"vents\.tell\(\s*(.*?)[,)]", source)
    assert set(rows("Admin API", "event")) == {kind for call in calls for kind in re.findall(r'"(\w+)"', call)} - {
        "open"
    }


def test_every_state_is_drawn() -> None:
    """Each state of a generation is in the picture and explained below it."""
    for state in PluginState:
        assert section("Generations").count(state.value) >= 2


async def test_every_admin_field_is_named(desk: Desk) -> None:
    """Each field that the admin API shows of a plugin is in its section."""
    named = set(re.findall(r"`(\w+)`", section("Admin API")))
    assert set(await desk.plugin("echo")) <= named


COMMANDS = [
    command.replace("\\\n", " ")
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for command in re.findall(r"^curl (?:.*\\\n)*.*$", block, re.MULTILINE)
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is needed to run the page's commands")
async def test_every_command_of_the_page_runs(start_desk: StartDesk) -> None:
    """Each curl, in the order of the page, is answered without an error; streams are cut after a second."""
    desk = await start_desk({"faq.py": echo(1)}, visitor_secret="a secret of the desk that is long enough")
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        line = command.replace("http://127.0.0.1:8080", desk.url).replace("curl ", "curl -sS --fail-with-body -m 1 ", 1)
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOTDESK_ADMIN_TOKEN": ADMIN_TOKEN},
        )  # fmt: skip
        out, err = await process.communicate()
        timed_out = process.returncode == 28 and "-N" in command
        assert process.returncode == 0 or timed_out, (line, out, err)
