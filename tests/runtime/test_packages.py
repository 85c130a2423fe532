"""Plugins that are packages: relative and lazy imports, dataclasses, tracebacks, each generation its own."""

from __future__ import annotations

import sys

from conftest import Desk, StartDesk, wait_until
from hotdesk.runtime.python import PREFIX

PACKAGE = {
    "shop/__init__.py": (
        "from hotdesk_sdk import hookimpl\n\n"
        "from . import prices\nfrom .model import Order\nfrom .deep.er import depth\n\n"
        "@hookimpl\nasync def respond(turn):\n"
        "    if turn.text == 'lazy':\n"
        "        from .lazily import WORD\n        from .deep import lazier\n"
        "        return f'{WORD} {lazier.WORD} {lazier.Order is Order}'\n"
        "    if turn.text == 'fail':\n        prices.fail()\n"
        "    return f'{Order(prices.price(turn.text))} {depth()}'\n"
    ),
    "shop/model.py": (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom enum import Enum\n"
        "from typing import NamedTuple, get_type_hints\n\n"
        "class Kind(Enum):\n    PLAIN = 1\n\n"
        "class Pair(NamedTuple):\n    a: int\n\n"
        "@dataclass(frozen=True, slots=True)\nclass Order:\n    total: int\n    kind: Kind = Kind.PLAIN\n"
        "    pair: Pair = field(default=Pair(1))\n    def __str__(self):\n"
        "        return f'{self.total} {self.kind.name} {get_type_hints(Order)[\"kind\"] is Kind}'\n"
    ),
    "shop/prices.py": (
        "TABLE = {'tea': 3}\n\ndef price(name):\n    return TABLE.get(name, 0)\n\n\n"
        "def fail():\n    raise LookupError('no price')\n"
    ),
    "shop/lazily.py": "WORD = 'late'\n",
    "shop/deep/__init__.py": "",
    "shop/deep/er.py": (
        "from .. import prices\nfrom ..model import Order\n\ndef depth():\n    return len(prices.TABLE)\n"
    ),
    "shop/deep/lazier.py": "from ..model import Order\nWORD = 'later'\n",
}


async def test_a_package_imports_its_own(start_desk: StartDesk) -> None:
    """Relative imports of modules and subpackages work, dataclasses and type hints with them."""
    desk = await start_desk(PACKAGE)
    assert await desk.reply("tea") == "3 PLAIN True 1"


async def test_a_submodule_may_be_imported_late(start_desk: StartDesk) -> None:
    """An import inside a hook finds the generation's own modules, also after the files are changed or gone."""
    desk = await start_desk(PACKAGE, watch="frozen")
    (desk.folder / "shop" / "lazily.py").write_text("WORD = 'of the next version'\n")
    (desk.folder / "shop" / "deep" / "lazier.py").unlink()
    assert await desk.reply("lazy") == "late later True"


async def test_each_generation_has_its_own_modules(start_desk: StartDesk) -> None:
    """A changed submodule is loaded anew with all others of its package, and the old ones go."""
    desk = await start_desk(PACKAGE)
    desk.write("shop/prices.py", PACKAGE["shop/prices.py"].replace("3", "4"))
    await desk.wait_generation("shop", 2)
    assert await desk.reply("tea") == "4 PLAIN True 1"
    await desk.reply("lazy")

    def modules() -> list[str]:
        return sorted({name.partition(".")[0] for name in sys.modules if name.startswith(PREFIX)})

    await wait_until(lambda: len(modules()) == 1, "the old modules are gone")
    assert not [name for name in sys.modules if name == "shop" or name.startswith("shop.")]
    assert not list(desk.folder.rglob("__pycache__"))


async def failure(desk: Desk, text: str) -> str:
    """What the log of a failed call points at, as the operator sees it after a rollback."""
    desk.write("shop/prices.py", PACKAGE["shop/prices.py"] + "\n")
    await desk.wait_generation("shop", 2)
    await desk.reply(text)
    return str((await desk.plugin("shop"))["error"]["message"])


async def test_a_failure_names_file_and_line_of_the_submodule(start_desk: StartDesk) -> None:
    """An exception deep in a package is reported with the innermost file of the plugin, and its line."""
    desk = await start_desk(PACKAGE, standby_s=5.0)
    message = await failure(desk, "fail")
    assert f"LookupError: no price ({desk.folder / 'shop' / 'prices.py'}:8)" in message


async def test_a_submodule_that_does_not_parse_is_named(start_desk: StartDesk) -> None:
    """A syntax error in any file of a package, imported or not, refuses the version with that file and line."""
    desk = await start_desk(PACKAGE)
    desk.write("shop/lazily.py", "WORD = 1\nWORD = (\n")
    failed = await desk.wait_event("plugin_failed", plugin="shop")
    assert (failed["step"], failed["file"], failed["line"]) == ("parse", str(desk.folder / "shop" / "lazily.py"), 2)
    assert await desk.reply("lazy") == "late later True"


async def test_an_import_that_fails_is_named_where_it_stands(start_desk: StartDesk) -> None:
    """A missing name in a submodule, and an import by the plugin's own name, are told with the line and the remedy."""
    desk = await start_desk(PACKAGE)
    desk.write("shop/deep/er.py", "\nfrom ..prices import nothing\n")
    failed = await desk.wait_event("plugin_failed", plugin="shop")
    where = str(desk.folder / "shop" / "deep" / "er.py")
    assert (failed["step"], failed["file"], failed["line"]) == ("import", where, 2)
    desk.events.clear()
    desk.write("shop/deep/er.py", "\n\nfrom shop.prices import price\n")
    failed = await desk.wait_event("plugin_failed", plugin="shop")
    assert (failed["file"], failed["line"]) == (where, 3)
    assert "from .module import" in failed["message"]


async def test_tracebacks_show_the_source_that_was_loaded(start_desk: StartDesk) -> None:
    """Also after the file is changed, a traceback has the right lines: those of the generation that failed."""
    source = (
        "import traceback\nfrom hotdesk_sdk import hookimpl\n\n"
        "def inner():\n    raise ValueError  # the line that failed\n\n"
        "@hookimpl\nasync def respond(turn):\n    try:\n        inner()\n"
        "    except ValueError:\n        return traceback.format_exc()\n"
    )
    desk = await start_desk({"bot.py": source}, watch="frozen")
    (desk.folder / "bot.py").write_text("\n" * 20 + "something else\n")
    text = await desk.reply()
    assert text is not None
    assert "the line that failed" in text
    assert f'{desk.folder / "bot.py"}", line 5, in inner' in text


async def test_plugins_of_one_name_part_are_told_apart(start_desk: StartDesk) -> None:
    """Names that differ in a sign only, such as `a-b` and `a_b`, have modules of their own."""
    source = "from hotdesk_sdk import hookimpl\n@hookimpl\nasync def middleware(turn, call_next): return {!r}\n"
    desk = await start_desk({"a-b.py": source.format("minus"), "a_b.py": source.format("under")})
    assert await desk.reply() == "minus"
    await desk.admin("POST", "plugins/a-b/disable")
    assert await desk.reply() == "under"
