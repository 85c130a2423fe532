"""A plugin's tools, made ready when it is loaded: the schema checked once, the arguments checked at each call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import msgspec

from hotdesk_sdk import Tool

__all__ = ["LoadedTool", "load_tools"]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What the OpenAI protocol takes for the name of a function."""


@dataclass(frozen=True, slots=True)
class LoadedTool:
    """A tool with its schema compiled. `takes_turn`: its function wants the turn beside the arguments."""

    tool: Tool
    takes_turn: bool
    validator: Any
    parameters: frozenset[str] | None
    """The names that its function takes; None when it takes any."""

    @property
    def name(self) -> str:
        return self.tool.name

    def problem(self, arguments: Any) -> str | None:
        """What is wrong with *arguments*, so that whoever wrote them can mend it; None when they fit."""
        found = []
        for error in self.validator.iter_errors(arguments):
            where = ".".join(map(str, error.instance_path))
            found.append(f"{where}: {error.message}" if where else error.message)
        if not found and self.parameters is not None:  # a schema that leaves others open, and a function that does not
            found += [f"there is no argument '{name}'" for name in arguments if name not in self.parameters]
        return "; ".join(found[:5]) or None


def load_tools(given: object) -> list[LoadedTool]:
    """What a `tools` hook returned, ready to be called. Raises `ValueError` saying which tool is wrong, and why."""
    if given is None:
        return []
    if not isinstance(given, Sequence) or not all(isinstance(tool, Tool) for tool in given):
        raise ValueError("tools must return a list of hotdesk_sdk.Tool")
    names: set[str] = set()
    loaded = []
    for tool in given:
        if not isinstance(tool.name, str) or not NAME.fullmatch(tool.name):
            raise ValueError(f"a tool is named {tool.name!r}; a name is 1 to 64 of A-Z a-z 0-9 _ -")
        if tool.name in names:
            raise ValueError(f"two tools are named '{tool.name}'")
        names.add(tool.name)
        loaded.append(_load(tool))
    return loaded


def _load(tool: Tool) -> LoadedTool:
    schema = tool.parameters
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise ValueError(f'tool \'{tool.name}\': parameters is a JSON Schema with "type": "object"')
    try:
        msgspec.json.encode([tool.description, schema])
        validator = jsonschema_rs.validator_for(schema, offline=True)
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, TypeError, ValueError) as exc:
        text = str(exc).partition("\n")[0]
        raise ValueError(f"tool '{tool.name}': parameters is no JSON Schema: {text}") from exc
    if not callable(tool.call):
        raise ValueError(f"tool '{tool.name}': call is a {type(tool.call).__name__}; it is an async function")
    try:
        parameters = inspect.signature(tool.call).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    any_name = not parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    takes_turn = "turn" in parameters and "turn" not in schema.get("properties", {})
    return LoadedTool(tool, takes_turn, validator, None if any_name else frozenset(parameters))
