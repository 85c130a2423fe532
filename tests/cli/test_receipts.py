"""What happened, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from hotdesk.cli.receipts import event_line, receipt_line

RECEIPT: dict[str, Any] = {
    "plugin": "faq",
    "from": 3,
    "to": 4,
    "source": "plugins/faq.py",
    "steps": {
        "settle_ms": 2.1,
        "load_ms": 6.4,
        "setup_ms": 0.2,
        "probe_ms": 0.0,
        "swap_ms": 0.05,
        "total_ms": 20.9,
    },
    "drained": 2,
    "first_answer_ms": 24.4,
}


def test_a_receipt_is_one_readable_line() -> None:
    assert receipt_line(RECEIPT) == (
        "faq 3 → 4 live in 21 ms (settle 2, load 6, setup 0, probe 0, swap 0) · first answer 24 ms · 2 turns drained"
    )


def test_a_receipt_leaves_out_what_it_does_not_know() -> None:
    """A first load has no generation before it, and a receipt is told before the first answer and the drain."""
    first = RECEIPT | {"from": None, "to": 1, "first_answer_ms": None, "drained": None, "steps": {"total_ms": 9.0}}
    assert receipt_line(first) == "faq 1 live in 9 ms"


def test_a_long_wait_for_the_first_answer_is_told_in_seconds() -> None:
    """Nobody need have asked for a while."""
    assert "first answer 1,048 s" in receipt_line(RECEIPT | {"first_answer_ms": 1_047_825.0})


def test_one_turn_is_singular() -> None:
    assert receipt_line(RECEIPT | {"drained": 1}).endswith("1 turn drained")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"kind": "plugin_loaded", "plugin": "faq", "generation": 1}, "faq 1 live"),
        ({"kind": "plugin_swapped", "plugin": "faq", "receipt": RECEIPT}, receipt_line(RECEIPT)),
        (
            {"kind": "plugin_receipt", "plugin": "faq", "receipt": RECEIPT},
            "faq 3 → 4 first answer 24 ms after the change, live in 21 ms",
        ),
        (
            {
                "kind": "plugin_failed",
                "plugin": "faq",
                "step": "load",
                "message": "plugin 'faq': unexpected indent (plugins/faq.py:3)",
                "file": "plugins/faq.py",
                "line": 3,
                "serving": 2,
            },
            "faq failed at load: unexpected indent (plugins/faq.py:3); generation 2 goes on serving",
        ),
        (
            {"kind": "plugin_failed", "plugin": "faq", "error": {"message": "no", "file": "a.py", "line": 1}},
            "faq failed: no (a.py:1)",
        ),
        (
            {"kind": "plugin_rolled_back", "plugin": "faq", "from": 5, "to": 4, "message": "KeyError"},
            "faq 5 → 4 rolled back: KeyError",
        ),
        (
            {"kind": "plugin_rolled_back", "plugin": "faq", "from": 5, "to": 6, "message": "rolled back by command"},
            "faq 5 → 6 rolled back by command",
        ),
        ({"kind": "plugin_unloaded", "plugin": "faq", "generation": 4}, "faq 4 unloaded"),
        ({"kind": "plugin_disabled", "plugin": "faq"}, "faq disabled"),
        ({"kind": "plugin_configured", "plugin": "faq", "generation": 4}, "faq 4 took its new config without a swap"),
        (
            {"kind": "plugin_leftover", "plugin": "faq", "generation": 4, "leftovers": ["task x", "thread y"]},
            "faq 4 left behind: task x, thread y",
        ),
        (
            {"kind": "capability_denied", "plugin": "faq", "generation": 2, "capability": "kv"},
            "faq 2 used kv, which it was not granted or did not ask for",
        ),
        ({"kind": "loop_stalled", "plugin": "faq", "ms": 240.2}, "faq held the event loop for 240 ms"),
        ({"kind": "loop_stalled", "plugin": None, "ms": 240.2}, "something held the event loop for 240 ms"),
        (
            {"kind": "breaker_opened", "plugin": "faq"},
            "faq breaker open: it is left out of turns until a trial call succeeds",
        ),
        ({"kind": "breaker_closed", "plugin": "faq"}, "faq breaker closed: it takes part in turns again"),
        (
            {"kind": "plugin_pending", "plugin": "faq"},
            "faq has changed; it waits for `hotdesk plugins reload faq`",
        ),
        (
            {"kind": "plugin_waiting", "plugin": "faq", "waiting_for": "lexicon"},
            "faq waits for lexicon, which it requires",
        ),
        (
            {"kind": "settings_failed", "file": "hotdesk.toml", "message": "setting 'port' is 'x'"},
            "settings not taken: setting 'port' is 'x' (hotdesk.toml); the ones from before stay",
        ),
        ({"kind": "moon_rose", "phase": "full", "at": 1.0}, "moon_rose phase=full"),
        ({}, "event"),
    ],
    ids=lambda value: value.get("kind", "nothing") if isinstance(value, dict) else "",
)
def test_every_event_has_its_line(event: dict[str, Any], line: str) -> None:
    assert event_line(event) == line


def test_a_line_stays_one_line_and_does_not_steer_the_terminal() -> None:
    """An exception's text is a plugin's, and may hold anything."""
    line = event_line({"kind": "plugin_failed", "plugin": "faq", "message": "two\nlines \x1b[31mred"})
    assert line == "faq failed: two lines  [31mred"
