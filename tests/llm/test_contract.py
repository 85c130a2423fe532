"""Our requests and the official client's, side by side, to one server with one script: they are the same request."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import socket
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest
from model_server import ModelServer, Script, Seen
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    chat_completion,
    chat_completion_chunk,
)
from tests.llm.asking import HELLO, OpenModels, settings_of

from hotdesk.config import ModelSettings
from hotdesk.llm import events
from hotdesk.llm.request import Asked
from hotdesk.llm.retry import may_retry, retry_after
from hotdesk_sdk import LlmError, LlmRefused, LlmTimeout, LlmUnavailable

DIFFERS = {
    "connection": "httpx says keep-alive aloud; in HTTP/1.1 it goes without saying",
    "accept-encoding": "ours is identity: what is packed comes late, and a stream is not to",
    "x-stainless-retry-count": "ours is made once for all requests, and says 0",
}
"""The headers that may differ, with the reason. Nothing else may."""

UNICODE = [{"role": "user", "content": "退款 🙂\u2028"}]
SYSTEM: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hello! What can I do?"},
    {"role": "user", "content": "where is order 1001?"},
]
IMAGE: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is it?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        ],
    }
]
RESULTS: list[dict[str, Any]] = [
    {"role": "user", "content": "order 1001?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"n":1}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "shipped"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": name, "parameters": {"type": "object", "properties": {}}},
    }
    for name in ("look", "walk")
]
CALLS = [("look", {"for": "it " * 20}), ("walk", {"to": "你好"})]
SOON = {"retry-after-ms": "10"}


@dataclass(frozen=True, slots=True)
class Case:
    """A question, and the scripts that answer it in turn."""

    scripts: tuple[Script, ...] = (Script(text="Hello there, friend"),)
    stream: bool = False
    messages: Any = field(default_factory=lambda: HELLO)
    ask: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    tries: int = 1


def failing(status: int, headers: Mapping[str, str] | None = None, *, tries: int = 1, **more: Any) -> Case:
    """Each try is refused alike; the message is the provider's own."""
    told = {"message": f"The provider's own words for {status}", "type": "t", "code": "c", "param": None}
    script = Script(status=status, error=told, headers=headers or {}, **more)
    return Case((script,) * tries, tries=tries)


def both(cases: dict[str, Case]) -> dict[str, Case]:
    """Each case whole and streamed."""
    found = {}
    for name, case in cases.items():
        found[name] = case
        found[f"{name}, streamed"] = dataclasses.replace(case, stream=True)
    return found


ONCE = (Script(status=503, headers=SOON), Script(text="Hello there, friend"))

CASES = both(
    {
        "plain": Case(),
        "unicode": Case((Script(text="退款需要三天 🙂 ¿sí? \u2028"),), messages=UNICODE),
        "system and history": Case(messages=SYSTEM),
        "temperature 0": Case(ask={"temperature": 0.0}),
        "max_tokens": Case(ask={"max_tokens": 77}),
        "temperature and max_tokens of the settings": Case(settings={"temperature": 0.5, "max_tokens": 5}),
        "tools": Case((Script(tool_calls=CALLS),), ask={"tools": TOOLS}),
        "a tool without arguments": Case((Script(tool_calls=[("look", "")]),), ask={"tools": TOOLS}),
        "a tool's results": Case(messages=RESULTS, ask={"tools": TOOLS}),
        "an image": Case(messages=IMAGE),
        "extra body": Case(ask={"top_p": 0.5, "seed": 7, "user": "v"}, settings={"body": {"reasoning_effort": "low"}}),
        "extra headers": Case(settings={"headers": {"X-Shop": "7", "OpenAI-Project": "p-1", "X-List": "a, b"}}),
        "a header in place of the user agent": Case(settings={"headers": {"User-Agent": "shop/1"}}),
        "refusal": Case((Script(pieces=(), refusal="I cannot help with that."),)),
        "finish length": Case((Script(text="one two", finish="length"),)),
        "empty content": Case((Script(pieces=()),)),
        "usage": Case((Script(text="one two", usage=(1234, 56)),)),
        "no usage": Case((Script(text="one two", usage=False),), settings={"usage_in_streams": False}),
        "reasoning": Case((Script(text="one two", reasoning="let me think"),)),
        "noise, and another choice": Case((Script(text="one two three", noise=True, other_choices=True),)),
        "a base URL with a path and a slash": Case(path="/team%20a/"),
        "400": failing(400),
        "401": failing(401),
        "403": failing(403),
        "404": failing(404),
        "409": failing(409, SOON, tries=3),
        "422": failing(422),
        "408": failing(408, SOON, tries=3),
        "429 with retry-after-ms": failing(429, SOON, tries=3),
        "429 with Retry-After": failing(429, {"retry-after": "0.01"}, tries=3),
        "429 not to be tried again": failing(429, {"x-should-retry": "false"}),
        "400 to be tried again": failing(400, {"x-should-retry": "true", **SOON}, tries=3),
        "429 with a wait over two minutes": failing(429, {"retry-after": "121"}),
        "500": failing(500, SOON, tries=3),
        "503": failing(503, SOON, tries=3),
        "529": failing(529, SOON, tries=3),
        "503 once": Case(ONCE, tries=2),
        "an error that is no JSON": Case((Script(status=400, error=b"Bad gateway, sorry"),)),
        "an error that is a text": Case((Script(status=400, error={"error": "just a text"}),)),
        "an error without a body": Case((Script(status=400, error=b""),)),
    }
) | {
    "keep-alive comments": Case((Script(text="one two", first_s=0.05, gap_s=0.02, keepalive_s=0.01),), stream=True),
    "CRLF": Case((Script(text="one two", crlf=True, write_bytes=3),), stream=True),
    "UTF-8 split over reads": Case((Script(text="退款 🙂 天", write_bytes=1),), stream=True),
    "no [DONE]": Case((Script(text="one two", end_without_done=True),), stream=True),
    "no role event": Case((Script(text="one two", role_first=False),), stream=True),
    "a null as first content": Case((Script(text="one two", role_content=None),), stream=True),
    "an answer that closes": Case((Script(text="one two", connection_close=True),), stream=True),
}  # fmt: skip

MEANS: dict[type[openai.OpenAIError], type[LlmError]] = {
    openai.BadRequestError: LlmRefused,
    openai.AuthenticationError: LlmRefused,
    openai.PermissionDeniedError: LlmRefused,
    openai.NotFoundError: LlmRefused,
    openai.UnprocessableEntityError: LlmRefused,
    openai.ConflictError: LlmUnavailable,
    openai.RateLimitError: LlmUnavailable,
    openai.InternalServerError: LlmUnavailable,
    openai.APIStatusError: LlmUnavailable,  # of the tried statuses only 408 has no class of its own
    openai.APIConnectionError: LlmUnavailable,
    openai.APIError: LlmUnavailable,
    openai.APITimeoutError: LlmTimeout,
}
"""Which of our errors stands for which of theirs."""


@dataclass(slots=True)
class Outcome:
    """What came of a question, by either way."""

    text: str = ""
    finish: str = ""
    usage: tuple[int, int] | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    error: type[LlmError] | None = None
    message: str = ""


async def ask_ours(open_models: OpenModels, url: str, case: Case) -> Outcome:
    llm = await open_models(url, api_key="sk-a-key", **case.settings)
    own = {name: case.ask[name] for name in ("temperature", "max_tokens", "tools") if name in case.ask}
    asked = Asked(case.messages, **own, extra={k: v for k, v in case.ask.items() if k not in own})
    outcome = Outcome()
    try:
        if case.stream:
            stream: Any = llm.stream(asked)
            outcome.text = "".join([text async for text in stream])
        else:
            stream = await llm.complete(asked)
            outcome.text = stream.text
        outcome.finish = stream.finish
        outcome.usage = stream.usage and (stream.usage.prompt_tokens, stream.usage.completion_tokens)
        outcome.calls = [(call.name, call.arguments) for call in stream.tool_calls]
    except LlmError as exc:
        outcome.error, outcome.message = type(exc), exc.reason
    return outcome


def official_body(case: Case, settings: ModelSettings) -> dict[str, Any]:
    """What a reader of the official client's manual would write for the same."""
    body: dict[str, Any] = {"model": "m", "messages": case.messages, **case.ask}
    for name in ("temperature", "max_tokens"):
        if (value := getattr(settings, name)) is not None:
            body.setdefault(name, value)
    if case.stream:
        body["stream"] = True
        if settings.usage_in_streams:
            body["stream_options"] = {"include_usage": True}
    if settings.body:
        body["extra_body"] = settings.body
    return body


async def ask_official(client: openai.AsyncOpenAI, case: Case, settings: ModelSettings) -> Outcome:
    outcome = Outcome()
    try:
        answer: Any = await client.chat.completions.create(**official_body(case, settings))
        if case.stream:
            await read_official(answer, outcome)
        else:
            choice = answer.choices[0]
            outcome.text = choice.message.content or choice.message.refusal or ""
            outcome.finish = choice.finish_reason
            outcome.usage = answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens)
            calls = choice.message.tool_calls or []
            outcome.calls = [(call.function.name, call.function.arguments) for call in calls]
    except openai.OpenAIError as exc:
        outcome.error = next(MEANS[kind] for kind in type(exc).__mro__ if kind in MEANS)
        outcome.message = str(exc)
    return outcome


async def read_official(stream: Any, outcome: Outcome) -> None:
    calls: dict[int, list[str]] = {}
    async for chunk in stream:
        if chunk.usage:
            outcome.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.index == 0:
                outcome.text += (choice.delta.content or "") + (choice.delta.refusal or "")
                outcome.finish = choice.finish_reason or outcome.finish
                for call in choice.delta.tool_calls or ():
                    said = calls.setdefault(call.index, ["", ""])
                    said[0] += call.function.name or ""
                    said[1] += call.function.arguments or ""
    outcome.calls = [(name, arguments) for name, arguments in calls.values()]


def headers_of(seen: Seen) -> dict[str, str]:
    """The headers that have to be the same. Bodies differ in the order of their keys alone."""
    return {name.lower(): value for name, value in seen.headers.items() if name.lower() not in DIFFERS}


def client_of(url: str, settings: ModelSettings, **more: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=url, api_key="sk-a-key", default_headers=settings.headers or None, timeout=settings.total_s, **more
    )


@pytest.mark.parametrize("name", CASES)
async def test_both_ways_are_one(model_server: ModelServer, open_models: OpenModels, name: str) -> None:
    """The same requests, as many of them, with the same headers to the same place, and the same comes of them."""
    case = CASES[name]
    url = model_server.base_url + case.path
    settings = settings_of(url, **case.settings)
    model_server.next(*case.scripts)
    ours = await ask_ours(open_models, url, case)
    mine = list(model_server.requests)
    model_server.requests.clear()
    model_server.next(*case.scripts)
    async with client_of(url, settings) as client:
        theirs = await ask_official(client, case, settings)
    compare_requests(mine, model_server.requests, case.tries)
    compare_outcomes(ours, theirs, case)


def compare_requests(ours: list[Seen], theirs: list[Seen], tries: int) -> None:
    assert len(ours) == len(theirs) == tries
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.body == other.body
        assert (mine.path, dict(mine.query)) == (other.path, dict(other.query))
        assert headers_of(mine) == headers_of(other)


def compare_outcomes(ours: Outcome, theirs: Outcome, case: Case) -> None:
    if theirs.error is None:
        assert ours == theirs
        return
    assert ours.error is theirs.error
    assert ours.message == theirs.message
    told = case.scripts[-1].error
    if isinstance(told, Mapping) and "message" in told:
        assert told["message"] in ours.message


async def test_the_list_of_differences_is_as_short_as_can_be(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """Each header that may differ does; one that does no more leaves the list."""
    model_server.next(*ONCE, *ONCE)
    case = CASES["503 once"]
    await ask_ours(open_models, model_server.base_url, case)
    settings = settings_of(model_server.base_url)
    async with client_of(model_server.base_url, settings) as client:
        await ask_official(client, case, settings)
    ours, theirs = model_server.requests[1], model_server.requests[3]
    for name in DIFFERS:
        assert ours.headers.get(name) != theirs.headers.get(name), name


@pytest.mark.parametrize("stream", [False, True])
async def test_azure_is_asked_the_same(model_server: ModelServer, open_models: OpenModels, stream: bool) -> None:
    """Its URL has the deployment and the version, its key goes in a header of its own."""
    endpoint = model_server.base_url.removesuffix("/v1")
    case = Case(stream=stream)
    ours = await ask_ours(open_models, endpoint, Case(stream=stream, settings={"api_version": "2026-01-01"}))
    settings = settings_of(endpoint, api_version="2026-01-01")
    client = openai.AsyncAzureOpenAI(
        azure_endpoint=endpoint, api_version="2026-01-01", api_key="sk-a-key", timeout=settings.total_s
    )
    async with client:
        theirs = await ask_official(client, case, settings)
    mine, other = model_server.requests
    compare_requests([mine], [other], 1)
    compare_outcomes(ours, theirs, case)
    assert mine.path == "/openai/deployments/m/chat/completions"
    assert dict(mine.query) == {"api-version": "2026-01-01"}
    assert mine.headers["api-key"] == "sk-a-key"
    assert "authorization" not in mine.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_that_is_refused(open_models: OpenModels, stream: bool) -> None:
    """Nobody listens: both say that they could not connect."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        case = Case(stream=stream, settings={"retries": 0})
        ours = await ask_ours(open_models, url, case)
        settings = settings_of(url)
        async with client_of(url, settings, max_retries=0) as client:
            theirs = await ask_official(client, case, settings)
    assert ours.error is theirs.error is LlmUnavailable


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_cut_before_the_headers_is_tried_as_often(
    model_server: ModelServer, open_models: OpenModels, stream: bool
) -> None:
    """Three tries, the first included, by both."""
    cut = Script(cut_before_headers=True)
    case = Case(stream=stream)
    model_server.default = cut
    settings = settings_of(model_server.base_url)
    async with client_of(model_server.base_url, settings) as client:
        ours, theirs = await asyncio.gather(
            ask_ours(open_models, model_server.base_url, case), ask_official(client, case, settings)
        )
    assert ours.error is theirs.error is LlmUnavailable
    by_us = [seen for seen in model_server.requests if "x-stainless-retry-count" in seen.headers]
    assert len(model_server.requests) == 6
    assert len(by_us) == 6


async def test_an_error_event_is_an_error_for_both(model_server: ModelServer, open_models: OpenModels) -> None:
    """Mid-stream, with the provider's message."""
    case = Case(stream=True)
    script = Script(text="one two three", error_event_after=2, error={"message": "it broke", "type": "t"})
    model_server.next(script, script)
    ours = await ask_ours(open_models, model_server.base_url, case)
    settings = settings_of(model_server.base_url)
    async with client_of(model_server.base_url, settings) as client:
        theirs = await ask_official(client, case, settings)
    assert ours.error is theirs.error is LlmUnavailable
    assert (ours.message, theirs.message) == ("it broke", "it broke")
    assert len(model_server.requests) == 2


async def test_a_filtered_answer_is_told_where_theirs_only_says_a_reason(
    model_server: ModelServer, open_models: OpenModels
) -> None:
    """The one outcome that is meant to differ: they end with a finish reason, and ours is a refusal with its cause."""
    case = Case(stream=True)
    script = Script(pieces=(), finish="content_filter")
    model_server.next(script, script)
    ours = await ask_ours(open_models, model_server.base_url, case)
    settings = settings_of(model_server.base_url)
    async with client_of(model_server.base_url, settings) as client:
        theirs = await ask_official(client, case, settings)
    assert theirs.finish == "content_filter"
    assert ours.error is LlmRefused
    assert "content filter" in ours.message


async def test_errors_at_one_time_keep_their_words_apart(model_server: ModelServer, open_models: OpenModels) -> None:
    """Fifty requests that fail together are each told their own failure."""
    llm = await open_models(model_server.base_url, retries=0)

    def refuse(body: dict[str, Any]) -> Script:
        return Script(status=400, error={"message": f"no {body['messages'][0]['content']}!", "type": "t"})

    async def ask(number: int) -> str:
        try:
            await llm.complete(Asked([{"role": "user", "content": f"number-{number}"}]))
        except LlmRefused as exc:
            return exc.reason
        raise AssertionError("it did not fail")

    model_server.default = refuse
    reasons = await asyncio.gather(*map(ask, range(50)))
    for number, reason in enumerate(reasons):
        assert f"no number-{number}!" in reason


WAITS = ["0", "1", "0.5", "-3", "119.9", "120", "120.1", "1e9", "1e999", "nan", "inf", "Infinity", "-inf", "", "soon",
         "1,5", " 7 ", "0x10", "１２", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2099 07:28:00 GMT", "21 Oct 2099",
         "Wed, 21 Oct 2099 07:28:00 -0000", "Thu, 01 Jan 99999 00:00:00 GMT"]  # fmt: skip


def header_sets() -> Iterator[dict[str, str]]:
    yield {}
    chance = random.Random(7)
    for name in ("retry-after", "retry-after-ms"):
        yield from ({name: wait} for wait in WAITS)
    for first, second in itertools.product(WAITS, WAITS):
        headers = {"retry-after": first, "retry-after-ms": second}
        if chance.random() < 0.3:
            headers["x-should-retry"] = chance.choice(["true", "false", "maybe", "TRUE"])
        yield headers


async def test_who_is_tried_again_is_theirs_to_say() -> None:
    """For every kind of wait, date and wish, and every status, our rule is the official client's."""
    client = openai.AsyncOpenAI(api_key="k")
    request = httpx2.Request("POST", "http://provider.test/v1")
    try:
        for headers in header_sets():
            clean = {name: value for name, value in headers.items() if value.isascii()}
            for status in (400, 401, 404, 408, 409, 422, 429, 499, 500, 503, 529):
                response = httpx2.Response(status, headers=clean, request=request)
                assert may_retry(status, clean) == client._should_retry(response), (status, clean)
            theirs = client._parse_retry_after_header(httpx2.Headers(clean))
            ours = retry_after(clean)
            if theirs is not None and 0 < theirs <= 120:
                assert ours == pytest.approx(theirs, abs=2), clean
            else:  # no wait that anybody obeys
                assert ours is None or not 0 < ours <= 120, clean
    finally:
        await client.close()


def fields_of(model: Any) -> set[str]:
    return set(model.model_fields)


OURS_AND_THEIRS = [
    (events.Chunk, ChatCompletionChunk, {"error", "message"}),
    (events._Choice, chat_completion_chunk.Choice, set()),
    (events._Delta, chat_completion_chunk.ChoiceDelta, {"reasoning_content", "reasoning"}),
    (events.ToolDelta, chat_completion_chunk.ChoiceDeltaToolCall, set()),
    (events._Function, chat_completion_chunk.ChoiceDeltaToolCallFunction, set()),
    (events.Answer, ChatCompletion, {"error", "message"}),
    (events._Said, chat_completion.Choice, set()),
    (events._Message, ChatCompletionMessage, set()),
    (events.Usage, openai.types.CompletionUsage, set()),
]
"""What of ours is read from what of theirs; the third is what other providers add, and errors, which have no type."""


@pytest.mark.parametrize(("ours", "theirs", "own"), OURS_AND_THEIRS)
def test_every_field_that_is_read_is_one_of_theirs(ours: Any, theirs: Any, own: set[str]) -> None:
    """A field that is renamed in `openai.types.chat` fails here, and one of our own that has become theirs, too."""
    assert set(ours.__struct_fields__) - own <= fields_of(theirs)
    assert not own & fields_of(theirs)


def test_every_finish_reason_is_known() -> None:
    """A new reason to end is a reason to look at what is done with it."""
    annotation = chat_completion_chunk.Choice.model_fields["finish_reason"].annotation
    reasons = {one for part in typing.get_args(annotation) for one in typing.get_args(part)}
    assert reasons == {"stop", "length", "tool_calls", "content_filter", "function_call"}
