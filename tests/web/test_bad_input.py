"""Malformed requests and frames: each is answered in the one error shape, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import socket
import struct
import tracemalloc
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import structlog
from tests.web.visitors import (
    BINARY,
    TEXT,
    assert_error_frame,
    assert_one_shape,
    exchange,
    frame_bytes,
    raw_socket,
    request_bytes,
)

from conftest import Desk, wait_until

MESSAGES = "/v1/conversations/c/messages"
JSON = {"Content-Type": "application/json"}
MIB = 1024 * 1024


@dataclass(frozen=True)
class Bad:
    """A request that can't be taken, and the code that says so."""

    name: str
    code: str
    body: bytes | None = None
    method: str = "POST"
    path: str = MESSAGES
    headers: dict[str, str] = field(default_factory=lambda: JSON)

    def bytes(self) -> bytes:
        return request_bytes(self.method, self.path, self.headers, self.body)


def get(name: str, code: str, path: str, **headers: str) -> Bad:
    return Bad(name, code, None, "GET", path, headers)


def nested(depth: int) -> bytes:
    return b'{"text":"x","metadata":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"


BAD_BODIES = (
    Bad("no_body", "bad_json"),
    Bad("empty_body", "bad_json", b""),
    Bad("not_json", "bad_json", b"hello"),
    Bad("cut_short", "bad_json", b'{"text": "x'),
    Bad("two_documents", "bad_json", b'{"text":"a"}{"text":"b"}'),
    Bad("byte_order_mark", "bad_json", b'\xef\xbb\xbf{"text":"a"}'),
    Bad("utf16", "bad_json", '{"text":"a"}'.encode("utf-16")),
    Bad("bad_utf8", "bad_json", b'{"text":"\xff\xfe"}'),
    Bad("overlong_utf8", "bad_json", b'{"text":"\xc0\xaf"}'),
    Bad("surrogate_bytes", "bad_json", b'{"text":"\xed\xa0\x80"}'),
    Bad("lone_surrogate_escape", "bad_json", b'{"text":"\\ud800"}'),
    Bad("lone_low_surrogate", "bad_json", b'{"text":"a\\udc00b"}'),
    Bad("bad_escape", "bad_json", b'{"text":"\\x41"}'),
    Bad("raw_control_character", "bad_json", b'{"text":"a\x00b"}'),
    Bad("nan", "bad_json", b'{"text":"x","metadata":{"a":NaN}}'),
    Bad("an_array", "bad_message", b'["text"]'),
    Bad("null", "bad_message", b"null"),
    Bad("a_string", "bad_message", b'"hello"'),
    Bad("no_text", "bad_message", b"{}"),
    Bad("empty_text", "bad_message", b'{"text":""}'),
    Bad("text_number", "bad_message", b'{"text":5}'),
    Bad("text_null", "bad_message", b'{"text":null}'),
    Bad("text_list", "bad_message", b'{"text":["x"]}'),
    Bad("id_number", "bad_message", b'{"text":"x","id":7}'),
    Bad("id_empty", "bad_message", b'{"text":"x","id":""}'),
    Bad("id_too_long", "bad_message", b'{"text":"x","id":"' + b"i" * 129 + b'"}'),
    Bad("id_with_nul", "bad_message", b'{"text":"x","id":"a\\u0000"}'),
    Bad("id_with_line_break", "bad_message", b'{"text":"x","id":"a\\nb"}'),
    Bad("id_with_trailing_line_break", "bad_message", b'{"text":"x","id":"a\\n"}'),
    Bad("sender_string", "bad_message", b'{"text":"x","sender":"me"}'),
    Bad("sender_id_list", "bad_message", b'{"text":"x","sender":{"id":[]}}'),
    Bad("sender_name_too_long", "bad_message", b'{"text":"x","sender":{"name":"' + b"n" * 257 + b'"}}'),
    Bad("metadata_list", "bad_message", b'{"text":"x","metadata":[]}'),
    Bad("metadata_deep", "bad_message", nested(40)),
    Bad("metadata_number_out_of_range", "bad_message", b'{"text":"x","metadata":{"a":1e400}}'),
    Bad("metadata_integer_out_of_range", "bad_message", b'{"text":"x","metadata":{"a":' + b"1" * 5000 + b"}}"),
    Bad("deep_objects", "bad_json", nested(200_000)),
    Bad("deep_arrays", "bad_message", b"[" * 500_000),
    Bad("deep_arrays_in_an_unknown_field", "bad_json", b'{"x":' + b"[" * 500_000),
    Bad("attachments_object", "bad_message", b'{"text":"x","attachments":{}}'),
    Bad("attachment_of_unknown_type", "bad_message", b'{"text":"x","attachments":[{"type":"exe","url":"u"}]}'),
    Bad("attachment_without_content", "bad_message", b'{"text":"x","attachments":[{"type":"image"}]}'),
    Bad("attachment_with_both", "bad_message", b'{"text":"x","attachments":[{"type":"image","url":"u","data":"d"}]}'),
    Bad(
        "too_many_attachments", "bad_message",
        json.dumps({"text": "x", "attachments": [{"type": "image", "url": "u"}] * 11}).encode(),
    ),
    Bad("text_over_its_limit", "too_large", b'{"text":"' + b"x" * (128 * 1024 + 1) + b'"}'),
    Bad("text_over_its_limit_in_bytes", "too_large", '{{"text":"{}"}}'.format("漢" * 44_000).encode()),
    Bad("ten_megabytes", "too_large", b'{"text":"' + b"x" * (10 * MIB) + b'"}'),
    Bad("plain_text", "unsupported_media_type", b"hello", headers={"Content-Type": "text/plain"}),
    Bad("a_form", "unsupported_media_type", b"text=x", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    Bad("nearly_json", "unsupported_media_type", b'{"text":"x"}', headers={"Content-Type": "application/jsonp"}),
    Bad("not_gzip", "bad_json", b"not gzip", headers={**JSON, "Content-Encoding": "gzip"}),
    Bad(
        "a_gzip_bomb", "too_large", gzip.compress(b'{"text":"' + b"x" * (64 * MIB) + b'"}'),
        headers={**JSON, "Content-Encoding": "gzip"},
    ),
)  # fmt: skip

BAD_REQUESTS = (
    Bad("put", "method_not_allowed", b"{}", "PUT"),
    Bad("delete", "method_not_allowed", None, "DELETE"),
    Bad("options", "method_not_allowed", None, "OPTIONS"),
    Bad("post_to_events", "method_not_allowed", b"{}", "POST", "/v1/conversations/c/events"),
    Bad("post_to_socket", "method_not_allowed", b"{}", "POST", "/v1/ws?conversation=c"),
    Bad("post_to_health", "method_not_allowed", b"{}", "POST", "/healthz"),
    get("get_of_an_admin_post", "method_not_allowed", "/admin/tokens"),
    Bad("wait_word", "bad_parameter", b'{"text":"x"}', path=MESSAGES + "?wait=soon"),
    Bad("wait_negative", "bad_parameter", b'{"text":"x"}', path=MESSAGES + "?wait=-1"),
    Bad("wait_nan", "bad_parameter", b'{"text":"x"}', path=MESSAGES + "?wait=nan"),
    Bad("wait_infinite", "bad_parameter", b'{"text":"x"}', path=MESSAGES + "?wait=inf"),
    Bad("wait_empty", "bad_parameter", b'{"text":"x"}', path=MESSAGES + "?wait="),
    get("after_word", "bad_parameter", MESSAGES + "?after=new"),
    get("after_negative", "bad_parameter", MESSAGES + "?after=-1"),
    get("after_fraction", "bad_parameter", MESSAGES + "?after=1.5"),
    get("after_too_big", "bad_parameter", MESSAGES + "?after=99999999999999999999"),
    get("after_over_63_bits", "bad_parameter", MESSAGES + "?after=9223372036854775808"),
    get("after_other_digits", "bad_parameter", MESSAGES + "?after=%D9%A1"),
    get("limit_zero", "bad_parameter", MESSAGES + "?limit=0"),
    get("limit_too_big", "bad_parameter", MESSAGES + "?limit=1001"),
    get("limit_word", "bad_parameter", MESSAGES + "?limit=all"),
    get("events_bad_after", "bad_parameter", "/v1/conversations/c/events?after=x"),
    get("events_bad_last_event_id", "bad_parameter", "/v1/conversations/c/events", **{"Last-Event-ID": "x"}),
    get("unknown_conversation", "conversation_not_found", "/v1/conversations/never/messages"),
    get("conversation_too_long", "bad_parameter", f"/v1/conversations/{'c' * 129}/messages"),
    get("conversation_with_nul", "bad_parameter", "/v1/conversations/a%00b/messages"),
    get("conversation_with_line_break", "bad_parameter", "/v1/conversations/a%0Ab/messages"),
    get("conversation_of_blanks", "bad_parameter", "/v1/conversations/%20/messages"),
    get("conversation_of_bad_utf8", "bad_parameter", "/v1/conversations/%ff%fe/messages"),
    get("conversation_of_a_surrogate", "bad_parameter", "/v1/conversations/%ed%a0%80/messages"),
    get("no_conversation", "not_found", "/v1/conversations//messages"),
    get("nowhere", "not_found", "/v2/anything"),
    get("a_path_above_the_root", "not_found", "/p/../../etc/passwd"),
    get("socket_without_conversation", "bad_parameter", "/v1/ws"),
    get("socket_without_upgrade", "bad_parameter", "/v1/ws?conversation=c"),
    get("socket_bad_after", "bad_parameter", "/v1/ws?conversation=c&after=x"),
    get("origin_that_is_none", "origin_not_allowed", MESSAGES, Origin="http://[::1"),
    get("origin_null", "origin_not_allowed", MESSAGES, Origin="null"),
    get("origin_of_bytes", "origin_not_allowed", MESSAGES, Origin="http://\udcff\udcfe"),
    Bad("content_type_of_bytes", "unsupported_media_type", b"{}", headers={"Content-Type": "\udcff"}),
    get("admin_without_token", "unauthorized", "/admin/plugins"),
    get("admin_token_of_bytes", "unauthorized", "/admin/plugins", Authorization="Bearer \udcff\udcfe"),
    get("unknown_webhook", "not_found", "/hooks/nobody"),
    get("unknown_page", "not_found", "/p/nobody/x"),
    Bad("an_expectation", "bad_parameter", b'{"text":"x"}', headers={**JSON, "Expect": "wonders"}),
)

BAD = BAD_BODIES + BAD_REQUESTS


@pytest.mark.parametrize("family", [BAD_BODIES, BAD_REQUESTS], ids=["bodies", "requests"])
async def test_a_bad_request_gets_the_one_error_shape(desk: Desk, family: tuple[Bad, ...]) -> None:
    """A request that can't be taken is answered with its code, its status and no traceback; nothing was accepted."""
    wrong = {}
    for bad in family:
        try:
            answer = await exchange(desk.url, bad.bytes())
            assert_one_shape(answer, bad.code)
            assert desk.host.turns.live == 0
            assert await desk.host.backend.record("c") is None
            if bad.code == "method_not_allowed":
                assert answer.headers["allow"]
        except AssertionError as exc:
            wrong[bad.name] = str(exc)
    assert not wrong


async def test_a_field_that_is_wrong_is_named(desk: Desk) -> None:
    """The message of a bad body says which field it is and what it should be."""
    answer = await exchange(desk.url, request_bytes("POST", MESSAGES, JSON, b'{"text":"x","sender":{"id":5}}'))
    assert "$.sender.id" in answer.json()["error"]["message"]


async def test_a_chunked_body_without_end_is_let_go(desk: Desk) -> None:
    """A body whose chunks are garbage, or never end, is refused or dropped, and the host serves on."""
    head = request_bytes("POST", MESSAGES, {**JSON, "Transfer-Encoding": "chunked"})
    with contextlib.suppress(asyncio.IncompleteReadError):
        answer = await exchange(desk.url, head + b"zz\r\nhello")
        assert answer.status == 400
    assert await desk.reply() == "1: hello"


async def test_what_is_not_http_is_refused(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes that are no HTTP are answered 400 without a traceback, there or in the log, and the host serves on."""
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"GET /v1/conversations/" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n",
    ):
        answer = await exchange(desk.url, data)
        assert answer.status == 400
        error = answer.json()["error"]
        assert error["code"] == "bad_http"
        assert "Traceback" not in error["message"]
        assert error["message"].isprintable()
        assert error["hint"]
    assert await desk.reply() == "1: hello"
    assert [record.message for record in caplog.records if record.exc_info] == []


TEXTS = (
    "\0", "a\0b", "\u2028\u2029", "\x7f\x1b[31m", "👩‍👩‍👧", "漢字", "\ufeff", "\uffff", "e\u0301", "<script>", "'; --",
    "x" * 131_072,
)  # fmt: skip


@pytest.mark.parametrize("request_line", ["GET /v1/ws?conversation=c", "GET /v1/conversations/c/events", "GET /readyz"])
async def test_who_hangs_up_before_the_answer_leaves_no_traceback(
    desk: Desk, caplog: pytest.LogCaptureFixture, request_line: str
) -> None:
    """A crowd of visitors that gave up waiting must not fill the log."""
    await desk.say()
    parts = urlsplit(desk.url)
    upgrade = (
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
        + "A" * 22
        + "=="
    )
    with structlog.testing.capture_logs() as logs:
        for _ in range(50):
            with socket.create_connection((parts.hostname, parts.port)) as visitor:
                visitor.sendall(f"{request_line} HTTP/1.1\r\nHost: {parts.netloc}\r\n{upgrade}\r\n\r\n".encode())
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert await desk.reply("hello") == "1: hello"
    assert [record.message for record in caplog.records if record.exc_info] == []
    assert [line["event"] for line in logs] == []


async def test_a_connection_of_the_host_that_breaks_is_no_visitor_that_went(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is still there gets an answer that says what happened, in the shape of all errors."""
    await desk.say("hello", "c")

    async def read(*args: object) -> None:
        raise ConnectionResetError("to somebody else")

    monkeypatch.setattr(desk.host.backend, "read", read)
    async with desk.http.get(f"{desk.url}/v1/conversations/c/messages") as response:
        assert response.status == 500
        assert (await response.json())["error"]["code"] == "internal_error"


async def test_any_text_comes_back_as_it_was(desk: Desk) -> None:
    """Every Unicode text is legal, NUL too: it comes back unchanged from the bot and from the record."""
    for text in TEXTS:
        assert await desk.reply(text) == f"1: {text}"
    said = [entry["text"] for entry in await desk.record()]
    assert said == [spoken for text in TEXTS for spoken in (text, f"1: {text}")]


NAMES = ("a b", "a/b", "ü", "漢", "👩", "%", "a%2Fb", "..", "?", "#", "'", '"', "\\", "c" * 128)


async def test_a_conversation_id_may_be_any_printable_text(desk: Desk) -> None:
    """A printable conversation id works through its percent-encoded path, and is what the answer names."""
    for name in NAMES:
        path = "".join(f"%{byte:02X}" for byte in name.encode())
        data = request_bytes("POST", f"/v1/conversations/{path}/messages?wait=5", JSON, b'{"text":"hi"}')
        answer = await exchange(desk.url, data)
        assert answer.status == 200, answer
        assert answer.json()["conversation"] == name
        assert (await desk.host.backend.record(name)) is not None


BAD_FRAMES = (
    ("not_json", frame_bytes(TEXT, b"hello"), "bad_json"),
    ("empty", frame_bytes(TEXT, b""), "bad_json"),
    ("bad_utf8", frame_bytes(TEXT, b'{"type":"message","text":"\xff"}'), "bad_json"),
    ("lone_surrogate", frame_bytes(TEXT, b'{"type":"message","text":"\\udfff"}'), "bad_json"),
    ("deep", frame_bytes(TEXT, b'{"type":"message","text":"x","metadata":' + b'{"a":' * 100_000), "bad_json"),
    ("an_array", frame_bytes(TEXT, b"[1]"), "bad_message"),
    ("no_type", frame_bytes(TEXT, b'{"text":"x"}'), "bad_message"),
    ("type_number", frame_bytes(TEXT, b'{"type":1}'), "bad_message"),
    ("type_unknown", frame_bytes(TEXT, b'{"type":"dance"}'), "bad_message"),
    ("type_too_long", frame_bytes(TEXT, b'{"type":"' + b"m" * 1000 + b'"}'), "bad_message"),
    ("message_without_text", frame_bytes(TEXT, b'{"type":"message"}'), "bad_message"),
    ("text_number", frame_bytes(TEXT, b'{"type":"message","text":1}'), "bad_message"),
    ("id_number", frame_bytes(TEXT, b'{"type":"message","text":"x","id":1}'), "bad_message"),
    ("sender_list", frame_bytes(TEXT, b'{"type":"message","text":"x","sender":[]}'), "bad_message"),
    ("text_too_large", frame_bytes(TEXT, b'{"type":"message","text":"' + b"x" * 131_073 + b'"}'), "too_large"),
    ("binary", frame_bytes(BINARY, b'{"type":"ping"}'), "bad_json"),
)  # fmt: skip


async def test_a_bad_frame_gets_an_error_frame(desk: Desk) -> None:
    """A frame that can't be taken is answered by an error frame, and the same connection goes on."""
    wrong = {}
    async with raw_socket(desk.url, "conversation=c") as visitor:
        for name, frame, code in BAD_FRAMES:
            visitor.send(frame)
            try:
                assert_error_frame(await visitor.receive_json(), code)
            except AssertionError as exc:
                wrong[name] = str(exc)
            visitor.send(frame_bytes(TEXT, b'{"type":"ping"}'))
            assert await visitor.receive_json() == {"type": "pong"}
    assert not wrong
    assert await desk.host.backend.record("c") is None


async def test_an_error_frame_says_to_which_message(desk: Desk) -> None:
    """A message that is refused is named in the error frame by the id it was sent with."""
    async with raw_socket(desk.url, "conversation=c") as visitor:
        visitor.say("", id="m1")
        assert (await visitor.receive_json())["to"] == "m1"


BROKEN_FRAMES = (
    ("over_the_body_limit", frame_bytes(TEXT, b'{"text":"' + b"x" * (10 * MIB) + b'"}'), 1009, "too_large"),
    ("reserved_opcode", frame_bytes(3, b"x"), 1002, "bad_json"),
    ("reserved_bits", frame_bytes(TEXT, b"{}", reserved=0x30), 1002, "bad_json"),
    ("continuation_of_nothing", frame_bytes(0, b"x"), 1002, "bad_json"),
    ("long_control_frame", frame_bytes(9, b"x" * 200), 1002, "bad_json"),
    ("fragmented_control_frame", frame_bytes(9, b"x", fin=False), 1002, "bad_json"),
)  # fmt: skip


async def test_a_broken_frame_ends_the_connection(desk: Desk) -> None:
    """What breaks the WebSocket protocol is named in an error frame, then closed with the code of RFC 6455."""
    wrong = {}
    for name, frame, close, code in BROKEN_FRAMES:
        async with raw_socket(desk.url, "conversation=c") as visitor:
            visitor.send(frame)
            try:
                assert_error_frame(await visitor.receive_json(), code)
                assert await visitor.close_code() == close
            except AssertionError as exc:
                wrong[name] = str(exc)
    assert not wrong
    assert await desk.reply() == "1: hello"


async def test_bad_input_leaves_no_memory_behind(desk: Desk) -> None:
    """A thousand bad requests and frames leave no task, no connection and no memory."""
    small = [bad for bad in BAD if bad.body is None or len(bad.body) < 10_000]
    frames = [frame for _, frame, _ in BAD_FRAMES if len(frame) < 10_000]

    async def once() -> None:
        for bad in small:
            await exchange(desk.url, bad.bytes())
        async with raw_socket(desk.url, "conversation=c") as visitor:
            for frame in frames:
                visitor.send(frame)
                await visitor.receive_json()
        await wait_until(lambda: desk.host.metrics.registry.get_sample_value("hotdesk_websockets") == 0, "socket gone")

    for _ in range(3):
        await once()
    gc.collect()
    tasks, objects = len(asyncio.all_tasks()), len(gc.get_objects())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            await once()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    await wait_until(lambda: len(asyncio.all_tasks()) <= tasks, "no task more")
    assert grown < 200_000
    assert len(gc.get_objects()) - objects < 500
