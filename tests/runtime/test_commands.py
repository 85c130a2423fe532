"""The operator's hands: reload, enable, disable, rollback; settings that change; receipts; installed plugins."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk.app import Host, open_host
from hotdesk.config import Config, PluginSettings, load_config

HEAD = "import asyncio\nfrom hotdesk_sdk import hookimpl\n"

WORDED = (
    f"{HEAD}LOADS = []\n"
    "@hookimpl\nasync def respond(ctx, turn): return f'{ctx.generation} {ctx.config[\"word\"]}'\n"
)
CONFIGURED = f"{WORDED}@hookimpl\nasync def configure(ctx, config): return config['word'] != 'refused'\n"


async def say(desk: Desk, text: str | None) -> None:
    async def same() -> bool:
        return await desk.reply() == text

    await wait_until(same, f"the answer is {text}", timeout_s=3.0)


async def let_pass(seconds: float) -> None:
    """Let time go by, for a claim that something does not happen."""
    until = time.monotonic() + seconds
    await wait_until(lambda: time.monotonic() > until, f"{seconds} s")


def kinds(desk: Desk) -> list[str]:
    return [event["kind"] for event in desk.events]


# -- state -------------------------------------------------------------------------------------------------------


async def test_state_goes_over_a_swap_with_its_version(start_desk: StartDesk) -> None:
    """What the old generation exports the new one is given, together with the old one's manifest version."""
    source = (
        f"{HEAD}SEEN = []\n"
        "@hookimpl\nasync def export_state(ctx): return {'seen': SEEN, 'by': ctx.generation}\n"
        "@hookimpl\nasync def import_state(ctx, state, version): SEEN.extend(state['seen'] + [version, state['by']])\n"
        "@hookimpl\nasync def respond(turn):\n    SEEN.append(turn.text)\n    return str(SEEN)\n"
    )
    desk = await start_desk({"bot.py": source, "bot.toml": "version = '1.2.0'"})
    assert await desk.reply("a") == "['a']"
    desk.write("bot.toml", "version = '1.3.0'")
    await desk.wait_generation("bot", 2)
    assert await desk.reply("b") == "['a', '1.2.0', 1, 'b']"
    desk.write("bot.py", source + "\n")
    await desk.wait_generation("bot", 3)
    assert await desk.reply("c") == "['a', '1.2.0', 1, 'b', '1.3.0', 2, 'c']"


async def test_state_is_a_copy(start_desk: StartDesk) -> None:
    """The new generation gets the state as JSON says it, so the two never share an object."""
    source = (
        f"{HEAD}STATE = {{'n': 0, 'pair': (1, 2)}}\n"
        "@hookimpl\nasync def export_state(ctx): return STATE\n"
        "@hookimpl\nasync def import_state(ctx, state):\n    STATE.update(state)\n    state['n'] = 99\n"
        "@hookimpl\nasync def respond(turn):\n    await asyncio.sleep(0.2)\n    return str(STATE)\n"
    )
    desk = await start_desk({"bot.py": source}, standby_s=0.0)
    under_way = asyncio.create_task(desk.reply())
    await wait_until(lambda: desk.host.turns.live, "the turn runs")
    desk.write("bot.py", source + "\n")
    await desk.wait_generation("bot", 2)
    assert await under_way == "{'n': 0, 'pair': (1, 2)}"
    assert await desk.reply() == "{'n': 0, 'pair': [1, 2]}"


async def test_state_that_json_can_not_say_refuses_the_swap(start_desk: StartDesk) -> None:
    """The failure is the old generation's `export_state`, and it goes on serving."""
    source = f"{echo(1)}@hookimpl\nasync def export_state(ctx): return {{1: object()}}\n"
    taking = f"{echo(2)}@hookimpl\nasync def import_state(ctx, state): ...\n"
    desk = await start_desk({"bot.py": source})
    desk.write("bot.py", taking)
    assert (await desk.wait_event("plugin_failed", plugin="bot"))["step"] == "export_state"
    assert await desk.reply() == "1: hello"


# -- configuration -----------------------------------------------------------------------------------------------


async def test_a_changed_manifest_config_needs_no_swap(start_desk: StartDesk) -> None:
    """`[config]` of NAME.toml goes through `configure` where there is one: the same generation, the new config."""
    desk = await start_desk({"bot.py": CONFIGURED, "bot.toml": "[config]\nword = 'a'"})
    assert await desk.reply() == "1 a"
    desk.write("bot.toml", "[config]\nword = 'b'")
    await desk.wait_event("plugin_configured", plugin="bot", generation=1)
    assert await desk.reply() == "1 b"
    assert (await desk.plugin("bot"))["config"] == {"word": "b"}
    desk.write("bot.toml", "[config]\nword = 'refused'")
    await say(desk, "2 refused")
    assert kinds(desk).count("plugin_swapped") == 1


async def test_a_changed_manifest_config_swaps_where_nobody_takes_it(start_desk: StartDesk) -> None:
    """Without a `configure` hook the plugin is loaded anew with its new config."""
    desk = await start_desk({"bot.py": WORDED, "bot.toml": "[config]\nword = 'a'"})
    desk.write("bot.toml", "[config]\nword = 'b'")
    await say(desk, "2 b")


async def test_a_plugin_can_not_change_the_hosts_copy_of_its_config(start_desk: StartDesk) -> None:
    """What a generation does to `ctx.config` is gone with it."""
    source = WORDED.replace("return", "ctx.config['word'] += '!'; return")
    desk = await start_desk({"bot.py": source, "bot.toml": "[config]\nword = 'a'"})
    assert [await desk.reply(), await desk.reply()] == ["1 a!", "1 a!!"]
    desk.write("bot.py", source + "\n")
    await say(desk, "2 a!")


class SettingsDesk:
    """A host with a settings file, which tests change while it runs."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "hotdesk.toml"
        self.plugins = folder / "plugins"
        self.plugins.mkdir()
        self.events: list[dict[str, Any]] = []
        self.host: Host

    def settings(self, text: str) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(f'plugin_folders = ["plugins"]\nadmin_token = "{ADMIN_TOKEN}"\n{text}')
        fresh.replace(self.file)

    def start(self) -> Any:
        return open_host(
            load_config({"port": 0, "data": str(self.file.parent / "data")}, {}, file=str(self.file)),
            listen=self.events.append,
        )


async def test_settings_change_while_the_host_runs(tmp_path: Path) -> None:
    """`[plugins.NAME]`: config through `configure`; order, deadline and grants without loading; enabled at once."""
    desk = SettingsDesk(tmp_path)
    (desk.plugins / "bot.py").write_text(CONFIGURED)
    (desk.plugins / "bot.toml").write_text("capabilities = ['kv']\norder = 70\n[config]\nword = 'manifest'\nkept = 1")
    desk.settings("[plugins.bot]\nword = 'operator'\n")
    async with desk.start() as host, aiohttp.ClientSession() as http:
        shown = Desk(host, desk.plugins, http)
        assert (await shown.plugin("bot"))["config"] == {"word": "operator", "kept": 1}
        assert await shown.reply() == "1 operator"
        desk.settings("[plugins.bot]\nword = 'changed'\norder = 5\ntimeout_ms = 700\ngrant = ['kv']\n")
        await say(shown, "1 changed")
        plugin = await shown.plugin("bot")
        assert (plugin["order"], plugin["order_from"], plugin["timeout_ms"]) == (5, "operator", 700)
        assert plugin["capabilities"] == {"asked": ["kv"], "granted": ["kv"]}
        assert plugin["generation"] == 1
        desk.settings("[plugins.bot]\nenabled = false\n")
        await say(shown, None)
        desk.settings("[plugins.bot\nthis is not TOML")
        await wait_until(lambda: desk.events[-1]["kind"] == "settings_failed", "the broken file is told")
        desk.settings("")
        await say(shown, "2 manifest")
        plugin = await shown.plugin("bot")
        assert (plugin["order"], plugin["order_from"]) == (70, "manifest")
    assert [e["kind"] for e in desk.events].count("plugin_swapped") == 0


async def test_the_order_is_the_operators(start_desk: StartDesk) -> None:
    """Lower is further out; ties go by name; the reason is shown."""
    layer = (
        f"{HEAD}@hookimpl\nasync def middleware(ctx, turn, call_next):\n"
        "    r = await call_next(); r.text += ctx.plugin; return r\n"
    )
    desk = await start_desk(
        {"echo.py": echo(1), "b.py": layer, "c.py": layer, "d.py": layer, "d.toml": "order = 10"},
        settings={"b": PluginSettings(order=60)},
    )
    assert await desk.reply("x") == "1: xbcd"
    order = {p["name"]: p["order_from"] for p in (await desk.admin("GET", "plugins"))["plugins"]}
    assert list(order.items()) == [("d", "manifest"), ("c", "default"), ("echo", "default"), ("b", "operator")]


# -- commands ----------------------------------------------------------------------------------------------------


async def test_disabled_is_remembered_and_left_alone(tmp_path: Path) -> None:
    """A disabled plugin stays so over saves, config changes and a restart; enabling is remembered as well."""
    folder, data = tmp_path / "plugins", tmp_path / "data"
    for expected in ("CLOSED", "ACTIVE"):
        folder.mkdir(exist_ok=True)
        (folder / "echo.py").write_text(echo(1))
        async with _host(folder, data) as shown:
            if expected == "CLOSED":
                await shown.admin("POST", "plugins/echo/disable")
            else:
                assert (await shown.plugin("echo"))["state"] == "CLOSED"
                await shown.admin("POST", "plugins/echo/enable")
            plugin = await shown.plugin("echo")
            assert (plugin["state"], plugin["enabled"]) == (expected, expected == "ACTIVE")
            if expected == "CLOSED":
                shown.write("echo.py", echo(2))
                shown.write("echo.toml", "[config]\nx = 1")
                for action in ("reload", "rollback"):
                    error = await shown.admin("POST", f"plugins/echo/{action}", status=409)
                    assert error["error"]["code"] == "conflict"
                await let_pass(0.5)
                assert await shown.reply() is None
                await shown.admin("POST", "plugins/echo/disable")
    async with _host(folder, data) as shown:
        assert (await shown.plugin("echo"))["state"] == "ACTIVE"


@contextlib.asynccontextmanager
async def _host(folder: Path, data: Path) -> AsyncIterator[Desk]:
    config = Config(plugins=(str(folder),), data=str(data), port=0, admin_token=ADMIN_TOKEN)
    async with open_host(config) as host, aiohttp.ClientSession() as http:
        yield Desk(host, folder, http)


async def test_a_disabled_plugin_that_is_deleted_is_off_the_list(desk: Desk) -> None:
    """Its file gone, there is nothing left to enable."""
    await desk.admin("POST", "plugins/echo/disable")
    (desk.folder / "echo.py").unlink()
    await wait_until(lambda: not list(desk.host.plugins.entries), "it is off the list")
    await desk.admin("POST", "plugins/echo/enable", status=404)


async def test_rollback_goes_to_the_version_before(desk: Desk) -> None:
    """A rollback serves the earlier bytes as a generation of its own; the file is left as it is, and refused."""
    desk.write("echo.py", echo(2))
    await say(desk, "2: hello")
    shown = await desk.admin("POST", "plugins/echo/rollback")
    assert (shown["generation"], shown["state"], shown["error"]) == (3, "ACTIVE", None)
    assert await desk.reply() == "1: hello"
    rolled = await desk.wait_event("plugin_rolled_back", plugin="echo")
    assert (rolled["from"], rolled["to"]) == (2, 3)
    desk.write("echo.py", echo(2))
    await let_pass(0.4)
    assert await desk.reply() == "1: hello"
    desk.write("echo.py", echo(4))
    await say(desk, "4: hello")


async def test_there_may_be_nothing_to_roll_back_to(desk: Desk) -> None:
    """A plugin's first version has none before it: 409, and it goes on serving."""
    error = await desk.admin("POST", "plugins/echo/rollback", status=409)
    assert error["error"]["code"] == "conflict"
    await desk.admin("POST", "plugins/echo/reload")
    await desk.admin("POST", "plugins/echo/rollback", status=409)
    assert await desk.reply() == "1: hello"


async def test_so_many_versions_are_kept(start_desk: StartDesk) -> None:
    """`keep_generations` bounds how far a rollback reaches."""
    desk = await start_desk({"echo.py": echo(1)}, keep_generations=2)
    for version in (2, 3, 4):
        desk.write("echo.py", echo(version))
        await desk.wait_generation("echo", version)
    assert [kept["generation"] for kept in (await desk.plugin("echo"))["kept"]] == [3, 4]


@pytest.mark.parametrize("action", ["reload", "enable", "disable", "rollback"])
async def test_an_unknown_name_is_an_error(desk: Desk, action: str) -> None:
    """404 with the names there are; it never means all of them."""
    error = await desk.admin("POST", f"plugins/nobody/{action}", status=404)
    assert error["error"]["code"] == "plugin_not_found"
    assert "echo" in error["error"]["message"]
    assert await desk.reply() == "1: hello"


async def test_a_reload_insists(desk: Desk) -> None:
    """By command the same bytes are loaded again, as the next generation."""
    assert (await desk.admin("POST", "plugins/echo/reload"))["generation"] == 2


async def test_a_reload_that_fails_says_why(start_desk: StartDesk) -> None:
    """422 with the reason, file and line; what serves stays."""
    desk = await start_desk({"echo.py": echo(1)}, watch="frozen")
    desk.write("echo.py", "def broken(:\n")
    error = await desk.admin("POST", "plugins/echo/reload", status=422)
    assert "echo.py:1" in error["error"]["message"]
    assert await desk.reply() == "1: hello"


# -- receipts ----------------------------------------------------------------------------------------------------


async def test_a_receipt_has_all_its_fields(desk: Desk) -> None:
    """A swap says what it did: names, numbers, the time of each step, and when the new code first answered."""
    desk.write("echo.py", echo(2))
    swapped = await desk.wait_event("plugin_swapped", plugin="echo")
    receipt = swapped["receipt"]
    assert set(receipt) == {"plugin", "from", "to", "source", "steps", "drained", "first_answer_ms"}
    assert set(receipt["steps"]) == {"settle_ms", "load_ms", "setup_ms", "probe_ms", "swap_ms", "total_ms"}
    assert (receipt["plugin"], receipt["from"], receipt["to"]) == ("echo", 1, 2)
    assert receipt["source"] == str(desk.folder / "echo.py")
    assert (receipt["drained"], receipt["first_answer_ms"]) == (None, None)
    steps = dict(receipt["steps"])
    assert 0 < steps.pop("total_ms") - sum(steps.values()) < 50
    await desk.reply()
    told = await desk.wait_event("plugin_receipt", plugin="echo", receipt=(await desk.plugin("echo"))["receipt"])
    assert told["receipt"]["first_answer_ms"] > receipt["steps"]["total_ms"]

    async def drained() -> bool:
        return bool((await desk.plugin("echo"))["receipt"]["drained"] == 0)

    await wait_until(drained, "the old generation is drained")


# -- installed plugins -------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on `sys.path` with two distributions that have entry points: a good one and a broken one."""
    site = tmp_path / "site"
    (site / "installed_faq").mkdir(parents=True)
    (site / "installed_faq" / "__init__.py").write_text(
        f"from .words import WORD\n{HEAD}@hookimpl\nasync def respond(turn): return WORD\n"
    )
    (site / "installed_faq" / "words.py").write_text("WORD = 'installed'\n")
    info = site / "installed_faq-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-faq\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hotdesk]\nfaq = installed_faq\nbroken = installed_nowhere\n")
    monkeypatch.syspath_prepend(str(site))
    return site


async def test_an_installed_plugin_serves(site: Path, start_desk: StartDesk) -> None:
    """It is found through its entry point, loads from its own bytes, lists, disables and rolls like any other."""
    desk = await start_desk()
    assert await desk.reply() == "installed"
    shown = await desk.plugin("faq")
    assert (shown["source"], shown["generation"]) == (str(site / "installed_faq"), 1)
    assert "installed_faq" not in sys.modules
    await desk.admin("POST", "plugins/faq/disable")
    assert await desk.reply() is None
    await desk.admin("POST", "plugins/faq/enable")
    assert await desk.reply() == "installed"
    (site / "installed_faq" / "words.py").write_text("WORD = 'upgraded'\n")
    await let_pass(0.4)
    assert await desk.reply() == "installed"
    await desk.admin("POST", "plugins/faq/reload")
    assert await desk.reply() == "upgraded"
    await desk.admin("POST", "plugins/faq/rollback")
    assert await desk.reply() == "installed"


async def test_an_installed_plugin_that_is_broken_is_shown(site: Path, start_desk: StartDesk) -> None:
    """An entry point that leads nowhere is a failure with a name, not a silence; the others serve."""
    desk = await start_desk()
    shown = await desk.plugin("broken")
    assert (shown["state"], shown["error"]["step"]) == ("FAILED", "find")
    assert "installed_nowhere" in shown["error"]["message"]
    await desk.wait_event("plugin_failed", plugin="broken")


async def test_a_file_of_an_installed_plugins_name_is_a_clash(site: Path, start_desk: StartDesk) -> None:
    """The installed plugin keeps the name, and the file is told to be in the way."""
    desk = await start_desk({"faq.py": echo(1)})
    assert await desk.reply() == "installed"
    assert (await desk.plugin("faq"))["error"]["file"] == str(desk.folder / "faq.py")
    (desk.folder / "faq.py").unlink()

    async def clean() -> bool:
        return (await desk.plugin("faq"))["error"] is None

    await wait_until(clean, "the clash is over")
    assert await desk.reply() == "installed"
