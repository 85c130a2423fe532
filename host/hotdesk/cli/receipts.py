"""What happened to the plugins, one readable line each: receipts of swaps and the host's other events.

Plain text in, plain text out; whoever prints the line decides on colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["event_line", "one_line", "receipt_line"]

_STEPS = ("settle", "load", "setup", "probe", "swap")


def one_line(value: object) -> str:
    """*value* as text that stays on its line: control characters, a terminal's own among them, are dropped."""
    return "".join(c if c.isprintable() else " " for c in str(value)).strip()


def receipt_line(receipt: Mapping[str, Any]) -> str:
    """A receipt as `faq 3 → 4 live in 21 ms (settle 2, …) · first answer 24 ms · 2 turns drained`.

    What the receipt does not know (no answer yet, nothing to drain) is left out.
    """
    steps: Mapping[str, Any] = receipt.get("steps") or {}
    head = f"{_step(receipt)} live"
    if (total := steps.get("total_ms")) is not None:
        head += f" in {_ms(total)} ms"
    known = [f"{step} {_ms(steps[f'{step}_ms'])}" for step in _STEPS if steps.get(f"{step}_ms") is not None]
    parts = [f"{head} ({', '.join(known)})" if known else head]
    if (first := receipt.get("first_answer_ms")) is not None:
        parts.append(f"first answer {_span(first)}")
    if drained := receipt.get("drained"):
        parts.append(f"{drained} {'turn' if drained == 1 else 'turns'} drained")
    return " · ".join(parts)


def event_line(event: Mapping[str, Any]) -> str:
    """Any event of `GET /admin/events` as one line. A kind that is not known here shows its fields as they are."""
    kind = str(event.get("kind", "event"))
    say = _LINES.get(kind)
    if say is not None:
        return say(event)
    fields = " ".join(f"{key}={one_line(value)}" for key, value in event.items() if key not in ("kind", "at"))
    return f"{one_line(kind)} {fields}".rstrip()


def _ms(value: float) -> int:
    return round(value)


def _span(ms: float) -> str:
    """A time that may be long: nobody need have asked for a while."""
    return f"{_ms(ms)} ms" if ms < 10_000 else f"{ms / 1000:,.0f} s"


def _step(change: Mapping[str, Any]) -> str:
    """`faq 3 → 4`, or `faq 1` where nothing was before."""
    old, new = change.get("from"), change.get("to")
    return f"{one_line(change.get('plugin', '?'))} {new if old is None else f'{old} → {new}'}"


def _who(event: Mapping[str, Any]) -> str:
    """`faq`, or `faq 4` where the event is about one generation."""
    name = one_line(event.get("plugin") or "?")
    generation = event.get("generation")
    return name if generation is None else f"{name} {generation}"


def _why(event: Mapping[str, Any]) -> str:
    """The reason an event gives, with the step, the file and the line; empty when it gives none."""
    nested = event.get("error")
    error: Mapping[str, Any] = nested if isinstance(nested, Mapping) else event
    plain = nested if isinstance(nested, str) else event.get("reason")
    message = one_line(error.get("message") or plain or "")
    if not message:
        return ""
    # The host's own errors begin with the plugin's name, which the line has said already.
    message = message.removeprefix(f"plugin '{event.get('plugin')}': ")
    step = f" at {one_line(error['step'])}" if error.get("step") else ""
    place = ""
    if (file := error.get("file")) and str(file) not in message:
        place = f" ({one_line(file)}:{error['line']})" if error.get("line") else f" ({one_line(file)})"
    return f"{step}: {message}{place}"


def _live(event: Mapping[str, Any]) -> str:
    receipt = event.get("receipt")
    if isinstance(receipt, Mapping):
        return receipt_line(receipt)
    return receipt_line(event) if "to" in event else f"{_who(event)} live"


def _failed(event: Mapping[str, Any]) -> str:
    serving = event.get("serving")
    rest = f"; generation {serving} goes on serving" if serving is not None else ""
    return f"{_who(event)} failed{_why(event)}{rest}"


def _rolled_back(event: Mapping[str, Any]) -> str:
    step = _who(event) if event.get("to") is None else _step(event)
    why = _why(event)
    return f"{step} {why[2:]}" if why.startswith(": rolled back") else f"{step} rolled back{why}"


def _first_answer(event: Mapping[str, Any]) -> str:
    receipt: Mapping[str, Any] = event.get("receipt") or {}
    first, total = receipt.get("first_answer_ms"), (receipt.get("steps") or {}).get("total_ms")
    line = f"{_step(receipt)} first answer"
    if first is not None:
        line += f" {_span(first)} after the change"
    return line if total is None else f"{line}, live in {_ms(total)} ms"


def _pending(event: Mapping[str, Any]) -> str:
    name = one_line(event.get("plugin") or "?")
    return f"{name} has changed; it waits for `hotdesk plugins reload {name}`"


def _waiting(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} waits for {one_line(event.get('waiting_for', '?'))}, which it requires"


def _by(event: Mapping[str, Any]) -> str:
    return f", pushed by {one_line(event['by'])}" if event.get("by") else ""


def _push_taken(event: Mapping[str, Any]) -> str:
    name, version = one_line(event.get("plugin") or "?"), one_line(event.get("version") or "")
    return f"{name} {version} ({one_line(event.get('hash', '?'))}) is here{_by(event)}"


def _push_removed(event: Mapping[str, Any]) -> str:
    by = f" by {one_line(event['by'])}" if event.get("by") else ""
    return f"{_who(event)} was removed from all hosts{by}"


def _push_refused(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} was not taken{_why(event)}{_by(event)}"


def _settings_failed(event: Mapping[str, Any]) -> str:
    return f"settings not taken{_why({**event, 'plugin': None})}; the ones from before stay"


def _models(event: Mapping[str, Any]) -> str:
    return f"language model: {one_line(event.get('message', '?'))}"


def _unloaded(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} unloaded{_why(event)}"


def _disabled(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} disabled{_why(event)}"


def _configured(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} took its new config without a swap"


def _leftover(event: Mapping[str, Any]) -> str:
    left = event.get("leftovers") or event.get("what") or ()
    items = [left] if isinstance(left, str) else list(left)
    return f"{_who(event)} left behind: {', '.join(map(one_line, items)) or 'something unnamed'}"


def _denied(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} used {one_line(event.get('capability', '?'))}, which it was not granted or did not ask for"


def _stalled(event: Mapping[str, Any]) -> str:
    held = next((event[key] for key in ("ms", "stalled_ms", "blocked_ms") if event.get(key) is not None), None)
    time = f" for {_ms(held)} ms" if held is not None else ""
    return f"{_who(event) if event.get('plugin') else 'something'} held the event loop{time}{_why(event)}"


def _breaker_opened(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} breaker open: it is left out of turns until a trial call succeeds{_why(event)}"


def _breaker_closed(event: Mapping[str, Any]) -> str:
    return f"{_who(event)} breaker closed: it takes part in turns again"


def _worker(event: Mapping[str, Any]) -> str:
    return f"worker {event.get('worker', '?')}"


def _worker_ready(event: Mapping[str, Any]) -> str:
    return f"{_worker(event)} serves again (pid {event.get('pid')})"


def _worker_died(event: Mapping[str, Any]) -> str:
    wait = event.get("again_in_s")
    again = f"started again in {wait:g} s" if wait else "started again"
    return f"{_worker(event)} died: {one_line(event.get('message', '?'))} (pid {event.get('pid')}); {again}"


def _worker_replaced(event: Mapping[str, Any]) -> str:
    return f"{_worker(event)} replaced (pid {event.get('before')} → {event.get('pid')})"


def _restart_begun(event: Mapping[str, Any]) -> str:
    return f"restarting {event.get('workers')} workers, one by one"


def _restart_done(event: Mapping[str, Any]) -> str:
    message = one_line(event.get("message") or "")
    return f"all {event.get('workers')} workers replaced" + (f"; {message}" if message else "")


def _restart_failed(event: Mapping[str, Any]) -> str:
    where = f" at {_worker(event)}" if "worker" in event else ""
    return f"restart failed{where}: {one_line(event.get('message', '?'))}; the ones from before go on serving"


_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "plugin_loaded": _live,
    "plugin_swapped": _live,
    "plugin_receipt": _first_answer,
    "plugin_pending": _pending,
    "plugin_waiting": _waiting,
    "plugin_failed": _failed,
    "plugin_rolled_back": _rolled_back,
    "plugin_unloaded": _unloaded,
    "plugin_disabled": _disabled,
    "plugin_configured": _configured,
    "plugin_leftover": _leftover,
    "capability_denied": _denied,
    "loop_stalled": _stalled,
    "breaker_opened": _breaker_opened,
    "breaker_closed": _breaker_closed,
    "push_taken": _push_taken,
    "push_removed": _push_removed,
    "push_refused": _push_refused,
    "settings_failed": _settings_failed,
    "llm_configured": _models,
    "worker_ready": _worker_ready,
    "worker_died": _worker_died,
    "worker_replaced": _worker_replaced,
    "restart_begun": _restart_begun,
    "restart_done": _restart_done,
    "restart_failed": _restart_failed,
}
