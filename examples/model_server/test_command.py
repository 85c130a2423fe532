"""The command and the README."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from pathlib import Path

import aiohttp

from conftest import nothing_left_behind, wait_until  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))

from asking import MESSAGES, events_of, texts_of
from model_answers import SCRIPTS
from model_server import ModelServer

HERE = Path(__file__).parent


async def run(command: str, cwd: Path) -> str:
    process = await asyncio.create_subprocess_shell(
        command, cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    return out.decode()


README = (HERE / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.S | re.M)


async def test_the_command_serves_and_says_where() -> None:
    """Started as the README says, it prints the address to use, answers there at its speed, and stops at Ctrl-C."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, HERE / "model_server.py", "--port", "0", "--script", "answer?text=one two", "--speed", "0"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().split()[-1]
        assert (await process.stdout.readline()).decode().strip() == f"HOTDESK_LLM_BASE_URL={url} make run"
        async with aiohttp.ClientSession() as http:
            body = {"model": "m", "messages": MESSAGES, "stream": True}
            async with http.post(f"{url}/chat/completions", json=body) as response:
                assert texts_of(events_of(await response.read())) == ["one", " two"]
            body["model"] = "script:stall?stall_after=2&text=one two three"
            async with http.post(f"{url}/chat/completions", json=body) as response:
                await response.content.readuntil(b" two")
                response.close()

            async def became() -> list[str]:
                async with http.get(url.replace("/v1", "/log")) as response:
                    return [row["became"] for row in await response.json()]

            async def both_ended() -> bool:
                return await became() == ["finished", "hung up"]

            await wait_until(both_ended, "both to be in the log")
    finally:
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 5) == 0


async def test_a_wrong_script_or_a_taken_port_stops_the_start() -> None:
    """With the reason, and no traceback."""
    command = f"{sys.executable} {HERE / 'model_server.py'}"
    assert "There is no script 'nothing'" in await run(f"{command} --script nothing", HERE)
    async with ModelServer() as server:
        out = await run(f"{command} --port {server.base_url.split(':')[2][:-3]}", HERE)
    assert "choose another with --port" in out
    assert "Traceback" not in out


async def test_the_readme_runs() -> None:
    """Who types what the page says sees what it shows; its program passes."""
    async with ModelServer() as server:
        for language, block in BLOCKS:
            if language == "console":
                await assert_session(block.replace("http://127.0.0.1:9100/v1", server.base_url), server)
            elif language == "python":
                assert await run(f"{sys.executable} -W error - <<'END'\n{block}END", HERE) == ""
            else:
                assert language == "sh"


async def assert_session(block: str, server: ModelServer) -> None:
    """Each `$` line of *block* prints what stands under it, `…` being anything."""
    for step in re.split(r"^\$ ", block, flags=re.M)[1:]:
        command, shown = step.split("\n", 1)
        out = await run(command.replace("http://127.0.0.1:9100", server.base_url.removesuffix("/v1")), HERE)
        pattern = ".*".join(re.escape(part) for part in shown.strip().split("…"))
        assert re.fullmatch(pattern, out.strip(), re.S), f"$ {command}\n{out}\n-- the README shows:\n{shown}"
        await wait_until(lambda: server.open == 0, "the request to be over")


def test_the_readme_says_how_to_start_it_and_names_every_script() -> None:
    """The commands are those that the server takes and prints; the table is complete."""
    shell = [block for language, block in BLOCKS if language == "sh"]
    assert shell == [
        ".venv/bin/python examples/model_server/model_server.py\n",
        "HOTDESK_LLM_BASE_URL=http://127.0.0.1:9100/v1 make run\n",
    ]
    table = README[README.index("|---|") : README.index("## In tests")]
    assert set(re.findall(r"`([\w-]+)`", table)) == set(SCRIPTS)
