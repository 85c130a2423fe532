"""Which failed requests are sent again, and when: the rules of the official client, held beside it by a test."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

__all__ = ["MAX_RETRY_AFTER_S", "may_retry", "retry_after"]

MAX_RETRY_AFTER_S = 120.0
"""A provider that wants a longer wait than this is not waited for; the official client's bound."""

RETRIED = frozenset({408, 409, 429})
"""The statuses below 500 that the official client tries again."""


def may_retry(status: int, headers: Mapping[str, str]) -> bool:
    """Whether a failed request may be sent again, by the official client's rules."""
    wait = retry_after(headers)
    if wait is not None and wait > MAX_RETRY_AFTER_S:
        return False
    said = headers.get("x-should-retry")
    if said in ("true", "false"):
        return said == "true"
    return status in RETRIED or status >= 500


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The provider's wish in seconds; `retry-after-ms` goes before `Retry-After`, which may be a date (RFC 9110)."""
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is not None:
            try:
                seconds = float(value) / divisor
            except ValueError:
                continue
            if math.isfinite(seconds):
                return seconds
            # digits without end are a wait that nobody keeps; "inf" and "nan" are no wait at all
            return MAX_RETRY_AFTER_S + 1 if seconds > 0 and any(map(str.isdigit, value)) else None
    return _until_date(headers.get("retry-after"))


def _until_date(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
