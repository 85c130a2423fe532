"""The names in Go's thin layer against the contract: text is text to the ABI, so nothing else tells them apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.wasm.test_wit import NEWEST, contract, resolved

pytestmark = pytest.mark.timeout(600)  # the first run on a machine builds wasm-tools

LAYER = Path(__file__).parents[2] / "sdk" / "go" / "hotdesk"
PLUGIN, IMPORTS, EXPORTS = ((LAYER / f"{name}.go").read_text("utf-8") for name in ("plugin", "imports", "exports"))


def body(source: str, pattern: str) -> str:
    found = re.search(pattern, source, re.DOTALL)
    assert found, f"nothing like {pattern}"
    return str(found[1])


def as_in_wit(names: Iterable[str]) -> list[str]:
    return [re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower() for name in names]


def fields_of(kind: str) -> list[str]:
    """The fields of a type that have its texts and numbers, in their order."""
    fields = []
    for line in re.split(r"[;\n]", body(PLUGIN, rf"type {kind} struct ?{{(.*?)}}\n")):
        if declared := re.fullmatch(r"([\w, ]+?)\s+(?:string|uint16)", line.strip()):
            fields += re.findall(r"\w+", declared[1])
    return as_in_wit(fields)


def used(function: str, variable: str) -> list[str]:
    """The fields of *variable* that an export hands over, in their order."""
    return as_in_wit(re.findall(rf"\b{variable}\.(\w+)", body(EXPORTS, rf"\nfunc {function}\((.*?)\n}}\n")))


def test_the_fields_in_go_are_in_the_order_of_the_contract() -> None:
    """What comes in is filled by position, in the type's order; what goes out is read field by field."""
    wit = contract()
    for record in ("turn", "reply", "tool", "request", "inbound", "response"):
        assert fields_of(record.title()) == wit["record"][record]
    assert used("receive", "message") == wit["record"]["inbound"]
    assert used("receive", "answer") == wit["record"]["response"]
    assert used("listTools", "tool") == wit["record"]["tool"]
    answered = re.findall(r"reply\.(\w+)", body(PLUGIN, r"\nfunc AnswerWith(.*?)\n"))
    assert as_in_wit(answered) == wit["record"]["reply"]
    assert re.findall(r"\w+", body(PLUGIN, r"\nfunc HandOver\((.*?) string\)")) == wit["record"]["handover"]
    piece = body(EXPORTS, r"okOr\(err, fields\((shown, .*?)\)").replace("shown", "text").split(", ")
    assert piece == wit["record"]["piece"]


def test_the_cases_in_go_are_in_the_order_of_the_contract() -> None:
    """Decisions by their number, errors and levels by their place."""
    wit = contract()
    made = re.findall(r"\nfunc (\w+)\([^{]*{ return Decision{(\d),", PLUGIN)
    plain = [("Next", "0"), *re.findall(r"(Leave) += Decision{tag: (\d)}", PLUGIN)]
    numbered = {int(number): name.removesuffix("With") for name, number in [*plain, *made]}
    assert "Next  = Decision{}" in PLUGIN
    assert as_in_wit(numbered[number] for number in range(len(numbered))) == wit["variant"]["decision"]
    assert re.findall(r'"([\w-]+)"', body(IMPORTS, r"var kinds = \[]string{(.*?)}")) == wit["variant"]["error"]
    levels = re.findall(r"\w+", body(IMPORTS, r"const \(\n\tDebug uint32 = iota\n(.*?)\)"))
    assert as_in_wit(["Debug", *levels]) == wit["enum"]["level"]


def test_the_arguments_in_go_are_in_the_order_of_the_contract() -> None:
    """Each import's, where it is declared and where it is called; `some` and the result's place are the ABI's."""
    document = resolved(NEWEST)
    functions = {
        f"{interface['name']} {name}": [one["name"] for one in function["params"]]
        for interface in document["interfaces"]
        for name, function in interface["functions"].items()
    }
    declared = re.findall(r"//go:wasmimport hotdesk:plugin/(\w+)@[\d.]+ (\S+)\nfunc (\w+)\((.*?)\)", IMPORTS)
    assert len(declared) == 14
    for interface, name, function, arguments in declared:
        given = [one.split()[0] for one in arguments.split(", ")] if arguments else []
        assert [one for one in given if one not in ("a", "at", "some")] == functions[f"{interface} {name}"]
        for call in re.findall(rf"\t{function}\((.*?)\)\n", IMPORTS):
            places = [one for one in call.split(", ") if one.isalpha()]
            wanted = ["chunk"] if name == "emit" else functions[f"{interface} {name}"]
            assert places == wanted[: len(places)], call
