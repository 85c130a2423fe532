"""What the host is compared with: aiohttp and uvloop alone, answering JSON with JSON and frames with frames.

python tests/load/bare.py PORT
"""

from __future__ import annotations

import sys

import uvloop
from aiohttp import WSMsgType, web


async def answer(request: web.Request) -> web.Response:
    """`POST /echo`: the JSON of the body, decoded and encoded again."""
    return web.json_response(await request.json())


async def echo_frames(request: web.Request) -> web.WebSocketResponse:
    """`GET /ws`: every text frame, sent back as it is. No compression: it costs seven times the memory."""
    socket = web.WebSocketResponse(compress=False)
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
    return socket


async def ready(request: web.Request) -> web.Response:
    """`GET /readyz`: able to serve."""
    return web.Response()


def main(port: int) -> None:
    """Serve until stopped."""
    app = web.Application()
    app.add_routes([web.post("/echo", answer), web.get("/ws", echo_frames), web.get("/readyz", ready)])
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None, backlog=4096)


if __name__ == "__main__":
    main(int(sys.argv[1]))
