"""What is tried when a try fails, in which order, and when it is too late; and how many are under way at once."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer, Script
from tests.llm.asking import ASKED, HELLO, OpenModels, failure_of, sample, settings_of, text_of, texts_of

from conftest import StartDesk, wait_until
from hotdesk.config import LlmSettings
from hotdesk.llm.client import Llm
from hotdesk.llm.model import REST_AFTER
from hotdesk_sdk import LlmError, LlmRefused, LlmUnavailable
from hotdesk_sdk.testing import Desk

ROOT = Path(__file__).parents[2]
SOON = {"retry-after-ms": "10"}
BUSY = Script(status=503, headers=SOON)


def gaps(server: ModelServer) -> list[float]:
    """The seconds between one request and the next."""
    times = [seen.at for seen in server.requests]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def asked_models(server: ModelServer) -> list[str]:
    return [str((seen.body or {})["model"]) for seen in server.requests]


# -- again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        BUSY,
        Script(status=429, headers=SOON),
        Script(cut_before_headers=True),
        Script(cut_after=0),
        Script(text="never", half_after=0),
        Script(error_event_after=0),
        Script(garbage=True),
        Script(raw=[b""]),
    ],
    ids=["503", "429", "cut before headers", "cut after headers", "half event", "error event", "garbage", "empty"],
)
async def test_before_the_first_text_a_failure_is_tried_again(
    model_server: ModelServer, open_models: OpenModels, bad: Script
) -> None:
    """Whatever it was, the visitor sees one answer, and nothing of the failure."""
    llm = await open_models(model_server.base_url)
    model_server.next(bad)
    assert await text_of(llm) == "Hello there, friend"
    assert len(model_server.requests) == 2
    assert sample(llm, "hotdesk_llm_retries_total", model="default") == 1


async def test_the_waits_between_tries_double(model_server: ModelServer, open_models: OpenModels) -> None:
    """Half a second and a second, less up to a quarter, where the provider wishes nothing."""
    llm = await open_models(model_server.base_url)
    model_server.default = Script(status=500)
    _, exc = await failure_of(llm)
    assert isinstance(exc, LlmUnavailable)
    first, second = gaps(model_server)
    assert 0.37 < first < 0.8
    assert 0.74 < second < 1.4


@pytest.mark.parametrize("status", [429, 503, 400])
async def test_the_providers_wish_is_kept(model_server: ModelServer, open_models: OpenModels, status: int) -> None:
    """`Retry-After` in seconds, and in milliseconds, whatever the status is that may be tried again."""
    llm = await open_models(model_server.base_url)
    again = {"x-should-retry": "true"}
    model_server.next(
        Script(status=status, headers={"retry-after": "0.2", **again}),
        Script(status=status, headers={"retry-after-ms": "20", "retry-after": "60", **again}),
    )
    assert await text_of(llm) == "Hello there, friend"
    first, second = gaps(model_server)
    assert 0.19 < first < 0.36
    assert 0.019 < second < 0.36


async def test_a_wish_may_be_a_date(model_server: ModelServer, open_models: OpenModels) -> None:
    """Of HTTP; a date in the past is no wish."""
    llm = await open_models(model_server.base_url, retries=1)
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)
    model_server.next(Script(status=503, headers={"retry-after": soon}))
    assert await text_of(llm) == "Hello there, friend"
    [gap] = gaps(model_server)
    assert 0.9 < gap < 2.4


@pytest.mark.parametrize("headers", [{"retry-after": "121"}, {"retry-after-ms": "120001"}, {"retry-after": "9" * 400}])
async def test_a_wish_for_over_two_minutes_is_told_and_not_waited_for(
    model_server: ModelServer, open_models: OpenModels, headers: dict[str, str]
) -> None:
    """The plugin hears of it; another model is asked at once."""
    models = {"default": {"model": "first"}, "other": {"model": "second"}}
    llm = await open_models(model_server.base_url, models=models)
    model_server.next(Script(status=429, headers=headers))
    _, exc = await failure_of(llm)
    assert isinstance(exc, LlmUnavailable)
    assert exc.retry_after_s is not None
    assert exc.retry_after_s > 120
    assert len(model_server.requests) == 1
    llm = await open_models(model_server.base_url, models=models, fallback=["other"])
    model_server.next(Script(status=429, headers=headers))
    assert await text_of(llm) == "Hello there, friend"
    assert asked_models(model_server) == ["first", "first", "second"]


async def test_a_wish_longer_than_all_the_time_there_is_is_not_waited_for(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """It ends at once, not when the time is over."""
    llm = await open_models(model_server.base_url, total_s=5)
    model_server.next(Script(status=503, headers={"retry-after": "6"}))
    began = time.monotonic()
    await failure_of(llm)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_is_not_tried_again(model_server: ModelServer, open_models: OpenModels, status: int) -> None:
    """Asking again is no use; it says so, with the status."""
    llm = await open_models(model_server.base_url)
    model_server.next(Script(status=status))
    _, exc = await failure_of(llm)
    assert isinstance(exc, LlmRefused)
    assert exc.status == status
    assert len(model_server.requests) == 1


# -- too late ------------------------------------------------------------------------------------------------------

CUTS = {
    "reset": Script(text="one two three", cut_after=2),
    "end of connection": Script(text="one two three", cut_after=2, cut_with="fin"),
    "half event": Script(text="one two three", half_after=2),
    "error event": Script(text="one two three", error_event_after=2),
    "garbage": Script(raw=[b'data: {"choices":[{"delta":{"content":"one two"}}]}\n\n', 0.05, b"data: ]\n\n"]),
    "garbage in one read": Script(raw=[b'data: {"choices":[{"delta":{"content":"one two"}}]}\n\ndata: ]\n\n']),
    "no end": Script(raw=[b'data: {"choices":[{"delta":{"content":"one two"}}]}\n\n']),
    "content filter": Script(text="one two", finish="content_filter"),
    "stall": Script(text="one two three", stall_after=2),
    "endless line": Script(pieces=["one two"], endless_line=True),
    "huge event": Script(text="one two", huge_event_bytes=10_000_000),
}


@pytest.mark.parametrize("name", CUTS)
async def test_after_the_first_text_nothing_is_tried(
    model_server: ModelServer, open_models: OpenModels, name: str
) -> None:
    """Neither again nor another model: what was said stands, and the failure says that it was."""
    models = {"default": {"model": "first"}, "other": {"model": "second"}}
    llm = await open_models(model_server.base_url, models=models, fallback=["other"], gap_s=0.3)
    model_server.next(CUTS[name])
    said, exc = await failure_of(llm)
    assert said == "one two"
    assert exc.shown
    assert exc.public == "the language model broke off"
    assert asked_models(model_server) == ["first"]
    assert sample(llm, "hotdesk_llm_requests_total", model="default", outcome="cut") == 1
    await wait_until(lambda: model_server.open == 0, "the model's connection is closed")


async def test_what_came_before_a_failure_is_shown_before_it(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """Also where both come with one read of the socket."""
    llm = await open_models(model_server.base_url)
    model_server.next(CUTS["garbage in one read"])
    stream = llm.stream(ASKED)
    assert await anext(stream) == "one two"
    with pytest.raises(LlmUnavailable, match="can't be read"):
        await anext(stream)
    assert [text async for text in stream] == []


@pytest.mark.parametrize("name", CUTS)
async def test_the_visitor_sees_a_cut_as_one(model_server: ModelServer, name: str) -> None:
    """What was said is the reply, marked cut, and an error event says so; no second answer begins."""
    model_server.next(CUTS[name])
    settings = {"base_url": model_server.base_url, "gap_s": 0.3}
    async with Desk.with_plugin(ROOT / "plugins/chatgpt.py", llm=settings) as desk:
        said = await desk.say("hello")
        assert (said.text, "".join(said.chunks)) == ("one two", "one two")
        assert said.metadata["cut"] is True
        assert said.error == ("stream_cut", "the language model broke off")
        [_, reply] = await desk.record()
        assert reply.text == "one two"
        assert (await desk.say("again")).text == "Hello there, friend"
    assert len(model_server.requests) == 2


async def test_a_door_tells_a_cut_after_the_reply(model_server: ModelServer, start_desk: StartDesk) -> None:
    """On the WebSocket: chunks, the reply with its mark, and the error."""
    model_server.next(CUTS["reset"])
    llm = LlmSettings(models={"default": settings_of(model_server.base_url)})
    files = {name: (ROOT / "plugins" / name).read_text() for name in ("chatgpt.py", "chatgpt.toml")}
    desk = await start_desk(files, llm=llm)
    seen: list[dict[str, Any]] = []
    async with desk.http.ws_connect(f"{desk.url}/v1/ws?conversation=c") as socket:
        await socket.send_json({"type": "message", "id": "m", "text": "hello"})
        while not seen or seen[-1]["type"] != "error":
            seen.append(await socket.receive_json(timeout=5))
    kinds = [event["type"] for event in seen if event["type"] not in ("chunk", "accepted")]
    assert kinds == ["reply", "error"]
    assert "".join(event["text"] for event in seen if event["type"] == "chunk") == "one two"
    assert seen[-1] == {"type": "error", "code": "stream_cut", "message": "the language model broke off", "to": "m"}


# -- others --------------------------------------------------------------------------------------------------------

THREE = {"default": {"model": "first"}, "b": {"model": "second"}, "a": {"model": "third"}}


async def test_fallbacks_are_asked_in_the_order_of_the_settings(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """Each after the tries of the one before; the answer says who gave it."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b", "a"], retries=1)
    model_server.next(BUSY, BUSY, BUSY, BUSY)
    stream = llm.stream(ASKED)
    assert "".join(await texts_of(stream)) == "Hello there, friend"
    assert stream.model == "a"
    assert asked_models(model_server) == ["first", "first", "second", "second", "third"]
    assert sample(llm, "hotdesk_llm_fallbacks_total", model="default") == 1
    assert sample(llm, "hotdesk_llm_fallbacks_total", model="b") == 1
    model_server.next(Script(status=400), Script(status=401))
    assert (await llm.complete(ASKED)).model == "a"


async def test_a_named_model_is_asked_first(model_server: ModelServer, open_models: OpenModels) -> None:
    """And then the fallbacks, itself not twice."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b", "a"], retries=0)
    model_server.next(BUSY)
    _ = [text async for text in llm.stream(ASKED, "a")]
    assert asked_models(model_server) == ["third", "second"]


async def test_the_last_failure_is_the_one_that_is_told(model_server: ModelServer, open_models: OpenModels) -> None:
    """With the model that it is of."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b"], retries=0)
    model_server.next(BUSY, Script(status=401, error={"message": "wrong key", "type": "t"}))
    said, exc = await failure_of(llm)
    assert (said, exc.model) == ("", "b")
    assert "wrong key" in str(exc)


async def test_a_model_that_fails_again_and_again_rests(model_server: ModelServer, open_models: OpenModels) -> None:
    """It is passed over while another can answer, and asked all the same when it is the only one."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b"], retries=0)
    broken = Script(status=500)
    model_server.default = Script(
        answers=lambda body: broken if body["model"] == "first" else Script(text="Hello there, friend")
    )
    for _ in range(REST_AFTER):
        await text_of(llm)
    assert asked_models(model_server) == ["first", "second"] * REST_AFTER
    model_server.requests.clear()
    await text_of(llm)
    assert asked_models(model_server) == ["second"]
    alone = await open_models(model_server.base_url, model="first", retries=0)
    for _ in range(REST_AFTER + 1):
        await failure_of(alone)
    assert asked_models(model_server) == ["second", *["first"] * (REST_AFTER + 1)]


async def test_what_one_visitor_asked_does_not_lay_a_model_to_rest(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """A refused message says nothing of the next one."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b"], retries=0)
    model_server.default = Script(
        answers=lambda body: Script(status=400) if body["model"] == "first" else Script(text="Hello there, friend")
    )
    for _ in range(REST_AFTER + 2):
        await text_of(llm)
    assert asked_models(model_server) == ["first", "second"] * (REST_AFTER + 2)


async def test_an_answer_wakes_a_model(model_server: ModelServer, open_models: OpenModels) -> None:
    """Failures count in a row only."""
    llm = await open_models(model_server.base_url, models=THREE, fallback=["b"], retries=0)
    for _ in range(3):
        model_server.next(*[Script(status=500), Script(text="x")] * (REST_AFTER - 1))
        for _ in range(REST_AFTER - 1):
            await text_of(llm)
        assert await text_of(llm) == "Hello there, friend"
        assert asked_models(model_server)[-1] == "first"


async def test_nobody_of_that_name_is_said_with_the_names_there_are(open_models: OpenModels) -> None:
    """And without any model, what to set."""
    llm = await open_models("http://127.0.0.1:9/v1", models=THREE)
    with pytest.raises(LlmUnavailable, match="no model is called that in the settings; there are default, b, a"):
        llm.stream(ASKED, "c")
    none = Llm(LlmSettings(), llm.models["default"]._metrics.__class__(_registry()))
    with pytest.raises(LlmUnavailable, match="HOTDESK_LLM_API_KEY"):
        none.choose(None)


def _registry() -> Any:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


# -- how many at once ----------------------------------------------------------------------------------------------


async def test_who_waits_gets_a_place_in_turn(model_server: ModelServer, open_models: OpenModels) -> None:
    """Never more than `concurrency` are under way, and nobody overtakes."""
    llm = await open_models(model_server.base_url, concurrency=2, queue=100)
    model_server.default = Script(text="one two", gap_s=0.005)
    most = 0

    async def ask(number: int) -> None:
        nonlocal most
        async for _ in llm.stream(type(ASKED)([*HELLO, {"role": "user", "content": str(number)}])):
            most = max(most, model_server.open, llm.models["default"].running)

    await asyncio.gather(*map(ask, range(20)))
    assert most == 2
    numbers = [int((seen.body or {})["messages"][1]["content"]) for seen in model_server.requests]
    assert all(abs(number - place) <= 1 for place, number in enumerate(numbers))  # two connections may race
    assert llm.models["default"].running == llm.models["default"].waiting == 0


async def test_a_full_queue_refuses_at_once(model_server: ModelServer, open_models: OpenModels) -> None:
    """With when to come again; another model is asked where there is one."""
    models = {"default": {"model": "first", "concurrency": 1, "queue": 1}, "b": {"model": "second"}}
    llm = await open_models(model_server.base_url, models=models)
    model_server.default = Script(text="one two", stall_after=1)
    held = llm.stream(ASKED)
    await anext(held)
    waiting = asyncio.create_task(text_of(llm))
    await wait_until(lambda: llm.models["default"].waiting, "one waits")
    said, exc = await failure_of(llm)
    assert isinstance(exc, LlmUnavailable)
    assert (said, exc.retry_after_s) == ("", 1.0)
    assert exc.reason == "1 requests are under way and 1 wait"
    waiting.cancel()
    held.close()
    await asyncio.wait([waiting])
    assert llm.models["default"].running == llm.models["default"].waiting == 0


async def test_who_gives_up_in_the_queue_frees_the_place(model_server: ModelServer, open_models: OpenModels) -> None:
    """In the moment before it is its turn, in the very moment, and after; nothing is asked for it."""
    llm = await open_models(model_server.base_url, concurrency=1)
    model = llm.models["default"]
    for order in ("before", "same moment, place first", "same moment, cancel first"):
        model_server.next(Script(text="one two", stall_after=1))
        held = llm.stream(ASKED)
        await anext(held)
        waiting = [asyncio.create_task(text_of(llm)) for _ in range(3)]
        await wait_until(lambda: model.waiting == 3, "three wait")
        if order == "same moment, place first":
            held.close()
            waiting[0].cancel()
        elif order == "same moment, cancel first":
            waiting[0].cancel()
            held.close()
        else:
            waiting[0].cancel()
            await asyncio.wait(waiting[:1])
            held.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError), order
        assert results[1:] == ["Hello there, friend"] * 2, order
        assert (model.running, model.waiting) == (0, 0), order


async def test_no_place_is_lost_however_requests_end(model_server: ModelServer, open_models: OpenModels) -> None:
    """Answered, failed, cut, cancelled anywhere, closed, forgotten: afterwards all places are free."""
    llm = await open_models(model_server.base_url, concurrency=3, retries=1, gap_s=0.1)
    model = llm.models["default"]
    scripts = [BUSY, Script(cut_after=1), Script(text="a b c", gap_s=0.01), Script(stall_after=1), Script(status=400)]
    model_server.next(*scripts * 12)

    async def ask(number: int) -> None:
        stream = llm.stream(ASKED)
        try:
            async with asyncio.timeout(0.02 * (number % 10) if number % 3 else 5):
                async for _ in stream:
                    if number % 4 == 0:
                        break
        except (LlmError, TimeoutError):
            pass
        if number % 8 == 0:
            await stream.aclose()

    await asyncio.gather(*map(ask, range(60)))
    await wait_until(lambda: (model.running, model.waiting) == (0, 0), "all places are free")
    await wait_until(lambda: model_server.open == 0, "nothing is being answered")


async def test_a_stream_that_is_closed_by_another_task_asks_nothing_more(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """Wherever its pull stands: in the queue, connecting, before the first text, in backoff, in the stream."""
    for phase in ("queue", "connecting", "first token", "backoff", "stream"):
        llm = await open_models(model_server.base_url, concurrency=1, retries=5, first_token_s=0.6)
        model = llm.models["default"]
        model_server.requests.clear()
        script = {
            "connecting": Script(delay_s=60),
            "backoff": Script(status=503, headers={"retry-after-ms": "100"}),
        }.get(phase, Script(text="one two", stall_after=1 if phase == "stream" else 0))
        model_server.next(script)
        held = None
        if phase == "queue":
            held = llm.stream(ASKED)
            first = asyncio.create_task(anext(held))
            await wait_until(lambda: model_server.requests, "one is under way")
        stream = llm.stream(ASKED)
        said: list[str] = []
        task = asyncio.create_task(_collect(stream, said))
        ready: dict[str, Callable[[], Any]] = {
            "queue": lambda model=model: model.waiting == 1,
            "stream": lambda said=said: said,
            "backoff": lambda: model_server.requests and model_server.open == 0,
        }
        await wait_until(ready.get(phase, lambda: model_server.requests), phase)
        stream.close()
        stream.close()
        if held is not None:
            held.close()
            await asyncio.wait([first])
            assert isinstance(first.exception(), LlmError | StopAsyncIteration)
        async with asyncio.timeout(2):
            result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert result is None or isinstance(result, LlmError), phase
        await wait_until(lambda: model_server.open == 0, f"{phase}: the model's connection is closed")
        assert len(model_server.requests) == 1, phase
        assert (model.running, model.waiting) == (0, 0), phase
        outcomes = [sample(llm, "hotdesk_llm_requests_total", model="default", outcome=o) for o in ("cut", "cancelled")]
        assert outcomes == [0, 2 if phase == "queue" else 1], phase


async def _collect(stream: Any, said: list[str]) -> None:
    while batch := await stream.next_batch():
        said += batch


@pytest.mark.parametrize("stream", [True, False])
async def test_one_connection_serves_many_requests(
    model_server: ModelServer, open_models: OpenModels, stream: bool
) -> None:
    """One after another over the same connection: after whole answers, streams, and refusals that were read."""
    llm = await open_models(model_server.base_url, retries=0)
    for number in range(12):
        if number % 4 == 3:
            model_server.next(Script(status=400))
            await failure_of(llm)
        elif stream:
            await text_of(llm)
        else:
            await llm.complete(ASKED)
        await wait_until(lambda: model_server.open == 0, "the answer has ended")
    assert len({seen.connection for seen in model_server.requests}) == 1
    assert model_server.connections == 1


async def test_a_connection_that_was_closed_meanwhile_is_not_the_visitors_trouble(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """The next request has a new one."""
    llm = await open_models(model_server.base_url, retries=0)
    for _ in range(3):
        model_server.next(Script(text="one", connection_close=True))
        assert await text_of(llm) == "one"
        await wait_until(lambda: model_server.connections == 0, "the connection is closed")
    assert len({seen.connection for seen in model_server.requests}) == 3
