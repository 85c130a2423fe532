"""The bundled plugins together, as `make run` serves them."""

from __future__ import annotations

from pathlib import Path

from conftest import StartDesk, wait_until

PLUGINS = Path(__file__).parents[2] / "plugins"


def sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in PLUGINS.iterdir() if path.suffix in (".py", ".toml")}


async def test_they_work_together(start_desk: StartDesk) -> None:
    """One conversation through those that need no model: greeted, answered, masked, handed over."""
    desk = await start_desk(sources())
    replies = [
        (await desk.say(text))["replies"][0] for text in ("hello", "you damn refund", "投诉", "a human, please", "白痴")
    ]
    assert [reply["plugin"] for reply in replies] == ["greeting", "faq", "greeting", "intent", "greeting"]


async def test_they_leave_nothing_behind(start_desk: StartDesk) -> None:
    """Loaded again and again under traffic, each old generation goes, and nothing of it is left."""
    desk = await start_desk(sources())
    names = sorted(name.removesuffix(".py") for name in sources() if name.endswith(".py"))
    assert names == ["chatgpt", "faq", "greeting", "intent", "order_status", "sensitive_words"]
    for number in range(2, 6):
        for name in names:
            desk.write(f"{name}.py", (PLUGINS / f"{name}.py").read_text() + f"\n# {number}\n")
        for name in names:
            await desk.wait_generation(name, number)
        assert await desk.reply("refund") is not None
    text = await wait_until(lambda: _gone(desk), "old generations gone")
    assert text
    for name in names:
        plugin = await desk.plugin(name)
        assert (plugin["leftovers"], plugin["error"], plugin["failures"]) == ([], None, 0)


async def _gone(desk) -> bool:  # type: ignore[no-untyped-def]
    async with desk.http.get(f"{desk.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return f"hotdesk_generations_alive {len(list(PLUGINS.glob('*.py')))}.0" in lines
