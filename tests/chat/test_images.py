"""Images in the chat room: what is taken for one, what is fetched and from where, what is kept and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from prometheus_client import CollectorRegistry

from conftest import StartDesk, wait_until
from hotdesk.backend import Backend, TurnEnd, open_backend
from hotdesk.backend.images import ImageStore
from hotdesk.chat.image_content import decode_base64, inspect
from hotdesk.chat.image_fetch import check_image_url
from hotdesk.chat.images import Images, LoadedImage, described
from hotdesk.chat.intake import Accepted, NewMessage
from hotdesk.chat.turns import new_id
from hotdesk.config import load_config
from hotdesk.errors import ConfigError, DoorError, ImageUnusable
from hotdesk.metrics import Metrics
from hotdesk.runtime.network import is_public
from hotdesk_sdk import Attachment, Message
from pictures import FORMATS, chunk, encoded, noise, picture, png

DAY_S = 86_400.0
LIMIT = 200_000


# -- by content ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_four_formats_are_known_by_their_content(kind: str) -> None:
    """Format, size and length come from the bytes."""
    data = picture(kind, (31, 17))
    facts = inspect(data, "h")
    assert (facts.mime, facts.width, facts.height, facts.bytes) == (FORMATS[kind], 31, 17, len(data))


def webp_canvas(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + len(body).to_bytes(4, "little") + body


NO_IMAGES = {
    "nothing": b"",
    "text": b"hello",
    "html": b"<html><script>alert(1)</script></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "bmp": b"BM" + bytes(100),
    "tiff": b"II*\0" + bytes(100),
    "pdf": b"%PDF-1.7",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "wave": b"RIFF\x24\0\0\0WAVEfmt ",
    "png_signature_alone": b"\x89PNG\r\n\x1a\n",
    "png_without_pixels": png(10, 10)[:40],
    "png_of_no_size": png(0, 10, b"x"),
    "jpeg_start_alone": b"\xff\xd8\xff",
    "jpeg_of_padding": b"\xff\xd8" + b"\xff" * LIMIT,
    "jpeg_of_noise": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 10,
    "gif_start_alone": b"GIF89a",
    "gif_without_frames": b"GIF89a\x0a\0\x0a\0\0\0\0;",
    "webp_start_alone": b"RIFF\x10\0\0\0WEBP",
    "webp_of_noise": b"RIFF\xff\0\0\0WEBPVP8X" + bytes(range(200)),
    "webp_of_a_huge_canvas": webp_canvas(16_000_000, 16_000_000),
    "png_of_too_many_pixels": png(50_000, 50_000, b"x"),
    "png_of_a_few_pixels_too_many": png(50_001, 1000, b"x"),
    "png_of_endless_chunks": png(10, 10, b"x", before=chunk(b"abCd", b"") * 50_000),
    "png_with_a_text_bomb": png(10, 10, b"x", before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused_at_once(name: str) -> None:
    """Whatever it claims, it is refused with a reason, without a warning, and in a moment."""
    began = time.process_time()
    with pytest.raises(ImageUnusable) as raised:
        inspect(NO_IMAGES[name], "h")
    assert raised.value.reason
    assert time.process_time() - began < 0.5


def test_a_header_may_be_long() -> None:
    """A photo may carry megabytes of other things before its pixels, in chunks of a fair size."""
    facts = inspect(png(10, 10, b"x", before=chunk(b"abCd", bytes(60_000)) * 60), "h")
    assert (facts.width, facts.height) == (10, 10)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "aGk",
        "aGk=aGk=",
        "aG k=",
        "aGk=\n",
        "aGk*",
        "äGk=",
        "====",
        "aGk==",
        "aGk=" * 40_000,
        "a" * 100_001,
        "a-_b",
        "\ud800aGk=",
    ],
)
def test_base64_is_read_strictly(text: str) -> None:
    """Padding in its place and nothing between, in a long text too."""
    with pytest.raises(ImageUnusable, match="base64"):
        decode_base64(text)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 300_001])
def test_base64_gives_the_bytes_again(size: int) -> None:
    """Of any length."""
    data = os.urandom(size)
    assert decode_base64(encoded(data)) == data


# -- addresses -----------------------------------------------------------------------------------------------------

INSIDE = (
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255",
    "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:a9fe:a9fe", "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:c0a8:1::1",
    "2001::1", "2001:db8::1", "3fff::1", "5f00::1", "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1",
    "ff02::1", "100::1", "::ffff:0:127.0.0.1", "::ffff:0:169.254.169.254", "4000::1", "8000::1", "fe00::1",
    "0x7f.1", "2130706433", "127.1", "0177.0.0.1", "localhost", "",
)  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_an_address_inside_is_not_public(address: str) -> None:
    """Private, loopback, link-local, reserved, and every way to write one of them within another."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101", "2002:101:101::"),
        *("2600::1", "2a00:1450:4001:800::200e"),
    ],
)
def test_a_public_address_is_public(address: str) -> None:
    """The rest of the Internet may be asked."""
    assert is_public(address)


BAD_URLS = (
    "", "a.png", "/etc/passwd", "//example.com/a.png", "ftp://example.com/a.png", "file:///etc/passwd",
    "javascript:alert(1)", "http://", "http:///a.png", "http:127.0.0.1", "https://user@example.com/",
    "https://user:pw@example.com/", "https://:pw@example.com/", "https://example.com:99999/", "https://example.com:x/",
    "https://exa mple.com/", "https://example.com/a b", "https://example.com/\n", "https://example.com\\@127.0.0.1/",
    "https://example.com/" + "a" * 2048, "http://localhost/", "http://LOCALHOST./", "http://a.localhost/",
    "http://127.0.0.1/", "http://127.0.0.1./", "http://127.1/", "http://0x7f.1/", "http://0x7f000001/",
    "http://2130706433/", "http://0177.0.0.1/", "http://017700000001/", "http://0/", "http://１２７.０.０.１/",
    "http://127。0。0。1/", "http://%31%32%37.0.0.1/", "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fe80::1%25eth0]/",
    "http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://192.168.1.1:8080/", "http://[::1/",
    "/v1/conversations/c/images/" + "0" * 64,
)  # fmt: skip


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_may_not_be_asked_for(url: str) -> None:
    """Not http, not whole, with credentials, or an address inside in any notation."""
    with pytest.raises(ImageUnusable):
        check_image_url(url)


@pytest.mark.parametrize(
    "url",
    ["https://example.com/a.png", "http://1.1.1.1:81/", "https://bücher.example/ü.png", "https://[2606:4700::1]/x"],
)
def test_a_url_of_the_web_may_be_asked_for(url: str) -> None:
    """Names of any script, and public addresses."""
    assert check_image_url(url).scheme in ("http", "https")


# -- fetching ------------------------------------------------------------------------------------------------------


@dataclass
class Shop:
    """A web server with images, and with tricks."""

    data: bytes = field(default_factory=picture)
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        self.headers.append(dict(request.headers))
        kind, _, rest = request.path.lstrip("/").partition("/")
        if kind == "to":
            return web.Response(status=302, headers={"Location": request.query["url"], "Set-Cookie": "a=b"})
        if kind == "hop":
            location = f"/hop/{int(rest) - 1}" if int(rest) > 1 else "/image"
            return web.Response(status=307, headers={"Location": location})
        if kind == "gated":
            await self.gate.wait()
        if kind == "missing":
            return web.Response(status=404, body=self.data)
        if kind == "text":
            return web.Response(text="<html>", content_type="image/png")
        if kind in ("flood", "trickle", "broken"):
            return await getattr(self, kind)(request)  # type: ignore[no-any-return]
        return web.Response(body=self.data, content_type="text/plain")

    async def flood(self, request: web.Request) -> web.StreamResponse:
        """A body without a length and, if nobody hangs up, without an end."""
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(bytes(65536))
        return response

    async def trickle(self, request: web.Request) -> web.StreamResponse:
        """A byte now and then: it is never silent, and never done."""
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"\x89")
                await asyncio.sleep(0.01)
        return response

    async def broken(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(self.data))})
        await response.prepare(request)
        await response.write(self.data[:50])
        assert request.transport is not None
        request.transport.abort()
        return response


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    """The shop, open."""
    shop = Shop()
    app = web.Application()
    app.router.add_get("/{tail:.*}", shop.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    shop.port = runner.addresses[0][1]
    yield shop
    await runner.cleanup()


class Names(AbstractResolver):
    """A name server with its own mind: each name's addresses, asked for anew each time."""

    def __init__(self, **names: list[str]) -> None:
        self.names = {name.replace("_", "."): addresses for name, addresses in names.items()}

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[Any]:
        found = self.names.get(host)
        if found is None:
            raise OSError(None, "no such name")
        address = found.pop(0) if len(found) > 1 else found[0]
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": kind,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
        ]

    async def close(self) -> None: ...


@dataclass
class Room:
    """Images on a journal of their own, with what they stand on."""

    images: Images
    store: ImageStore
    backend: Backend
    metrics: Metrics
    folder: Path

    async def say(self, conversation: str, *attachments: Attachment, at: float | None = None) -> tuple[Attachment, ...]:
        """What intake does with a message: check, keep, append."""
        found = self.images.check_nowait(conversation, attachments)
        if not isinstance(found, tuple):
            found = await self.images.keep(found)
        message = Message(new_id("m"), conversation, 0, "", attachments=found, at=at or time.time())
        appended = await self.backend.append(message, channel="", locale=None)
        await self.backend.finish(TurnEnd(conversation, appended.seq))
        return found

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def counted(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("hotdesk_images_total", {"outcome": outcome}) or 0.0


OpenRoom = Callable[..., contextlib.AbstractAsyncContextManager[Room]]


@pytest.fixture
def open_room(tmp_path: Path) -> OpenRoom:
    """Opens the images of one data folder: a second time, they are the first ones restarted."""

    @contextlib.asynccontextmanager
    async def opened(**options: Any) -> AsyncIterator[Room]:
        metrics = Metrics(CollectorRegistry())
        backend = await open_backend(f"sqlite:///{tmp_path / 'x.db'}", metrics)
        store = ImageStore(tmp_path / "images")
        images = Images(store, backend=backend, metrics=metrics, **{"max_bytes": LIMIT, **options})
        await images.open()
        try:
            yield Room(images, store, backend, metrics, tmp_path / "images")
        finally:
            await images.aclose()
            await backend.aclose()

    return opened


def upload(data: bytes) -> Attachment:
    return Attachment("image", data=encoded(data))


def link(url: str) -> Attachment:
    return Attachment("image", url=url)


async def test_an_image_by_url_is_fetched_when_it_is_wanted(shop: Shop, open_room: OpenRoom) -> None:
    """Not with its message, but with the first load; it is then kept by its hash, as what its bytes are."""
    async with open_room(hosts=[f"127.0.0.1:{shop.port}"]) as room:
        (attachment,) = await room.say("c", link(f"{shop.url}/image"))
        assert shop.asked == []
        image = await room.images.load(attachment, "c")
        hash = hashlib.sha256(shop.data).hexdigest()
        assert image == LoadedImage(shop.data, "image/png", 64, 48, hash)
        assert image.data_url() == f"data:image/png;base64,{encoded(shop.data)}"
        assert room.store.read(hash) == shop.data
        assert await room.images.load(attachment, "c") == image
        assert await room.images.load(attachment, "other") == image
        assert len(shop.asked) == 1
        assert await room.images.read("other", hash) == image
        assert await room.images.read("third", hash) is None


async def test_a_fetch_carries_nothing_and_goes_through_no_proxy(
    shop: Shop, open_room: OpenRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cookie, no referrer, no credentials, and the environment's proxy is not asked."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with open_room(hosts=["127.0.0.1"]) as room:
        await room.images.load(link(f"{shop.url}/to?url=/image"), "c")
    assert shop.asked == ["/to", "/image"]
    assert {name.lower() for name in shop.headers[1]} == {
        "connection",
        "host",
        "accept",
        "accept-encoding",
        "user-agent",
    }


async def test_loads_of_one_url_at_once_are_one_fetch(shop: Shop, open_room: OpenRoom) -> None:
    """Whoever comes while it is under way waits for it; one that leaves takes nobody else's away."""
    async with open_room(hosts=["127.0.0.1"]) as room:
        loads = [asyncio.create_task(room.images.load(link(f"{shop.url}/gated"), f"c{n}")) for n in range(20)]
        await wait_until(lambda: shop.asked, "it is asked for")
        loads.pop(0).cancel()
        shop.gate.set()
        assert {image.data for image in await asyncio.gather(*loads)} == {shop.data}
    assert shop.asked == ["/gated"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "answers 404"),
        ("/text", "no PNG"),
        ("/flood", "over 200000 bytes"),
        ("/trickle", "took over"),
        ("/broken", "can't be reached"),
        ("/hop/4", "more than 3 times"),
        ("/to?url=http://[::1", "no url"),
        ("/to?url=file:///etc/passwd", "neither http nor https"),
        ("/to?url=http://user:pw@example.com/", "name or password"),
        ("/to?url=http://127.0.0.2/", "inside this network"),
        ("/to?url=http://localhost/", "inside this network"),
        ("/to?url=//0x7f.1/", "inside this network"),
        ("/to?url=http://[::ffff:10.0.0.1]/", "inside this network"),
        ("/to?url=http://2130706433/", "inside this network"),
    ],
)
async def test_a_fetch_that_gives_no_image(path: str, reason: str, shop: Shop, open_room: OpenRoom) -> None:
    """The reason is told in words; it is remembered, and nothing is kept."""
    async with open_room(hosts=[f"127.0.0.1:{shop.port}"], fetch_s=0.5) as room:
        for _ in range(2):
            with pytest.raises(ImageUnusable, match=reason):
                await room.images.load(link(shop.url + path), "c")
        assert len(shop.asked) == (4 if "hop" in path else 1)
        assert room.files() == []
        assert room.counted("unusable") == 1


async def test_three_redirects_are_followed(shop: Shop, open_room: OpenRoom) -> None:
    """Each relative to the one before."""
    async with open_room(hosts=["127.0.0.1"]) as room:
        assert (await room.images.load(link(f"{shop.url}/hop/3"), "c")).data == shop.data


async def test_a_name_that_means_an_address_inside_is_not_asked(shop: Shop, open_room: OpenRoom) -> None:
    """Whatever a name server says, and whenever: directly, after a redirect, as IPv6, or mapped."""
    names = Names(
        inside_example=["127.0.0.1"],
        mapped_example=["::ffff:127.0.0.1"],
        six_example=["::1"],
        meta_example=["169.254.169.254"],
        allowed_example=["127.0.0.1"],
    )
    async with open_room(hosts=["allowed.example"], resolver=names) as room:
        for name in ("inside", "mapped", "six", "meta"):
            with pytest.raises(ImageUnusable, match="inside this network"):
                await room.images.load(link(f"http://{name}.example:{shop.port}/image"), "c")
        assert shop.asked == []
        away = f"http://allowed.example:{shop.port}/to?url=http://inside.example:{shop.port}/image"
        with pytest.raises(ImageUnusable, match="inside this network"):
            await room.images.load(link(away), "c")
        assert shop.asked == ["/to"]
        assert (await room.images.load(link(f"http://allowed.example:{shop.port}/image"), "c")).data == shop.data


async def test_a_name_may_not_change_its_mind(shop: Shop, open_room: OpenRoom) -> None:
    """What is connected to is what was checked: a name that is inside when it counts is refused, whatever it was."""
    names = Names(fickle_example=["127.0.0.1", "93.184.216.34"], again_example=["127.0.0.1", "127.0.0.1"])
    async with open_room(hosts=["again.example"], resolver=names) as room:
        with pytest.raises(ImageUnusable, match="inside this network"):
            await room.images.load(link(f"http://fickle.example:{shop.port}/image"), "c")
        assert names.names["fickle.example"] == ["93.184.216.34"]  # it was asked once, and that answer was judged
        assert shop.asked == []


async def test_the_machines_own_name_is_inside(shop: Shop, open_room: OpenRoom) -> None:
    """The system's resolver is asked, and its answer judged."""
    name = socket.gethostname()
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(name, shop.port, type=socket.SOCK_STREAM)}
    except OSError:
        addresses = set()
    if not addresses or any(is_public(str(address)) for address in addresses):
        pytest.skip("this machine's name resolves to no private address")
    async with open_room() as room:
        with pytest.raises(ImageUnusable, match="inside this network"):
            await room.images.load(link(f"http://{name}:{shop.port}/image"), "c")


async def test_a_stop_does_not_wait_for_a_fetch(shop: Shop, open_room: OpenRoom) -> None:
    """What is under way is given up."""
    async with open_room(hosts=["127.0.0.1"]) as room:
        load = asyncio.create_task(room.images.load(link(f"{shop.url}/trickle"), "c"))
        await wait_until(lambda: shop.asked, "it is asked for")
    with pytest.raises(asyncio.CancelledError):
        await load


# -- kept ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 150_000], ids=["small", "large"])
async def test_the_same_bytes_are_kept_once(size: int, open_room: OpenRoom) -> None:
    """One file by its hash, readable by its owner alone, whoever sends it and however often."""
    data = noise(size)
    async with open_room() as room:
        first = await room.say("c", upload(data))
        (path,) = room.files()
        assert path.name == hashlib.sha256(data).hexdigest()
        assert path.parent.name == path.name[:2]
        assert path.stat().st_mode & 0o777 == 0o600
        written = path.stat().st_mtime_ns, path.stat().st_ino
        assert await room.say("c", upload(data)) == first
        as_url = Attachment("image", url=f"data:text/html;base64,{encoded(data)}", mime="image/gif")
        assert await room.say("c", as_url, as_url) == first * 2
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
        await room.say("d", upload(data))
        assert path.stat().st_ino == written[1]
        assert room.files() == [path]
        assert (room.counted("kept"), room.counted("known")) == (1, 4)
    async with open_room() as room:
        assert (await room.images.load(first[0], "c")).data == data
        assert (await room.images.load(await_only(await room.say("e", upload(data))), "e")).data == data
        assert room.files() == [path]


def await_only(attachments: tuple[Attachment, ...]) -> Attachment:
    (attachment,) = attachments
    return attachment


async def test_what_a_kill_left_half_written_is_swept(open_room: OpenRoom) -> None:
    """At the next start; whole images stay."""
    async with open_room() as room:
        await room.say("c", upload(noise(10)))
        (path,) = room.files()
        (room.folder / "tmp" / "half.0").write_bytes(b"\x89PNG")
    async with open_room() as room:
        assert room.files() == [path]


async def test_an_image_of_another_conversation_is_not_loaded(open_room: OpenRoom) -> None:
    """A hash alone opens nothing."""
    async with open_room() as room:
        (attachment,) = await room.say("c", upload(noise(10)))
        with pytest.raises(ImageUnusable):
            await room.images.load(attachment, "d")


async def test_a_damaged_file_is_not_shown(open_room: OpenRoom) -> None:
    """It is said, not served."""
    async with open_room() as room:
        (attachment,) = await room.say("c", upload(noise(10)))
        room.files()[0].write_bytes(b"<html>")
    async with open_room() as room:
        with pytest.raises(ImageUnusable, match="damaged"):
            await room.images.load(attachment, "c")
        room.files()[0].unlink()
        with pytest.raises(ImageUnusable, match="no longer kept"):
            await room.images.load(attachment, "c")


async def test_images_go_after_their_conversations(open_room: OpenRoom) -> None:
    """Old, and shown by no conversation any more; what is shown or was wanted lately stays, and is looked at again."""
    now = time.time()
    old, before = now - 3 * DAY_S, now - 2 * DAY_S
    lonely, shared, fresh = noise(10), noise(20), noise(30)
    async with open_room() as room:
        (gone,) = await room.say("old", upload(lonely), at=old)
        await room.say("old2", upload(shared), at=old)
        (stays,) = await room.say("alive", upload(shared))
        await room.say("old3", upload(fresh), at=old)
        for data in (lonely, shared):
            os.utime(room.store.path(hashlib.sha256(data).hexdigest()), (old, old))
    async with open_room() as room:
        assert await room.images.purge(before) == 0  # conversations go first
        assert gone.hash is not None
        assert stays.hash is not None
        os.utime(room.store.path(gone.hash), (old, old))
        assert await room.backend.purge(before) == 3
        assert await room.images.read("old", gone.hash) is None
        assert await room.images.purge(before) == 1
        assert room.store.read(gone.hash) is None
        assert await room.backend.kv_keys(f"image {gone.hash}", "") == []
        assert room.store.path(stays.hash).stat().st_mtime > before
        assert (await room.images.load(stays, "alive")).data == shared
        assert len(room.files()) == 2
        (again,) = await room.say("old", upload(lonely))
        assert (await room.images.load(again, "old")).data == lonely


async def test_an_image_that_comes_back_while_it_is_purged_is_kept(open_room: OpenRoom) -> None:
    """Messages that bring it again meanwhile find it kept, whatever comes first."""
    data = noise(10)
    hash = hashlib.sha256(data).hexdigest()
    old = time.time() - 3 * DAY_S
    for _ in range(20):
        async with open_room() as room:
            await room.say("c", upload(data), at=old)
            os.utime(room.store.path(hash), (old, old))
        async with open_room() as room:
            await room.backend.purge(old + 1)
            await asyncio.gather(
                room.images.purge(old + 1),
                *(room.say(conversation, upload(data), at=old) for conversation in ("c", "d")),
            )
            for conversation in ("c", "d"):
                found = await room.images.read(conversation, hash)
                assert found is not None
                assert found.data == data
            assert room.store.read(hash) == data


# -- taken in ------------------------------------------------------------------------------------------------------


async def test_an_image_is_on_disk_before_its_message_is_accepted(start_desk: StartDesk) -> None:
    """When `accepted` is told, the file is whole and the conversation is known to show it."""
    desk = await start_desk()
    seen: list[bool] = []
    for data in (noise(100), noise(300_000)):
        path = desk.host.images._store.path(hashlib.sha256(data).hexdigest())

        def told(outcome: Accepted | BaseException, path: Path = path, data: bytes = data) -> None:
            seen.append(isinstance(outcome, Accepted) and path.read_bytes() == data)

        desk.host.intake.accept_nowait(NewMessage("c", "", attachments=(upload(data),)), told, door="test")
        assert not path.exists()
    await wait_until(lambda: len(seen) == 2, "both are accepted")
    assert seen == [True, True]


async def test_a_disk_that_takes_no_image_refuses_its_message(start_desk: StartDesk, tmp_path: Path) -> None:
    """503, nothing in the journal, and the messages behind it go on."""
    desk = await start_desk(data=tmp_path / "data")
    (tmp_path / "data" / "images").write_text("no folder")
    first = desk.host.intake.accept(NewMessage("c", "a", attachments=(upload(noise(9)),)), door="test")
    second = desk.host.intake.accept(NewMessage("c", "b"), door="test")
    with pytest.raises(DoorError) as raised:
        await first
    assert raised.value.code == "backend_unavailable"
    assert (await second).seq == 1


async def test_only_the_own_conversation_waits_for_an_image(start_desk: StartDesk) -> None:
    """While an image is being checked, others are accepted; its own conversation's later messages come after it."""
    desk = await start_desk()
    gate = threading.Event()
    held = [desk.host.images._threads.submit(gate.wait, 20) for _ in range(2)]
    try:
        intake, order = desk.host.intake, []

        def tell(name: str) -> Callable[[Accepted | BaseException], None]:
            return lambda outcome: order.append((name, outcome.seq if isinstance(outcome, Accepted) else outcome))

        intake.accept_nowait(NewMessage("c", "1", attachments=(upload(noise(200_000)),)), tell("image"), door="test")
        intake.accept_nowait(NewMessage("c", "2"), tell("behind"), door="test")
        intake.accept_nowait(NewMessage("c", "3", attachments=(link("https://a.example/x"),)), tell("url"), door="test")
        intake.accept_nowait(NewMessage("d", "1"), tell("other"), door="test")
        await wait_until(lambda: order, "the other conversation is told")
        assert order == [("other", 1)]
        assert intake._appending == 3
    finally:
        gate.set()
    await wait_until(lambda: len(order) == 4, "all are told")
    assert order[1:] == [("image", 1), ("behind", 2), ("url", 3)]
    assert all(future.result() for future in held)
    assert not intake._held
    await wait_until(lambda: not intake._appending and not desk.host.turns.live, "all turns ended")


async def test_messages_with_images_count_as_turns_under_way(start_desk: StartDesk) -> None:
    """Beyond `max_turns` a message is refused, whether what is before it waits for a turn or for its image."""
    desk = await start_desk(max_turns=3)
    intake = desk.host.intake
    waiting = [
        intake.accept(NewMessage(f"c{n}", "", attachments=(upload(noise(200_000)),)), door="test") for n in range(3)
    ]
    with pytest.raises(DoorError) as raised:
        intake.accept(NewMessage("d", "hello"), door="test")
    assert raised.value.code == "overloaded"
    assert [accepted.seq for accepted in await asyncio.gather(*waiting)] == [1, 1, 1]
    await wait_until(lambda: not desk.host.turns.live, "their turns ended")
    assert (await intake.accept(NewMessage("d", "hello"), door="test")).seq == 1


async def test_what_is_held_while_it_is_checked_is_bounded(start_desk: StartDesk) -> None:
    """Beyond 64 MiB of uploads that are being checked, the next is `overloaded`; afterwards there is room again."""
    desk = await start_desk(max_image_bytes=6 * 1024 * 1024)
    intake, big = desk.host.intake, Attachment("image", data="A" * (7 * 1024 * 1024))
    waiting = [intake.accept(NewMessage(f"c{n}", "", attachments=(big,)), door="test") for n in range(9)]
    with pytest.raises(DoorError) as raised:
        intake.accept(NewMessage("d", "", attachments=(big,)), door="test")
    assert raised.value.code == "overloaded"
    assert (await intake.accept(NewMessage("d", "", attachments=(upload(noise(9)),)), door="test")).seq == 1
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {getattr(outcome, "code", outcome) for outcome in outcomes} == {"bad_attachment"}
    with pytest.raises(DoorError) as raised:
        await intake.accept(NewMessage("d", "", attachments=(big,)), door="test")
    assert raised.value.code == "bad_attachment"


@pytest.mark.parametrize("wrong", ["http://cdn.example", "*.example", "user@cdn.example", "cdn.example/images", ""])
def test_an_image_host_is_a_host(wrong: str, tmp_path: Path) -> None:
    """A setting that would match nothing stops the start."""
    (tmp_path / "hotdesk.toml").write_text(f'image_hosts = ["{wrong}"]\n')
    with pytest.raises(ConfigError, match="image_hosts"):
        load_config({}, {}, file=str(tmp_path / "hotdesk.toml"))


async def test_a_stop_refuses_messages_whose_images_are_not_kept(start_desk: StartDesk) -> None:
    """They, and those behind them, are told `stopping`; none of them is in the journal."""
    desk = await start_desk()
    intake = desk.host.intake
    waiting = [
        intake.accept(NewMessage("c", "a", attachments=(upload(noise(200_000)),)), door="test"),
        intake.accept(NewMessage("c", "b"), door="test"),
    ]
    await asyncio.sleep(0)
    intake.stop()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(outcome, "code", outcome) for outcome in outcomes] == ["stopping", "stopping"]
    assert await desk.host.backend.read("c", 0, 10) is None
    assert intake._appending == 0


# -- in words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attachment", "words"),
    [
        (Attachment("image", "/x", None, "image/png", "h", 640, 480, 23 * 1024), "[image: PNG, 640x480, 23 KiB]"),
        (Attachment("image", "/x", None, "image/webp", "h", 1, 2, 900), "[image: WEBP, 1x2, 900 bytes]"),
        (Attachment("image", "/x", None, "image/jpeg", "h", 9, 9, 3_500_000), "[image: JPEG, 9x9, 3.3 MiB]"),
        (Attachment("image", "https://shop.example/a?token=secret"), "[image: at shop.example]"),
        (Attachment("image", data="aGk="), "[image]"),
        (Attachment("image", url="data:image/png;base64,aGk="), "[image]"),
    ],
)
def test_an_image_in_words(attachment: Attachment, words: str) -> None:
    """What is known of it, and no secret of its URL."""
    assert described(attachment) == words
