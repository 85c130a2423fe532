"""What sdk/wit says, as the host uses it: the interfaces of each version, their functions and types.

A test compares these tables with the WIT itself. A shape is a text for a plain type, else a tuple: see `wit_values`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["EXPORTS", "IMPORTS", "PACKAGE", "VERSION", "VERSIONS", "Function", "words"]

PACKAGE = "hotdesk:plugin"
VERSIONS = ("1.0.0",)
"""The versions of the contract that this host speaks, oldest first."""

VERSION = VERSIONS[-1]

Shape = Any


def _record(**fields: Shape) -> Shape:
    return ("record", tuple((name.replace("_", "-"), shape) for name, shape in fields.items()))


def _result(fine: Shape, error: Shape) -> Shape:
    return ("result", fine, error)


TEXT = "string"
TURN = _record(id=TEXT, conversation=TEXT, text=TEXT, extra=TEXT)
REPLY = _record(text=TEXT, extra=TEXT)
HANDOVER = _record(reason=TEXT, text=TEXT)
DECISION: Shape = (
    "variant",
    {
        "next": None,
        "leave": None,
        "rewrite": TEXT,
        "answer": REPLY,
        "hand-over": HANDOVER,
        "drop": TEXT,
        "model": TEXT,
        "other": TEXT,
    },
)
ERROR: Shape = (
    "variant",
    dict.fromkeys(("denied", "invalid", "too-large", "timeout", "unavailable", "other"), TEXT),
)
TOOL = _record(name=TEXT, description=TEXT, parameters=TEXT, extra=TEXT)
REQUEST = _record(method=TEXT, path=TEXT, query=TEXT, headers=TEXT, body=TEXT, extra=TEXT)
INBOUND = _record(conversation=TEXT, text=TEXT, id=TEXT, extra=TEXT)
RESPONSE = _record(status="u16", headers=TEXT, body=TEXT, extra=TEXT)
INTAKE_RESULT = _record(messages=("list", INBOUND), answer=RESPONSE)
PIECE = _record(text=TEXT, held=TEXT)
LEVEL = ("enum", ("debug", "info", "warning", "error"))


class Function(NamedTuple):
    """A function's parameters and result; None for no result."""

    parameters: tuple[Shape, ...]
    result: Shape


DECIDES = _result(DECISION, TEXT)
FINE = _result(None, TEXT)

EXPORTS: Mapping[str, Mapping[str, Function]] = MappingProxyType(
    {
        "middleware": {"before": Function((TURN,), DECIDES), "after": Function((TURN, REPLY), DECIDES)},
        "chunks": {"transform": Function((TURN, TEXT, "bool"), _result(PIECE, TEXT))},
        "bot": {"respond": Function((TURN,), DECIDES)},
        "tools": {
            "list-tools": Function((), ("list", TOOL)),
            "call-tool": Function((TEXT, TEXT), _result(TEXT, TEXT)),
        },
        "intake": {"receive": Function((REQUEST,), _result(INTAKE_RESULT, TEXT))},
        "delivery": {"deliver": Function((TEXT, REPLY), FINE)},
        "events": {"on-event": Function((TEXT, TEXT), None)},
        "lifecycle": {
            "setup": Function((TEXT,), FINE),
            "configure": Function((TEXT,), _result("bool", TEXT)),
            "probe": Function((), FINE),
            "export-state": Function((), ("option", TEXT)),
            "import-state": Function((TEXT, TEXT), FINE),
        },
    }
)
"""The interfaces that a plugin may export."""

_FAILS = _result(None, ERROR)

IMPORTS: Mapping[str, Mapping[str, Function]] = MappingProxyType(
    {
        "base": {
            "log": Function((LEVEL, TEXT, TEXT), None),
            "config": Function((), TEXT),
            "time-left": Function((), "u32"),
            "emit": Function((TEXT,), _FAILS),
            "state-get": Function((TEXT,), _result(("option", TEXT), ERROR)),
            "state-set": Function((TEXT, ("option", TEXT)), _FAILS),
            "history": Function(("u32",), _result(TEXT, ERROR)),
            "send": Function((TEXT, TEXT), _result(TEXT, ERROR)),
        },
        "kv": {
            "get": Function((TEXT,), _result(("option", TEXT), ERROR)),
            "set": Function((TEXT, TEXT), _FAILS),
            "delete": Function((TEXT,), _FAILS),
            "keys": Function((TEXT,), _result(("list", TEXT), ERROR)),
        },
        "llm": {"complete": Function((TEXT,), _result(TEXT, ERROR))},
        "http": {"fetch": Function((TEXT, TEXT, TEXT, TEXT), _result(RESPONSE, ERROR))},
    }
)
"""The interfaces that the host offers."""


def words(shape: Shape) -> str:
    """A shape in the words that `wit_values.describe` uses for a reflected type."""
    if shape is None:
        return "_"
    if isinstance(shape, str):
        return shape
    kind, inner = shape[0], shape[1]
    if kind == "record":
        return "record{" + ",".join(f"{name}:{words(one)}" for name, one in inner) + "}"
    if kind == "variant":
        return "variant{" + ",".join(name + (f"({words(one)})" if one else "") for name, one in inner.items()) + "}"
    if kind == "enum":
        return "enum{" + ",".join(inner) + "}"
    if kind == "result":
        return f"result<{words(inner)},{words(shape[2])}>"
    return f"{kind}<{words(inner)}>"
