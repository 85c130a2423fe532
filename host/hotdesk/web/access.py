"""Who may speak: origins, visitor tokens, rate limits, the admin token."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

import jwt
import msgspec
from aiohttp import web

from ..config import Config
from ..errors import BackendError, ConfigError, DoorError

__all__ = ["Access", "Keys", "Visitor", "keep_admin_token", "prepare_keys"]

MAX_BUCKETS = 50_000
"""Senders whose rate is remembered; beyond it the ones with their full allowance are forgotten, then the oldest."""


class Visitor(msgspec.Struct, frozen=True):
    """Who a token says is speaking, and until when (Unix seconds)."""

    id: str
    expires: float


class Keys(msgspec.Struct, frozen=True):
    """What every process of a desk checks tokens with. Made once; workers are given those of their supervisor."""

    admin_digest: str
    visitor_secret: str
    new_admin_token: str | None = None
    """A token that nobody has been shown yet."""

    def __repr__(self) -> str:
        return "<keys>"  # they may be logged


def prepare_keys(config: Config, before: Keys | None = None) -> Keys:
    """The keys of the settings, else those in the data folder, else new ones. Raises `ConfigError`, `BackendError`.

    With *before*, of a desk that runs, what is neither set nor kept stays as it was. One process at a time.
    """
    data = Path(config.data)
    secret = config.visitor_secret or (_kept_secret(data) if config.visitor_tokens else "")
    if config.admin_token:
        if len(config.admin_token) < 8:
            raise ConfigError("admin_token", "…", "start", "it must have at least 8 characters")
        return Keys(_digest(config.admin_token), secret)
    kept = data / "admin_token.sha256"
    if kept.exists():
        return Keys(kept.read_text().strip(), secret)
    if before is not None:
        return Keys(before.admin_digest, secret)
    token = "hd_" + secrets.token_urlsafe(24)
    return Keys(_digest(token), secret, token)


def keep_admin_token(config: Config, keys: Keys) -> None:
    """Keep a new token's hash, once the host serves and will show the token."""
    if keys.new_admin_token is not None:
        _keep(Path(config.data) / "admin_token.sha256", keys.admin_digest)


class Access:
    """The checks of all doors, with *keys*, or with those of a host that is one process."""

    def __init__(self, config: Config, keys: Keys | None = None) -> None:
        self._config = config
        self.keys = keys or prepare_keys(config)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in config.allowed_origins)
        self._secret = self.keys.visitor_secret
        self._verified: dict[tuple[str, str], Visitor] = {}
        self._buckets: dict[str, tuple[float, float]] = {}

    # -- visitors --------------------------------------------------------------------------------------------

    def check_origin(self, request: web.Request) -> str | None:
        """The page's origin if it may speak; None when no page speaks. Raises `DoorError`."""
        origin = request.headers.get("Origin")
        if origin is None:
            return None
        if origin.lower() in self._origins or "*" in self._origins:
            return origin
        host = request.headers.get("Host", "").lower()
        if host and origin.lower().partition("://")[2] == host:
            return origin
        raise DoorError(
            "origin_not_allowed", f"pages of {origin[:100]} may not speak here", "the setting is allowed_origins"
        )

    async def preflight(self, request: web.Request) -> web.StreamResponse:
        """A browser's question before a request of another origin (CORS, in the Fetch standard)."""
        self.check_origin(request)
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Authorization, Content-Type, Last-Event-ID",
                "Access-Control-Max-Age": "86400",
            },
        )

    async def allow_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let a page of an allowed origin read the answer."""
        try:
            origin = self.check_origin(request)
        except DoorError:
            return
        if origin is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"

    def visitor(self, request: web.Request, conversation: str) -> Visitor | None:
        """Who speaks, by the token; None while tokens are off. Raises `DoorError` unless it fits *conversation*."""
        if not self._config.visitor_tokens:
            return None
        header = request.headers.get("Authorization", "")
        token = header[7:] if header[:7].lower() == "bearer " else request.query.get("token", "")
        if not token:
            raise DoorError("unauthorized", "a visitor token is needed: Authorization: Bearer …, or ?token=…")
        visitor = self._verified.get((token, conversation))
        if visitor is None:
            visitor = self._verify(token, conversation)
            if len(self._verified) > 10_000:
                self._verified.clear()
            self._verified[(token, conversation)] = visitor
        self.check_expiry(visitor)
        return visitor

    @staticmethod
    def check_expiry(visitor: Visitor | None) -> None:
        """Raises `DoorError` once the token has run out, on a connection that is open too."""
        if visitor is not None and visitor.expires < time.time():
            raise DoorError("unauthorized", "the visitor token has expired")

    def _verify(self, token: str, conversation: str) -> Visitor:
        try:
            claims = jwt.decode(token, self._secret, algorithms=["HS256"], options={"require": ["exp", "sub", "conv"]})
        except (jwt.PyJWTError, ValueError) as exc:  # ValueError: bytes that are no text at all
            raise DoorError("unauthorized", f"the visitor token can't be used: {exc}") from None
        if claims["conv"] != conversation:
            raise DoorError("forbidden", "the visitor token is for another conversation")
        return Visitor(str(claims["sub"]), float(claims["exp"]))

    def issue(self, conversation: str, visitor: str, seconds: int) -> tuple[str, float]:
        """A token that binds *conversation* to *visitor*, and when it expires. HS256, see host/README.md."""
        if not self._secret:
            raise DoorError("conflict", "visitor tokens are off", "the setting is visitor_tokens")
        expires = time.time() + seconds
        claims = {"sub": visitor, "conv": conversation, "iat": int(time.time()), "exp": int(expires)}
        return jwt.encode(claims, self._secret, algorithm="HS256"), expires

    def check_rate(self, sender: str) -> None:
        """Take one from *sender*'s bucket. Raises `DoorError` when it is empty."""
        per_minute = self._config.rate_per_minute
        if not per_minute:
            return
        now = time.monotonic()
        per_second, burst = per_minute / 60, float(self._config.rate_burst)
        tokens, at = self._buckets.get(sender, (burst, now))
        tokens = min(burst, tokens + (now - at) * per_second)
        if tokens < 1:
            wait = max(1, round((1 - tokens) / per_second))
            raise DoorError("rate_limited", f"over {per_minute} messages a minute", retry_after_s=wait)
        self._buckets[sender] = (tokens - 1, now)
        if len(self._buckets) > MAX_BUCKETS:
            full = now - burst / per_second
            self._buckets = {who: row for who, row in self._buckets.items() if row[1] > full}
            if len(self._buckets) > MAX_BUCKETS:  # half at once, or each message of a crowd would look at all of it
                self._buckets = dict(list(self._buckets.items())[MAX_BUCKETS // 2 :])

    # -- the operator ----------------------------------------------------------------------------------------

    def check_admin(self, request: web.Request) -> None:
        """Raises `DoorError` unless the request has the admin token."""
        header = request.headers.get("Authorization", "")
        given = header[7:].strip() if header[:7].lower() == "bearer " else ""
        if not given or not hmac.compare_digest(_digest(given), self.keys.admin_digest):
            raise DoorError(
                "unauthorized",
                "the admin token is missing or wrong",
                "the first start showed it; for a new one delete admin_token.sha256 in the data folder and start again",
            )


def _kept_secret(data: Path) -> str:
    kept = data / "visitor_secret"
    if not kept.exists():
        _keep(kept, secrets.token_urlsafe(48))
    return kept.read_text().strip()


def _keep(path: Path, text: str) -> None:
    """Write a file that only this host's user may read; whoever finds it finds all of it."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(text + "\n")
        fresh.replace(path)
    except OSError as exc:
        fresh.unlink(missing_ok=True)
        raise BackendError(f"{path} can't be written: {exc.strerror}; choose another folder with --data") from exc


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
