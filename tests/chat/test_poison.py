"""What a plugin may leave behind in a turn that can't be kept: the turn says so, the conversation goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.web.visitors import open_desk

from conftest import Desk, echo

HEAD = "from hotdesk_sdk import Reply, hookimpl\n@hookimpl\nasync def {hook}:\n    if turn.text == 'ok': return None\n"

REPLIES = {
    "a_lone_surrogate": "return '\\ud800'",
    "text_of_a_number": "return Reply(5)",
    "text_of_nothing": "return Reply(None)",
    "metadata_list": "return Reply('x', metadata=[1])",
    "metadata_nothing": "return Reply('x', metadata=None)",
    "metadata_object": "return Reply('x', metadata={'a': object()})",
    "metadata_surrogate": "return Reply('x', metadata={'a': '\\ud800'})",
    "metadata_cycle": "m = {}; m['m'] = m; return Reply('x', metadata=m)",
    "state_object": "turn.conversation.state['a'] = object(); return 'x'",
    "state_list": "turn.conversation.state = [1]; return 'x'",
    "state_surrogate": "turn.conversation.state['a'] = '\\ud800'; return 'x'",
    "assignee_object": "turn.conversation.assignee = object(); return 'x'",
    "assignee_number": "turn.conversation.assignee = 5; return 'x'",
    "assignee_surrogate": "turn.conversation.assignee = '\\ud800'; return 'x'",
    "locale_bytes": "turn.conversation.locale = b'de'; return 'x'",
    "tags_surrogate": "turn.conversation.tags.append('\\ud800'); return 'x'",
    "tags_number": "turn.conversation.tags = 5; return 'x'",
    "chunk_surrogate": "turn.stream('a'); turn.stream('\\ud800'); return None",
    "chunk_number": "turn.stream(5); return None",
    "an_object": "return object()",
}


async def survives(desk: Desk) -> None:
    """The conversation is alive, its record is readable, and nothing is under way."""
    answer = await desk.say("bad")
    assert desk.host.turns.live == 0
    assert answer["replies"] == [] or answer["replies"][0]["plugin"] == "last", answer
    assert await desk.reply("ok") == "1: ok"
    record = await desk.record()
    assert [entry["seq"] for entry in record] == list(range(1, len(record) + 1))


@pytest.mark.parametrize("fault", REPLIES)
async def test_a_bot_can_not_freeze_its_conversation(tmp_path: Path, fault: str) -> None:
    """Whatever a bot leaves that can't be kept, its turn ends, the next is answered, and the host starts again."""
    source = HEAD.format(hook="respond(turn)") + f"    {REPLIES[fault]}\n"
    plugins = {"bad.py": source, "last.py": echo(1), "last.toml": "order = 90\n"}
    async with open_desk(tmp_path, plugins, probation_calls=0, breaker_failures=20) as desk:
        await survives(desk)
    async with open_desk(tmp_path) as desk:
        assert desk.host.resumed == 0
        assert await desk.reply("ok") == "1: ok"


MIDDLEWARE = {
    "a_number": "reply.text = 5; return reply",
    "a_surrogate": "reply.text = '\\udfff'; return reply",
    "metadata": "reply.metadata = 'x'; return reply",
    "an_object": "return object()",
}


@pytest.mark.parametrize("fault", MIDDLEWARE)
async def test_a_middleware_can_not_freeze_its_conversation(tmp_path: Path, fault: str) -> None:
    """Whatever a middleware makes of a reply, the turn ends and the next one is answered."""
    source = HEAD.format(hook="middleware(turn, call_next)").replace("return None", "return await call_next()")
    source += f"    reply = await call_next()\n    {MIDDLEWARE[fault]}\n"
    plugins = {"bad.py": source, "last.py": echo(1)}
    async with open_desk(tmp_path, plugins, probation_calls=0, breaker_failures=20) as desk:
        await survives(desk)


async def test_a_stream_that_says_what_can_not_be_said_is_cut(tmp_path: Path) -> None:
    """A chunk that is no Unicode text cuts the stream there; what was said so far is the reply."""
    source = HEAD.format(hook="respond(turn)").partition("    if")[0] + "    yield 'good '\n    yield '\\ud800'\n"
    async with open_desk(tmp_path, {"bad.py": source}, probation_calls=0) as desk:
        answer = await desk.say("hi")
        assert answer["error"]["code"] == "stream_cut"
        assert (answer["replies"][0]["text"], answer["replies"][0]["metadata"]) == ("good ", {"cut": True})
