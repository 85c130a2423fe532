"""What the desk's bot is compared with: the same bot written with `openai` on bare aiohttp, as its guide shows it.

    python tests/load/llm_bare.py PORT BASE_URL

It keeps no journal, knows no plugins and offers no tool. `POST /whole` awaits `create()` with a prompt of 12 messages,
`POST /stream` iterates `create(stream=True)` with it, and `GET /ws` sends each delta of that as a frame, and an empty
one at the end. `POST /talk/{conversation}` remembers what was said, in memory, and asks with all of it; an image goes
along once, so that its memory does not fill with them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
import uvloop
from aiohttp import WSMsgType, web

SYSTEM = """You are the customer service of a small shop. Answer briefly and kindly, in the language of the visitor. \
Say so when you do not know something, and call hand_over when a person is wanted or needed."""
TEXT = "Hello, when will I get my refund? The order is number 4711."
ANSWER = "".join(f" {n}" for n in range(20))
EXCHANGES = 5
"""What was said before: with the system's words and the visitor's message, a prompt of 12 messages."""


class Bot:
    """One client, as its documentation has it; `max_retries` and the timeout do not cost anything here."""

    def __init__(self, base_url: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key="none")
        self._said: dict[str, list[Any]] = {}
        self._history: list[dict[str, str]] = []
        for _ in range(EXCHANGES):
            self._history.append({"role": "user", "content": TEXT})
            self._history.append({"role": "assistant", "content": ANSWER})

    def prompt(self, text: str) -> list[Any]:
        """The 12 messages."""
        messages = [{"role": "system", "content": SYSTEM}]
        messages += [{"role": said["role"], "content": said["content"]} for said in self._history]
        messages.append({"role": "user", "content": text})
        return messages

    async def answer_whole(self, request: web.Request) -> web.Response:
        text = (await request.json())["text"]
        completion = await self._client.chat.completions.create(
            model="gpt-4.1-mini", messages=self.prompt(text), temperature=0.3, max_tokens=800
        )
        return web.json_response({"replies": [{"text": completion.choices[0].message.content}]})

    async def answer_talk(self, request: web.Request) -> web.Response:
        body = await request.json()
        said = self._said.setdefault(request.match_info["conversation"], [])
        content: Any = body["text"]
        if attachments := body.get("attachments"):
            url = f"data:image/jpeg;base64,{attachments[0]['data']}"
            content = [{"type": "text", "text": content}, {"type": "image_url", "image_url": {"url": url}}]
        messages: list[Any] = [{"role": "system", "content": SYSTEM}, *said, {"role": "user", "content": content}]
        completion = await self._client.chat.completions.create(
            model="gpt-4.1-mini", messages=messages, temperature=0.3, max_tokens=800
        )
        said.append({"role": "user", "content": body["text"]})
        said.append({"role": "assistant", "content": completion.choices[0].message.content})
        return web.json_response({"replies": [{"text": completion.choices[0].message.content}]})

    async def _deltas(self, text: str) -> Any:
        return await self._client.chat.completions.create(
            model="gpt-4.1-mini", messages=self.prompt(text), temperature=0.3, max_tokens=800, stream=True
        )

    async def answer_stream(self, request: web.Request) -> web.Response:
        text = ""
        async for chunk in await self._deltas((await request.json())["text"]):
            if chunk.choices and chunk.choices[0].delta.content:
                text += chunk.choices[0].delta.content
        return web.json_response({"replies": [{"text": text}]})

    async def answer_frames(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                async for chunk in await self._deltas(json.loads(message.data)["text"]):
                    if chunk.choices and chunk.choices[0].delta.content:
                        await socket.send_str(chunk.choices[0].delta.content)
                await socket.send_str("")
        return socket


async def ready(request: web.Request) -> web.Response:
    """`GET /readyz`: able to serve."""
    return web.Response()


async def make_app(base_url: str) -> web.Application:
    bot = Bot(base_url)
    app = web.Application(client_max_size=8 * 1024 * 1024)
    app.add_routes(
        [
            web.post("/whole", bot.answer_whole),
            web.post("/stream", bot.answer_stream),
            web.post("/talk/{conversation}", bot.answer_talk),
            web.get("/ws", bot.answer_frames),
            web.get("/readyz", ready),
        ]
    )
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(
        make_app(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None, backlog=4096
    )
