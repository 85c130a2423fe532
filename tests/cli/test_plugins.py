"""`hotdesk plugins`: what people and scripts read, and what they are told when it does not work."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys

import pytest
from tests.cli.stand_in import TOKEN, Hotdesk, StandIn, plugin

from hotdesk.cli.admin_client import AdminClient


@pytest.fixture
def env(stand_in: StandIn) -> dict[str, str]:
    """A host with one plugin that is well and one that is not."""
    stand_in.plugins = {
        "faq": plugin(
            "faq", config={"answers": "faq.toml"}, kept=[{"generation": 3, "version": "1.2.0", "hash": "ab"}]
        ),
        "pay": plugin(
            "pay",
            generation=2,
            failures=4,
            capabilities={"asked": ["kv", "llm"], "granted": ["kv"]},
            error={"message": "name 'x' is not defined", "file": "pay.py", "line": 3, "step": "load", "at": 1.0},
        ),
        "old": plugin("old", state="CLOSED", enabled=False, generation=None, hooks=[]),
    }
    return {"HOTDESK_URL": stand_in.url, "HOTDESK_ADMIN_TOKEN": TOKEN}


async def test_bare_plugins_lists_them_one_a_line(hotdesk: Hotdesk, env: dict[str, str]) -> None:
    """Piped: aligned, no colour, nothing cut, and every plugin's trouble below the table."""
    ran = await hotdesk("plugins", env=env)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split() == ["PLUGIN", "STATE", "GEN", "ORDER", "CALLS", "FAILED", "HOOKS"]
    assert lines[1].split() == ["faq", "ACTIVE", "3", "50", "12", "0", "respond"]
    assert lines[3].split() == ["old", "disabled", "-", "50", "12", "0", "-"]
    assert lines[4] == "pay: failed at load: name 'x' is not defined (pay.py:3); generation 2 goes on serving"
    assert lines[5] == 'pay: asks for llm, not granted; in hotdesk.toml: [plugins.pay] grant = ["kv", "llm"]'
    assert "\x1b" not in ran.out


async def test_json_is_the_hosts_own_answer(hotdesk: Hotdesk, env: dict[str, str], stand_in: StandIn) -> None:
    """Fields that this client has no use for are passed on; the option may stand before or behind the command."""
    stand_in.plugins["faq"]["something_new"] = [1]
    for args in (("plugins", "--json"), ("plugins", "list", "--json"), ("plugins", "--json", "list")):
        ran = await hotdesk(*args, env=env)
        assert json.loads(ran.out) == {"plugins": list(stand_in.plugins.values())}
    shown = await hotdesk("plugins", "show", "faq", "--json", env=env)
    assert json.loads(shown.out)["something_new"] == [1]


async def test_show_tells_everything_about_one(hotdesk: Hotdesk, env: dict[str, str]) -> None:
    ran = await hotdesk("plugins", "show", "faq", env=env)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "faq 1.2.0  ACTIVE  generation 3"
    for words in ("source    plugins/faq", "order     50 (default)", "generation 3  1.2.0", 'answers = "faq.toml"'):
        assert words in ran.out


async def test_on_a_terminal_the_table_has_colours(env: dict[str, str], tmp_path: object) -> None:
    """A green ACTIVE, and no line wider than the terminal."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hotdesk", "plugins", stdout=theirs, env=os.environ | env | {"TERM": "xterm-256color"}
    )
    os.close(theirs)
    assert await process.wait() == 0
    out = os.read(ours, 65536).decode()
    os.close(ours)
    assert "\x1b[32mACTIVE" in out


@pytest.mark.parametrize("action", ["reload", "enable", "disable", "rollback"])
async def test_an_action_is_asked_of_the_host(
    hotdesk: Hotdesk, env: dict[str, str], stand_in: StandIn, action: str
) -> None:
    steps = {"settle_ms": 2, "load_ms": 6, "setup_ms": 0, "probe_ms": 0, "swap_ms": 0, "total_ms": 21}
    stand_in.plugins["faq"]["receipt"] = {"plugin": "faq", "from": 2, "to": 3, "steps": steps}
    ran = await hotdesk("plugins", action, "faq", env=env)
    assert (ran.code, stand_in.acts) == (0, [("faq", action)])
    assert ("faq is disabled" if action == "disable" else "faq 2 → 3 live in 21 ms") in ran.out


async def test_a_refused_action_says_why_and_exits_1(hotdesk: Hotdesk, env: dict[str, str], stand_in: StandIn) -> None:
    stand_in.plugins["faq"]["refuses"] = "plugin 'faq': unexpected indent (faq.py:3)"
    ran = await hotdesk("plugins", "reload", "faq", env=env)
    assert (ran.code, ran.out) == (1, "")
    assert "unexpected indent (faq.py:3)" in ran.err


async def test_an_unknown_plugin_lists_the_known_ones(hotdesk: Hotdesk, env: dict[str, str]) -> None:
    ran = await hotdesk("plugins", "show", "faqq", env=env)
    assert ran.code == 1
    assert "there is no plugin 'faqq'" in ran.err
    assert "Did you mean faq? The host knows: faq, old, pay." in ran.err


async def test_without_the_right_token_it_says_where_to_get_it(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    wanting = await hotdesk("plugins", "--url", stand_in.url)
    assert wanting.code == 1
    assert "wants its admin token" in wanting.err
    assert "HOTDESK_ADMIN_TOKEN" in wanting.err
    wrong = await hotdesk("plugins", "list", "--url", stand_in.url, "--token", "guess")
    assert wrong.code == 1
    assert "does not know this admin token" in wrong.err


async def test_no_host_is_exit_code_3(hotdesk: Hotdesk) -> None:
    ran = await hotdesk("plugins", "--url", "http://127.0.0.1:9")
    assert ran.code == 3
    assert "no host answers at http://127.0.0.1:9 (connection refused)" in ran.err
    assert "hotdesk run" in ran.err


async def test_a_url_that_is_none_is_exit_code_2(hotdesk: Hotdesk) -> None:
    assert (await hotdesk("plugins", "--url", "localhost")).code == 2


async def test_a_stranger_at_the_url_is_told_apart(hotdesk: Hotdesk, stand_in: StandIn) -> None:
    """Some other server answers there: not a traceback, and not "unknown plugin"."""
    ran = await hotdesk("plugins", "--url", f"{stand_in.url}/elsewhere")
    assert ran.code == 3
    assert "is no hotdesk host" in ran.err


async def test_a_name_where_a_command_should_be_is_explained(hotdesk: Hotdesk) -> None:
    ran = await hotdesk("plugins", "faq")
    assert ran.code == 2
    assert "hotdesk plugins show faq" in ran.err


async def test_events_come_as_they_are_told(stand_in: StandIn) -> None:
    async with AdminClient(stand_in.url, TOKEN) as client:
        assert [event async for event in client.events()] == [{"kind": "plugin_loaded", "plugin": "faq"}]
