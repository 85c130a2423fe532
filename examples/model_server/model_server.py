"""A server that speaks the OpenAI chat-completions protocol with scripts: to try streaming without a key, and to test.

    python model_server.py --port 9100

Requests are parsed by aiohttp; answers are written to the connection as bytes that were made beforehand, each stream
driven by one timer. What a script can do is in `model_script.py`, what is said of its own accord and the scripts that
have names in `model_answers.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any

import click
import msgspec
from aiohttp import web
from model_answers import SCRIPTS, TOKENS_PER_SECOND, UnknownScript, answer, parse_script, problem_of
from model_plan import plan_for
from model_player import Player, Seen
from model_script import Answers, Script

__all__ = ["ModelServer", "Script", "Seen", "main", "problem_of"]

Answering = Script | str | Answers
"""A script, the name of one (`NAME?field=value`), or a function of the request's body that gives either."""

LOG_LENGTH = 100
MODEL = "model-server"


class Written(web.StreamResponse):
    """An answer that is on the wire already: aiohttp only hears whether the connection is to be kept."""

    def __init__(self, seen: Seen, keep_alive: bool) -> None:
        super().__init__(status=seen.status or 500)
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: the headers are out."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing: the end is out."""


class Doorman(web.Server):
    """Numbers the connections, and tells at once when one of them is gone."""

    def __init__(self, handler: Callable[[web.BaseRequest], Any], lost: Callable[[web.RequestHandler], None]) -> None:
        super().__init__(handler, access_log=None)
        self._lost = lost
        self._count = itertools.count(1)
        self.numbers: dict[web.RequestHandler, int] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        self.numbers[handler] = next(self._count)
        super().connection_made(handler, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.numbers.pop(handler, None)
        self._lost(handler)
        super().connection_lost(handler, exc)


class ModelServer:
    """The server, from `async with` to its end; what it breaks off when it closes does not count as hung up.

    Which script answers: one given to `next`, or else the one that the model's name asks for (`script:NAME`), or else
    `default`, and without that it answers what it is asked. `requests` keeps everything unless *keep* says how many.
    """

    def __init__(
        self,
        default: Answering = "answer",
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens_per_second: float = TOKENS_PER_SECOND,
        keep: int | None = None,
    ) -> None:
        self._tokens_per_second = tokens_per_second
        self.default: Answering = default
        self.requests: list[Seen] = []
        self._log: deque[Seen] = deque(maxlen=LOG_LENGTH)
        self._keep = keep
        self._next: deque[Answering] = deque()
        self._host, self._port = host, port
        self._players: dict[web.RequestHandler, Player] = {}
        self._ids = itertools.count(time.time_ns())
        self._runner: web.ServerRunner | None = None

    @property
    def base_url(self) -> str:
        """With `/v1`, the way a client's `base_url` is written."""
        return f"http://{self._host}:{self._port}/v1"

    @property
    def open(self) -> int:
        """How many requests are being answered now."""
        return len(self._players)

    @property
    def connections(self) -> int:
        """How many connections are open now, idle ones too."""
        return len(self._doorman.numbers)

    def next(self, *scripts: Answering) -> None:
        """Let the next requests be answered with these, one each; those after them as before."""
        self._next.extend(scripts)

    async def __aenter__(self) -> ModelServer:
        self._doorman = Doorman(self._serve, self._lose)
        self._runner = web.ServerRunner(self._doorman, shutdown_timeout=1.0)
        try:
            await self._runner.setup()
            await web.TCPSite(self._runner, self._host, self._port, backlog=4096).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for player in list(self._players.values()):
            player.abort()
        assert self._runner is not None
        await self._runner.cleanup()

    def _lose(self, connection: web.RequestHandler) -> None:
        if player := self._players.get(connection):
            player.lose()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and request.path.endswith("/chat/completions"):
            return await self._complete(request)
        if request.method == "GET" and request.path == "/v1/models":
            names = [MODEL, *(f"script:{name}" for name in SCRIPTS)]
            models = [{"id": name, "object": "model", "created": 0, "owned_by": MODEL} for name in names]
            return web.json_response({"object": "list", "data": models})
        if request.method == "GET" and request.path == "/log":
            rows = [msgspec.json.encode(seen.report()).decode() for seen in self._log]
            return web.Response(text="[" + ",\n ".join(rows) + "]\n", content_type="application/json")
        error = {"message": f"Unknown request URL: {request.method} {request.path}.", "type": "invalid_request_error"}
        return web.json_response({"error": error | {"param": None, "code": "unknown_url"}}, status=404)

    async def _complete(self, request: web.BaseRequest) -> web.StreamResponse:
        raw = await request.content.read()
        if request.transport is None:
            raise ConnectionResetError  # gone before it was read
        try:
            body = msgspec.json.decode(raw)
        except msgspec.DecodeError:
            body = None
        seen = Seen(
            body=body if isinstance(body, dict) else None,
            raw=raw,
            headers=request.headers,
            path=request.path,
            query=request.query,
            at=time.monotonic(),
            connection=self._doorman.numbers[request.protocol],
            clock=time.time(),
        )
        self._log.append(seen)
        self.requests.append(seen)
        if self._keep is not None:
            del self.requests[: max(0, len(self.requests) - self._keep)]
        seen.script = self._choose(body)
        return await self._play(request, seen)

    def _choose(self, body: Any) -> Script:
        """The script for a request; where it is for us to answer, one that says what is wrong with the request."""
        model = body.get("model") if isinstance(body, dict) else None
        named = model.removeprefix("script:") if isinstance(model, str) and model.startswith("script:") else None
        chosen: Answering = self._next.popleft() if self._next else named or self.default
        while not isinstance(chosen, str):
            if isinstance(chosen, Script):
                if chosen.answers is None:
                    return chosen
                chosen = chosen.answers
            chosen = chosen(body)
        return self._say(chosen, body)

    def _say(self, name: str, body: Any) -> Script:
        """An answer to what is asked, in the way of a named script."""
        if problem := problem_of(body):
            return refuse(400, *problem)
        try:
            return parse_script(name, answer(body, tokens_per_second=self._tokens_per_second))
        except UnknownScript as exc:
            return refuse(404, str(exc), "model", "model_not_found")

    async def _play(self, request: web.BaseRequest, seen: Seen) -> web.StreamResponse:
        body = seen.body or {}
        options = body.get("stream_options")
        plan = plan_for(
            seen.script,
            str(body.get("model") or MODEL),
            stream=bool(body.get("stream")),
            usage=isinstance(options, dict) and bool(options.get("include_usage")),
            chunked=request.version >= (1, 1),
        )
        player = self._players[request.protocol] = Player(request, plan, seen, b"%016x" % next(self._ids))
        try:
            while not await player.play():
                try:
                    await request.writer.drain()
                except ConnectionError:
                    break
        finally:
            del self._players[request.protocol]
            seen.ended = time.monotonic()
        return Written(seen, plan.keep_alive and request.keep_alive and seen.finished)


def refuse(status: int, message: str, param: str, code: str | None = None) -> Script:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return Script(name=f"refused: {HTTPStatus(status).phrase}", status=status, error=error)


def check_script(context: click.Context, option: click.Parameter, value: str) -> str:
    try:
        parse_script(value, Script())
    except UnknownScript as exc:
        raise click.BadParameter(str(exc)) from None
    return value


async def serve(host: str, port: int, script: str, speed: float) -> None:
    """Serve until cancelled."""
    async with ModelServer(script, host=host, port=port, tokens_per_second=speed, keep=0) as server:
        print(f"The model server is at {server.base_url}", flush=True)
        print(f"    HOTDESK_LLM_BASE_URL={server.base_url} make run", flush=True)
        print(f"What becomes of requests: {server.base_url.removesuffix('/v1')}/log", flush=True)
        await asyncio.Event().wait()


@click.command(epilog=f"Scripts: {', '.join(SCRIPTS)}.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9100, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--script",
    default="answer",
    show_default=True,
    callback=check_script,
    help="NAME or NAME?field=value: how everything is answered.",
)
@click.option("--speed", default=TOKENS_PER_SECOND, show_default=True, help="Tokens a second; 0 is all at once.")
def main(host: str, port: int, script: str, speed: float) -> None:
    """Answer chat completions without a model, streaming, until Ctrl-C."""
    try:
        import uvloop
    except ImportError:
        run: Callable[..., None] = asyncio.run
    else:
        run = uvloop.run
    try:
        run(serve(host, port, script, speed))
    except OSError as exc:
        sys.exit(f"can't listen on {host}:{port}: {exc.strerror or exc}; choose another with --port")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
