"""What only somebody with intent, or very bad luck, does: and still one plugin's harm stays its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from conftest import ADMIN_TOKEN, Desk, StartDesk, echo, wait_until
from hotdesk.app import open_host
from hotdesk.config import Config
from hotdesk.errors import BackendError

HEAD = "import asyncio, sys\nfrom hotdesk_sdk import hookimpl\n"
SECOND = f"{HEAD}@hookimpl\nasync def respond(turn): return 'second'\n"

OWN_CANCELLATION = "t = asyncio.create_task(asyncio.sleep(9))\n    t.cancel()\n    await t"
BAD_TEXT = "class E(Exception):\n        def __str__(self): raise ValueError\n    raise E"
EXIT_TEXT = "class E(Exception):\n        def __str__(self): sys.exit(3)\n    raise E"


@pytest.mark.parametrize(
    "body",
    ["raise asyncio.CancelledError", OWN_CANCELLATION, BAD_TEXT, EXIT_TEXT],
    ids=["cancelled", "own task cancelled", "no text", "exit in the text"],
)
@pytest.mark.parametrize("hook", ["respond(turn)", "middleware(turn, call_next)"])
async def test_no_exception_gets_through_the_wall(start_desk: StartDesk, hook: str, body: str) -> None:
    """Whatever a call raises is a failed call: it is skipped and counted, and the conversation goes on."""
    desk = await start_desk({"a.py": f"{HEAD}@hookimpl\nasync def {hook}:\n    {body}\n", "b.py": SECOND})
    assert [await desk.reply(), await desk.reply()] == ["second", "second"]
    assert (await desk.plugin("a"))["failures"] == 2


@pytest.mark.parametrize("body", ["raise asyncio.CancelledError", BAD_TEXT, EXIT_TEXT])
@pytest.mark.parametrize("hook", ["setup", "probe"])
async def test_no_exception_of_a_load_is_lost(start_desk: StartDesk, hook: str, body: str) -> None:
    """A load that ends in any exception is a failed update, told and shown; the old generation serves."""
    desk = await start_desk({"echo.py": echo(1)})
    desk.write(
        "echo.py", f"{HEAD}@hookimpl\nasync def {hook}(ctx):\n    {body}\n@hookimpl\nasync def respond(turn): ...\n"
    )
    await desk.wait_event("plugin_failed", plugin="echo")
    assert await desk.reply() == "1: hello"
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)


async def test_a_pipe_is_refused_and_holds_nobody(desk: Desk) -> None:
    """A named pipe in the plugins folder is refused at once; other plugins swap on."""
    for number in range(8):
        os.mkfifo(desk.folder / f"pipe{number}.py")
    desk.write("echo.py", echo(2))
    await desk.wait_generation("echo", 2)
    os.unlink(desk.folder / "echo.py")
    os.mkfifo(desk.folder / "echo.py")
    failed = await desk.wait_event("plugin_failed", plugin="echo")
    assert "no regular file" in failed["message"]
    assert await desk.reply() == "2: hello"


async def test_links_in_a_circle_and_to_nowhere(start_desk: StartDesk) -> None:
    """A package with links in a circle, or one that leads nowhere, loads and swaps like any other."""
    desk = await start_desk({"pk/__init__.py": echo(1)})
    for name, target in (("l1", "."), ("l2", "."), ("nowhere.txt", "/nowhere")):
        (desk.folder / "pk" / name).symlink_to(target)
    desk.write("pk/__init__.py", echo(2))
    await desk.wait_generation("pk", 2)
    assert await desk.reply() == "2: hello"


async def test_a_self_link_is_a_failed_update(desk: Desk) -> None:
    """What is there and can't be read is no deletion: the old generation serves, and the reason is told."""
    (desk.folder / "echo.py").unlink()
    (desk.folder / "echo.py").symlink_to("echo.py")
    failed = await desk.wait_event("plugin_failed", plugin="echo")
    assert failed["step"] == "read"
    assert await desk.reply() == "1: hello"


async def test_an_endless_stream_is_cut(start_desk: StartDesk) -> None:
    """A reply has a longest length; what was said so far is the reply, marked cut."""
    source = (
        f"{HEAD}@hookimpl\nasync def respond(turn):\n"
        "    while True:\n        yield 'x' * 1000\n        await asyncio.sleep(0)\n"
    )
    desk = await start_desk({"bot.py": source}, max_reply_chars=20_000)
    answer = await desk.say()
    assert answer["error"]["code"] == "stream_cut"
    [reply] = answer["replies"]
    assert (len(reply["text"]), reply["metadata"]["cut"]) == (20_000, True)


async def test_a_layer_is_not_blamed_for_what_is_further_in(start_desk: StartDesk) -> None:
    """A new bot that fails is rolled back alone, also when a layer runs what is further in from a task group."""
    layer = (
        f"{HEAD}@hookimpl\nasync def middleware(turn, call_next):\n"
        "    async with asyncio.TaskGroup() as group:\n        task = group.create_task(call_next())\n"
        "    return task.result()\n"
    )
    desk = await start_desk({"layer.py": layer, "echo.py": echo(1)}, standby_s=5.0)
    desk.write("layer.py", layer + "# newer\n")
    await desk.wait_generation("layer", 2)
    desk.write("echo.py", echo(2).replace("return", "1 / 0\n    return"))
    await desk.wait_generation("echo", 2)
    assert await desk.reply() == "1: hello"
    assert (await desk.plugin("layer"))["generation"] == 2


async def test_two_hosts_on_one_journal_are_refused(desk: Desk, tmp_path: Path) -> None:
    """A second host on the same file, from another data folder, does not start."""
    config = Config(
        plugins=(str(desk.folder),),
        data=str(tmp_path / "other"),
        backend=desk.host.backend.url,
        admin_token=ADMIN_TOKEN,
    )
    with pytest.raises(BackendError, match="another hotdesk has it open"):
        async with open_host(config, serve=False):
            pass


async def test_a_deleted_journal_takes_no_more(desk: Desk) -> None:
    """Once its file is gone the host says so, and accepts nothing that would go with it."""
    assert await desk.reply() == "1: hello"
    path = Path(desk.host.backend.url.removeprefix("sqlite:///"))
    path.rename(path.with_suffix(".gone"))

    async def refused() -> bool:
        async with desk.http.post(f"{desk.url}/v1/conversations/c/messages", json={"text": "x"}) as response:
            return response.status == 503

    await wait_until(refused, "messages are refused")
    async with desk.http.get(f"{desk.url}/readyz") as ready:
        assert ready.status == 503


async def test_a_held_loop_costs_nobody_else_their_time(start_desk: StartDesk) -> None:
    """While a plugin holds the loop, no other call's deadline runs out."""
    patient = f"{HEAD}@hookimpl\nasync def respond(turn):\n    await asyncio.sleep(0.5)\n    return 'patient'\n"
    holder = (
        f"{HEAD}import time\n@hookimpl\nasync def on_message(message):\n"
        "    await asyncio.sleep(0.1)\n    time.sleep(1.5)\n"
    )
    desk = await start_desk({"patient.py": patient, "patient.toml": "timeout_ms = 1000", "holder.py": holder})
    assert await asyncio.wait_for(desk.reply(), 10) == "patient"
