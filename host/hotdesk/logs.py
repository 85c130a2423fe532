"""Logging: structlog events with fields, as JSON or for a terminal. Never customer text unless asked for."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

__all__ = ["Logger", "configure_logs", "get_log", "logs_are_for_people"]

Logger = Any


def configure_logs(format: str, level: str, **fields: object) -> None:
    """Set structlog up for the process. `auto` is console on a terminal and JSON elsewhere. Each line has *fields*."""

    def add_fields(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**fields, **event}

    format = "console" if logs_are_for_people(format) else "json"
    renderer: Any = (
        structlog.dev.ConsoleRenderer(pad_event_to=24) if format == "console" else structlog.processors.JSONRenderer()
    )
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        *([add_fields] if fields else []),
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if format == "json":
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # not PrintLogger, which writes a line and its end one after the other: workers share one stderr
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def logs_are_for_people(format: str) -> bool:
    """Whether lines go to a terminal rather than to a machine."""
    return format == "console" or (format == "auto" and sys.stderr.isatty())


def get_log(**fields: object) -> Logger:
    """A logger with *fields* bound."""
    return structlog.get_logger().bind(**fields)
