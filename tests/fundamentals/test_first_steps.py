"""The tutorial: what hotdesk does, one idea a test."""

from __future__ import annotations

from conftest import Desk, StartDesk, echo


async def test_a_message_gets_an_answer(desk: Desk) -> None:
    """A message goes in, a plugin answers, and the reply says which plugin and generation it was."""
    answer = await desk.say("hello")
    [reply] = answer["replies"]
    assert (reply["text"], reply["plugin"], reply["generation"]) == ("1: hello", "echo", 1)
    assert (answer["seq"], reply["seq"], reply["to"]) == (1, 2, answer["id"])


async def test_a_saved_file_serves(desk: Desk) -> None:
    """A plugin that is saved again answers with its new code, without a restart."""
    assert await desk.reply() == "1: hello"
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "2: hello"


async def test_a_broken_file_changes_nothing(desk: Desk) -> None:
    """A syntax error keeps the old generation serving, and says where it is."""
    desk.write("echo.py", "def broken(:\n")
    failed = await desk.wait_event("plugin_failed", plugin="echo")
    assert failed["line"] == 1
    assert await desk.reply() == "1: hello"


async def test_rollback_brings_back_the_version_before(desk: Desk) -> None:
    """Rolling back serves the earlier code, as a generation of its own."""
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    await desk.admin("POST", "plugins/echo/rollback")
    assert await desk.reply() == "1: hello"


async def test_middleware_surrounds_the_bot(start_desk: StartDesk) -> None:
    """A middleware sees the turn on its way in and the reply on its way out."""
    shout = (
        "from hotdesk_sdk import hookimpl\n"
        "@hookimpl\nasync def middleware(turn, call_next):\n"
        "    turn.text = turn.text.strip()\n"
        "    reply = await call_next()\n"
        "    reply.text += '!'\n"
        "    return reply\n"
    )
    desk = await start_desk({"echo.py": echo(1), "shout.py": shout})
    assert await desk.reply("  hi ") == "1: hi!"
