"""The host's tables of the contract say what the contract says."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.wasm.test_wit import NEWEST, pytestmark, resolved
from tests.wasm.test_wit import VERSIONS as FOLDERS

from hotdesk.runtime.wit_contract import EXPORTS, IMPORTS, PACKAGE, VERSION, VERSIONS, Function, words
from hotdesk_sdk.testing import Desk

__all__ = ["pytestmark"]

READS = """
from hotdesk_sdk import hookimpl
from hotdesk.runtime.wasm_hooks import turn_record

@hookimpl
async def respond(turn):
    return turn_record(turn)[3]
"""


def described(document: dict[str, Any], kind: Any) -> str:
    """A type of the resolved contract in the words that the host uses."""
    if kind is None:
        return "_"
    if isinstance(kind, str):
        return kind
    if isinstance(kind, int):
        return described(document, document["types"][kind]["kind"])
    [(what, inner)] = kind.items()
    if what == "type":
        return described(document, inner)
    if what == "record":
        fields = (f"{one['name']}:{described(document, one['type'])}" for one in inner["fields"])
        return "record{" + ",".join(fields) + "}"
    if what == "variant":
        cases = (
            one["name"] + (f"({described(document, one['type'])})" if one["type"] is not None else "")
            for one in inner["cases"]
        )
        return "variant{" + ",".join(cases) + "}"
    if what == "enum":
        return "enum{" + ",".join(one["name"] for one in inner["cases"]) + "}"
    if what == "result":
        return f"result<{described(document, inner.get('ok'))},{described(document, inner.get('err'))}>"
    return f"{what}<{described(document, inner)}>"


def test_the_tables_are_the_contract() -> None:
    """Every interface, function, parameter and result, and no others."""
    document = resolved(NEWEST)
    said = {}
    for interface in document["interfaces"]:
        if interface["functions"]:
            said[interface["name"]] = {
                name: (
                    [described(document, one["type"]) for one in function["params"]],
                    described(document, function.get("result")),
                )
                for name, function in interface["functions"].items()
            }
    tables: dict[str, dict[str, Function]] = {**EXPORTS, **IMPORTS}  # type: ignore[dict-item]
    ours = {
        interface: {
            name: ([words(one) for one in function.parameters], words(function.result))
            for name, function in functions.items()
        }
        for interface, functions in tables.items()
    }
    assert ours == said


def test_the_versions_are_the_folders() -> None:
    """What the host speaks is what lies in sdk/wit, in the order of the numbers, and it says the newest of itself."""
    assert tuple(folder.name for folder in FOLDERS) == VERSIONS
    assert f"package {PACKAGE}@{VERSION};" in (NEWEST / "hotdesk.wit").read_text()


async def test_the_extra_of_a_turn_is_what_the_contract_lists(tmp_path: Any) -> None:
    """No key is missing, and none is there that nobody can read about."""
    (tmp_path / "reads.py").write_text(READS)
    async with Desk.with_plugin(tmp_path / "reads.py") as desk:
        given = json.loads((await desk.say("hello", sender="ann")).text)
    text = (NEWEST / "hotdesk.wit").read_text()
    record = re.search(r"record turn \{(.*?)\n    \}", text, re.DOTALL)
    assert record is not None
    comment = record[1].rpartition("text: string,")[2]
    assert set(re.findall(r"`(\w+)`", comment)) == given.keys()
