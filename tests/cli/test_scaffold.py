"""`hotdesk init` and `hotdesk new`: what they write works, and they write over nothing."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.cli.stand_in import Hotdesk

from hotdesk.cli.scaffold import new
from hotdesk.config import SETTINGS, Config, load_config

PLUGINS = Path(__file__).parents[2] / "plugins"
TEMPLATE = Path(__file__).parents[2] / "host/hotdesk/cli/templates/hotdesk.toml"

KINDS = ("bot", "middleware", "intake")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uncommented() -> str:
    """The settings template with every setting switched on; its prose, and the plugin tables, stay comments."""
    lines = TEMPLATE.read_text("utf-8").partition("# -- the plugins")[0].splitlines()
    return "\n".join(line.removeprefix("# ") if " = " in line.partition("  #")[0] else line for line in lines)


async def test_init_makes_a_desk_of_ones_own(hotdesk: Hotdesk, tmp_path: Path) -> None:
    """hotdesk.toml and the bundled plugins, without their tests and caches."""
    ran = await hotdesk("init", "desk")
    assert ran.code == 0, ran.err
    assert "cd desk\n  hotdesk run" in ran.out
    written = files(tmp_path / "desk")
    assert "hotdesk.toml" in written
    wanted = {f"plugins/{name}": content for name, content in files(PLUGINS).items() if "__pycache__" not in name}
    wanted = {name: content for name, content in wanted.items() if not Path(name).name.startswith(("test_", "."))}
    wanted.pop("plugins/conftest.py", None)
    assert {name: content for name, content in written.items() if name != "hotdesk.toml"} == wanted


async def test_init_writes_over_nothing(hotdesk: Hotdesk, tmp_path: Path) -> None:
    """One file in the way, and none is written."""
    (tmp_path / "hotdesk.toml").write_text("port = 1\n")
    ran = await hotdesk("init")
    assert ran.code == 1
    assert "hotdesk.toml" in ran.err
    assert files(tmp_path) == {"hotdesk.toml": b"port = 1\n"}


def test_the_settings_template_has_every_setting_and_its_default(tmp_path: Path) -> None:
    """Switching all of them on changes nothing."""
    file = tmp_path / "hotdesk.toml"
    file.write_text(uncommented())
    named = set(tomllib.loads(file.read_text()))
    assert named == {"plugin_folders" if name == "plugins" else name for name in SETTINGS}
    config, blank = load_config({}, {}, file=str(file)), Config()
    for name in SETTINGS:
        value, default = getattr(config, name), getattr(blank, name)
        if name in ("plugins", "data"):  # relative to the file
            value = (str(Path(value[0]).name),) if name == "plugins" else Path(value).name
        assert (name, value) == (name, default)


def test_the_settings_template_as_written_sets_nothing(tmp_path: Path) -> None:
    assert tomllib.loads(TEMPLATE.read_text("utf-8")) == {}


@pytest.mark.parametrize("kind", KINDS)
async def test_a_new_plugin_loads_and_its_test_passes(hotdesk: Hotdesk, tmp_path: Path, kind: str) -> None:
    """As generated, hyphen in its name included; its test needs pytest and nothing else."""
    made = await hotdesk("new", "my-plugin", "--kind", kind)
    assert made.code == 0, made.err
    folder = tmp_path / "plugins" / "my-plugin"
    assert set(files(folder)) == {"__init__.py", "plugin.toml", "test_my_plugin.py"}
    checked = await hotdesk("check", "plugins/my-plugin")
    assert checked.code == 0, checked.out
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=tmp_path,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()


@pytest.mark.parametrize("taken", ["plugins/faq.py", "plugins/faq/__init__.py", "plugins/faq.toml"])
async def test_new_writes_over_nothing(hotdesk: Hotdesk, tmp_path: Path, taken: str) -> None:
    """A name is taken by a file as well as by a folder."""
    (tmp_path / taken).parent.mkdir(parents=True)
    (tmp_path / taken).write_text("mine")
    ran = await hotdesk("new", "faq")
    assert ran.code == 1
    assert "is there already" in ran.err
    assert files(tmp_path) == {taken: b"mine"}


@pytest.mark.parametrize(("name", "words"), [("My FAQ!", "how about 'my-faq'?"), ("7", "NAME"), ("test_it", "a test")])
async def test_a_name_that_no_host_would_load_is_refused(hotdesk: Hotdesk, name: str, words: str) -> None:
    ran = await hotdesk("new", name)
    assert ran.code == 2
    assert words in ran.err


@pytest.mark.parametrize("kind", ["bot", "middleware", "intake"])
@pytest.mark.parametrize("lang", ["rust", "go", "js", "c", "zig", "python-wasm"])
def test_a_component_in_another_language(tmp_path: Path, lang: str, kind: str) -> None:
    """Its source, a Makefile, a page of its own, the contract; no placeholder is left, and nothing else of the SDK."""
    where = str(tmp_path / "plugins")
    ran = CliRunner().invoke(new, ["shop", "--lang", lang, "--kind", kind, "--dir", where])
    assert ran.exit_code == 0, ran.output
    folder = tmp_path / "plugins" / "shop"
    contract = Path(__file__).parents[2] / "sdk" / "wit" / "1.0.0" / "hotdesk.wit"
    assert (folder / "wit/deps/hotdesk-plugin/hotdesk.wit").read_bytes() == contract.read_bytes()
    assert {"Makefile", "README.md", "plugin.toml", "wit", ".gitignore"} <= {path.name for path in folder.iterdir()}
    assert tomllib.loads((folder / "plugin.toml").read_text())["name"] == "shop"
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmpl" or path.name == "template"]
    for path in folder.glob("plugin.*"):
        assert "$name" not in path.read_text()
    assert f"make -C {folder}" in ran.output
