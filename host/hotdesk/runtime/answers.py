"""What an answer to a webhook or a page may be, whoever gave it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hotdesk_sdk import Answer

__all__ = ["check_answer"]

TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
"""What HTTP takes for a name (RFC 9110, section 5.6.2)."""

FRAMING = frozenset(["connection", "content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"])
"""Headers by which an answer could become two."""


def check_answer(answer: Answer) -> Answer:
    """*answer*, if HTTP can say it. Raises `ValueError`."""
    status, headers = answer.status, answer.headers
    if type(status) is not int or not 200 <= status <= 599:
        raise ValueError(f"an answer's status is {status!r}; there are 200 to 599"[:200])
    if not isinstance(headers, Mapping):
        raise ValueError(f"an answer's headers are a dict of texts, not a {type(headers).__name__}")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ValueError(f"an answer's header {str(name)[:50]!r} is not a text")
        if not TOKEN.fullmatch(name) or not (value.isprintable() and value.isascii()):
            raise ValueError(f"an answer's header {name[:50]!r} has what a header can't have")
        if name.lower() in FRAMING:
            raise ValueError(f"an answer's header {name!r} is the host's to set")
    return answer
