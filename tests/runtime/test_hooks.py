"""Every hook once, on a real host: when it is called, with what, and what becomes of what it returns.

`tests/house` holds that each hook of the SDK has its `test_hook_<name>` here or elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import Desk, StartDesk, echo, wait_until
from hotdesk.config import PluginSettings

NOTES = """
from hotdesk_sdk import Answer, InboundMessage, Intake, Reply, Tool, hookimpl

VERSION = 1

def note(ctx, *what):
    with open(ctx.config["notes"], "a") as file:
        print(ctx.generation, *what, file=file)

"""
"""The head of a plugin that writes down what happens to it."""

RESPOND = "@hookimpl\nasync def respond(turn):\n    return f'{VERSION}: {turn.text}'\n"


class Noted:
    """A desk with one such plugin, `p`, and what it wrote down."""

    def __init__(self, desk: Desk, source: str, notes: Path) -> None:
        self.desk = desk
        self.source = source
        self._notes = notes

    @property
    def lines(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    async def wait_lines(self, *lines: str) -> None:
        await wait_until(lambda: self.lines == list(lines), f"{lines}, there is {self.lines}")

    async def swap(self, source: str | None = None) -> None:
        """Save a next version, and wait until it serves."""
        number = (await self.desk.plugin("p"))["generation"] + 1
        self.desk.write("p.py", (source or self.source).replace("VERSION = 1", f"VERSION = {number}"))
        await self.desk.wait_generation("p", number)


async def start_noted(start_desk: StartDesk, tmp_path: Path, hooks: str, manifest: str = "", **config: Any) -> Noted:
    notes = tmp_path / "notes"
    desk = await start_desk(
        {"p.py": NOTES + hooks, "p.toml": manifest},
        settings={"p": PluginSettings(config={"notes": str(notes), **config})},
    )
    return Noted(desk, NOTES + hooks, notes)


async def test_hook_setup(start_desk: StartDesk, tmp_path: Path) -> None:
    """Once a generation, with its own ctx, before it serves; raising refuses the generation."""
    setup = "@hookimpl\nasync def setup(ctx):\n    note(ctx, 'setup', ctx.plugin)\n"
    noted = await start_noted(start_desk, tmp_path, setup + RESPOND)
    assert noted.lines == ["1 setup p"]
    await noted.swap()
    assert noted.lines == ["1 setup p", "2 setup p"]
    noted.desk.write("p.py", noted.source + "\n@hookimpl\nasync def setup(ctx):\n    raise ValueError('not today')\n")
    failed = await noted.desk.wait_event("plugin_failed", plugin="p", step="setup")
    assert "not today" in failed["message"]
    assert await noted.desk.reply("hi") == "2: hi"


async def test_hook_teardown(start_desk: StartDesk, tmp_path: Path) -> None:
    """Once a generation, after its last turn and before what came through ctx is undone."""
    hooks = (
        "@hookimpl\nasync def setup(ctx):\n    ctx.defer(lambda: note(ctx, 'undone'))\n"
        "@hookimpl\nasync def teardown(ctx):\n    note(ctx, 'teardown')\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + RESPOND)
    await noted.swap()
    await noted.wait_lines("1 teardown", "1 undone")
    (noted.desk.folder / "p.py").unlink()
    await noted.wait_lines("1 teardown", "1 undone", "2 teardown", "2 undone")


async def test_hook_configure(start_desk: StartDesk, tmp_path: Path) -> None:
    """A changed config is offered; truthy takes it without a swap, anything else swaps."""
    hooks = (
        "@hookimpl\nasync def configure(ctx, config):\n"
        "    note(ctx, ctx.config['word'], config['word'])\n    return config['word'] != 'three'\n"
        "@hookimpl\nasync def respond(ctx):\n    return ctx.config['word']\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks, "[config]\nword = 'one'\n")
    assert await noted.desk.reply() == "one"
    noted.desk.write("p.toml", "[config]\nword = 'two'\n")
    await noted.desk.wait_event("plugin_configured", plugin="p", generation=1)
    assert await noted.desk.reply() == "two"
    noted.desk.write("p.toml", "[config]\nword = 'three'\n")
    await noted.desk.wait_generation("p", 2)
    assert await noted.desk.reply() == "three"
    assert noted.lines == ["1 one two", "1 two three"]


async def test_hook_probe(start_desk: StartDesk, tmp_path: Path) -> None:
    """After setup, before the swap; raising refuses the new generation, and the old one serves on."""
    hooks = (
        "@hookimpl\nasync def setup(ctx):\n    note(ctx, 'setup')\n"
        "@hookimpl\nasync def probe(ctx):\n    note(ctx, 'probe')\n    assert VERSION != 2, 'two is bad'\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + RESPOND)
    noted.desk.write("p.py", noted.source.replace("VERSION = 1", "VERSION = 2"))
    failed = await noted.desk.wait_event("plugin_failed", plugin="p", step="probe")
    assert "two is bad" in failed["message"]
    assert noted.lines == ["1 setup", "1 probe", "2 setup", "2 probe"]
    assert await noted.desk.reply("hi") == "1: hi"


STATE = """
seen = []

@hookimpl
async def respond(turn):
    seen.append(turn.text)
    return ",".join(seen)

@hookimpl
async def export_state(ctx):
    return {"seen": seen}

@hookimpl
async def import_state(ctx, state, version):
    note(ctx, version)
    seen.extend(state["seen"])
"""


async def test_hook_export_state(start_desk: StartDesk, tmp_path: Path) -> None:
    """On a swap the old generation is asked; what JSON can't say is refused, and the old one serves on."""
    noted = await start_noted(start_desk, tmp_path, STATE.replace('{"seen": seen}', "object()"))
    assert await noted.desk.reply("a") == "a"
    noted.desk.write("p.py", noted.source + "\n# changed\n")
    failed = await noted.desk.wait_event("plugin_failed", plugin="p", step="export_state")
    assert "JSON" in failed["message"]
    assert await noted.desk.reply("b") == "a,b"


async def test_hook_import_state(start_desk: StartDesk, tmp_path: Path) -> None:
    """On a swap the new generation gets the old one's state and version, and not at the first load."""
    noted = await start_noted(start_desk, tmp_path, STATE, 'version = "1.2.3"\n')
    assert await noted.desk.reply("a") == "a"
    assert noted.lines == []
    await noted.swap()
    assert await noted.desk.reply("b") == "a,b"
    assert noted.lines == ["2 1.2.3"]


async def test_hook_intake(start_desk: StartDesk, tmp_path: Path) -> None:
    """A webhook is handed over whole; its messages are taken in before its answer is given."""
    hooks = (
        "@hookimpl\nasync def intake(ctx, request):\n"
        "    note(ctx, request.method, request.path, request.query['q'], request.headers['x-sign'], request.text())\n"
        "    found = [InboundMessage('from-' + ctx.plugin, word) for word in request.text().split()]\n"
        "    return Intake(found, Answer(201, {'taken': len(found)}, {'x-thanks': 'yes'}))\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + RESPOND)
    url = f"{noted.desk.url}/hooks/p/a/b?q=1"
    async with noted.desk.http.put(url, data="one two", headers={"X-Sign": "s"}) as response:
        assert (response.status, response.headers["x-thanks"]) == (201, "yes")
        assert await response.json() == {"taken": 2}
    assert noted.lines == ["1 PUT /a/b 1 s one two"]

    async def all_answered() -> bool:
        said = [entry["text"] for entry in await noted.desk.record("from-p")]
        return sorted(said) == ["1: one", "1: two", "one", "two"]

    await wait_until(all_answered, "both messages answered")


async def test_hook_middleware(start_desk: StartDesk, tmp_path: Path) -> None:
    """Around every turn: it may change what goes in and what comes out, answer itself, or say nothing."""
    hooks = (
        "@hookimpl\nasync def middleware(ctx, turn, call_next):\n"
        "    if turn.text == 'stop':\n        return 'stopped'\n"
        "    if turn.text == 'hush':\n        await call_next()\n        return None\n"
        "    turn.text = turn.text.upper()\n    reply = await call_next()\n    reply.text += '!'\n    return reply\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks)
    noted.desk.write("echo.py", echo(1))
    await noted.desk.wait_generation("echo", 1)
    replies = (await noted.desk.say("hi"))["replies"]
    assert [(reply["text"], reply["plugin"]) for reply in replies] == [("1: HI!", "echo")]
    replies = (await noted.desk.say("stop"))["replies"]
    assert [(reply["text"], reply["plugin"]) for reply in replies] == [("stopped", "p")]
    assert await noted.desk.reply("hush") is None


async def test_hook_respond(start_desk: StartDesk, tmp_path: Path) -> None:
    """Text, a Reply, chunks, or None, which leaves the message to the next bot."""
    hooks = (
        "async def chunks():\n    yield 'o'\n    yield 'ne'\n"
        "@hookimpl\nasync def respond(ctx, turn):\n"
        "    if turn.text == 'text':\n        return 'one'\n"
        "    if turn.text == 'reply':\n        return Reply('one', metadata={'a': 1})\n"
        "    if turn.text == 'chunks':\n        return Reply(chunks=chunks())\n"
        "    if turn.text == 'iterator':\n        return chunks()\n"
        "    if turn.text == 'stream':\n        await turn.stream('o')\n        await turn.stream('ne')\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks, "order = 10\n")
    noted.desk.write("echo.py", echo(1))
    await noted.desk.wait_generation("echo", 1)
    for text in ("text", "reply", "chunks", "iterator", "stream"):
        [reply] = (await noted.desk.say(text))["replies"]
        assert (reply["text"], reply["plugin"], reply["metadata"]) == ("one", "p", {"a": 1} if text == "reply" else {})
    assert await noted.desk.reply("else") == "1: else"


async def test_hook_deliver(start_desk: StartDesk, tmp_path: Path) -> None:
    """Replies in conversations that its intake opened, in order, and again when it raised; no others."""
    hooks = (
        "failed = set()\n"
        "@hookimpl\nasync def intake(request):\n    return [InboundMessage('ann', request.text())]\n"
        "@hookimpl\nasync def deliver(ctx, conversation, reply):\n"
        "    if reply.seq not in failed:\n        failed.add(reply.seq)\n        raise OSError('try again')\n"
        "    note(ctx, conversation.id, conversation.channel, reply.text)\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + RESPOND)
    await noted.desk.say("not for the channel")
    for text in ("a", "b"):
        async with noted.desk.http.post(f"{noted.desk.url}/hooks/p", data=text) as response:
            assert response.status == 202
    await noted.wait_lines("1 ann p 1: a", "1 ann p 1: b")


async def test_hook_tools(start_desk: StartDesk, tmp_path: Path) -> None:
    """Asked once a generation; what is no list of tools refuses it."""
    hooks = (
        "async def weather(city):\n    return {'city': city}\n"
        "@hookimpl\nasync def tools(ctx):\n    return [Tool('weather', 'The weather in a city.', weather)]\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks)
    assert (await noted.desk.plugin("p"))["tools"] == ["weather"]
    noted.desk.write("p.py", noted.source.replace("return [Tool", "return ['weather'] or [Tool"))
    await noted.desk.wait_event("plugin_failed", plugin="p", step="tools")
    assert (await noted.desk.plugin("p"))["tools"] == ["weather"]


async def test_hook_routes(start_desk: StartDesk, tmp_path: Path) -> None:
    """Pages below /p/{plugin}/, always of the generation that serves."""
    hooks = (
        "async def page(request):\n    return {'version': VERSION, 'name': request.match_info['name']}\n"
        "@hookimpl\nasync def routes(ctx):\n    return [('GET', '/hello/{name}', page)]\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks)

    async def get(path: str) -> tuple[int, Any]:
        async with noted.desk.http.get(f"{noted.desk.url}/p/p{path}") as response:
            return response.status, await response.json()

    assert await get("/hello/ann") == (200, {"version": 1, "name": "ann"})
    assert (await get("/goodbye"))[0] == 404
    await noted.swap()
    assert await get("/hello/ann") == (200, {"version": 2, "name": "ann"})


async def test_hook_on_message(start_desk: StartDesk, tmp_path: Path) -> None:
    """Every message that was accepted, through any door; a repeat is none. What it raises concerns nobody."""
    hooks = (
        "@hookimpl\nasync def on_message(ctx, message):\n    note(ctx, message.seq, message.text)\n"
        "    raise ValueError('concerns nobody')\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + RESPOND)
    assert await noted.desk.reply("a", id="1") == "1: a"
    assert await noted.desk.reply("a", id="1") == "1: a"
    assert await noted.desk.reply("b") == "1: b"
    await noted.wait_lines("1 1 a", "1 3 b")


async def test_hook_on_reply(start_desk: StartDesk, tmp_path: Path) -> None:
    """Every reply that was stored, whoever gave it, also one that was sent outside a turn."""
    hooks = (
        "@hookimpl\nasync def on_message(ctx, message):\n"
        "    if message.text == 'send':\n        await ctx.send(message.conversation, 'sent')\n"
        "@hookimpl\nasync def on_reply(ctx, reply):\n    note(ctx, reply.plugin, reply.text)\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks)
    noted.desk.write("echo.py", echo(1))
    await noted.desk.wait_generation("echo", 1)
    await noted.desk.say("hi")
    await noted.wait_lines("1 echo 1: hi")
    await noted.desk.say("send")
    await wait_until(lambda: sorted(noted.lines[1:]) == ["1 echo 1: send", "1 p sent"], "both replies noted")


CLOSING = """
@hookimpl
async def respond(turn):
    if turn.text == "bye":
        turn.conversation.close()
    if turn.text == "human":
        turn.conversation.assignee = "ann"
    return "ok"
"""


async def test_hook_on_conversation_opened(start_desk: StartDesk, tmp_path: Path) -> None:
    """At a conversation's first message, and at the first after it was closed."""
    hooks = "@hookimpl\nasync def on_conversation_opened(ctx, conversation):\n    note(ctx, conversation.id)\n"
    noted = await start_noted(start_desk, tmp_path, hooks + CLOSING)
    for text, conversation in (("hi", "a"), ("hi", "b"), ("bye", "a"), ("hi", "b"), ("hi", "a")):
        await noted.desk.say(text, conversation)
    await noted.wait_lines("1 a", "1 b", "1 a")


async def test_hook_on_conversation_closed(start_desk: StartDesk, tmp_path: Path) -> None:
    """When a turn closed its conversation."""
    hooks = "@hookimpl\nasync def on_conversation_closed(ctx, conversation):\n    note(ctx, conversation.id)\n"
    noted = await start_noted(start_desk, tmp_path, hooks + CLOSING)
    for text, conversation in (("hi", "a"), ("bye", "b"), ("bye", "a"), ("hi", "b")):
        await noted.desk.say(text, conversation)
    await noted.wait_lines("1 b", "1 a")


async def test_hook_on_assigned(start_desk: StartDesk, tmp_path: Path) -> None:
    """When a turn changed its conversation's assignee, and not when it said the same again."""
    hooks = (
        "@hookimpl\nasync def on_assigned(ctx, conversation):\n    note(ctx, conversation.id, conversation.assignee)\n"
    )
    noted = await start_noted(start_desk, tmp_path, hooks + CLOSING)
    for text, conversation in (("hi", "a"), ("human", "b"), ("human", "b"), ("human", "a")):
        await noted.desk.say(text, conversation)
    await noted.wait_lines("1 b ann", "1 a ann")
