"""The images of messages: checked and kept before a message is accepted, fetched and read when a turn needs them.

Owns what an attachment may be, which conversation an image belongs to, and when one is no longer needed. The bytes lie
in the `backend` room's store; what a URL of a visitor's gives is fetched by `image_fetch`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar
from urllib.parse import quote

import msgspec
from aiohttp.abc import AbstractResolver
from yarl import URL

from hotdesk_sdk import Attachment

from ..backend import Backend
from ..backend.images import ImageStore
from ..errors import BackendUnavailable, DoorError, ImageUnusable
from ..metrics import Metrics
from ..runtime.guards import host_task
from .image_content import MIMES, ImageFacts, decode_base64, inspect
from .image_fetch import FETCH_S, Fetcher, check_image_url

__all__ = ["MAX_ATTACHMENTS", "Images", "LoadedImage", "Uploads", "described"]

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

MAX_ATTACHMENTS = 8
INLINE_CHARS = 128 * 1024
"""Base64 of up to so many characters in a message is decoded on the loop, in some 100 µs; a thread costs as much."""

MAX_CHECKING = 64 * 1024 * 1024
"""Characters of base64 that are held while they are checked, over all conversations; beyond it, `overloaded`."""

REMEMBER_S = 600.0
"""How long an image that was marked as wanted need not be marked again. Far below the shortest retention, a day."""

REMEMBER = 8192
URL_S = 300.0
"""How long a URL is taken to give the same image."""

FAILED_S = 60.0
"""How long a URL that gave none is not tried again, or each turn of its conversation would wait for it."""

CACHE_BYTES = 32 * 1024 * 1024
"""Images that are kept in memory: an upload is wanted by its own turn at once."""

RECHECK_S = 86_400.0
"""An old image that a conversation still shows is looked at again after this."""


class LoadedImage(msgspec.Struct, frozen=True):
    """An image with its bytes."""

    data: bytes
    mime: str
    width: int
    height: int
    hash: str

    def data_url(self) -> str:
        return f"data:{self.mime};base64,{b64encode(self.data).decode()}"


class Upload(msgspec.Struct):
    """An image that came with a message: its base64 at first, then its bytes with their hash, then its facts."""

    place: int
    text: str = ""
    data: bytes = b""
    hash: str = ""
    facts: ImageFacts | None = None


class Uploads(msgspec.Struct, frozen=True):
    """The attachments of a message of which some are still to be checked or kept. `size` is in characters."""

    conversation: str
    items: list[Attachment | Upload]
    size: int


class Images:
    """The images of this host."""

    def __init__(
        self,
        store: ImageStore,
        *,
        backend: Backend,
        metrics: Metrics,
        max_bytes: int,
        hosts: Sequence[str] = (),
        resolver: AbstractResolver | None = None,
        fetch_s: float = FETCH_S,
    ) -> None:
        self._store = store
        self._backend = backend
        self._max_bytes = max_bytes
        self._hosts = frozenset(host.lower() for host in hosts)
        self._fetcher = Fetcher(max_bytes, self._hosts, resolver=resolver, seconds=fetch_s)
        self._threads = ThreadPoolExecutor(2, "hotdesk-image")
        self._counts = {
            outcome: metrics.images.labels(outcome) for outcome in ("kept", "known", "refused", "fetched", "unusable")
        }
        self._checking = 0
        self._kept: _Recent[str, ImageFacts] = _Recent()
        self._shown: _Recent[tuple[str, str], None] = _Recent()
        self._urls: _Recent[str, str | ImageUnusable] = _Recent()
        self._cache: OrderedDict[str, LoadedImage] = OrderedDict()
        self._cached = 0
        self._fetching: dict[str, asyncio.Task[LoadedImage | ImageUnusable]] = {}
        self._busy: dict[str, int] = {}
        self._purging: dict[str, asyncio.Future[None]] = {}

    async def open(self) -> None:
        """Clean up after a host that was killed. Raises `BackendUnavailable`."""
        await self._run(self._store.sweep)

    async def aclose(self) -> None:
        """Give up what is being fetched, and let the threads end."""
        tasks = list(self._fetching.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._fetcher.aclose()
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        """Do *work* in a thread of the images' own. Raises `BackendUnavailable` when the disk does not do it."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        except (OSError, RuntimeError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc)
            raise BackendUnavailable("images", f"an image can't be kept or read: {reason}") from exc

    # -- with a message --------------------------------------------------------------------------------------

    def check_nowait(self, conversation: str, attachments: Sequence[Attachment]) -> tuple[Attachment, ...] | Uploads:
        """The attachments as the record has them; `Uploads`, for `keep`, if some are large or not known yet.

        Raises `DoorError`. What an attachment says of itself besides its `url` or `data` is not believed.
        """
        if len(attachments) > MAX_ATTACHMENTS:
            raise DoorError("bad_attachment", f"a message has at most {MAX_ATTACHMENTS} attachments")
        items: list[Attachment | Upload] = []
        size, left, ready = 0, INLINE_CHARS, True
        for place, given in enumerate(attachments):
            try:
                text = _base64_of(given)
                if text is None:
                    items.append(self._link(given))
                    continue
                size += len(text)
                if len(text) // 4 * 3 - 2 > self._max_bytes:
                    raise self._too_large(place)
                upload = Upload(place, text)
                if len(text) <= left:
                    left -= len(text)
                    self._decode(upload)
                    facts = self._kept.get(upload.hash)
                    if facts is not None and (conversation, upload.hash) in self._shown:
                        self._counts["known"].inc()
                        items.append(_attachment(conversation, facts))
                        continue
            except ImageUnusable as exc:
                raise self._refusal(exc, place) from None
            items.append(upload)
            ready = False
        if ready:
            return tuple(items)  # type: ignore[arg-type]
        if self._checking and self._checking + size > MAX_CHECKING:
            raise DoorError("overloaded", "too many images are being checked", retry_after_s=1)
        self._checking += size
        return Uploads(conversation, items, size)

    async def keep(self, uploads: Uploads) -> tuple[Attachment, ...]:
        """Check what is left to check, and have it all on disk. Raises `DoorError` or `BackendUnavailable`.

        Everything is checked before anything is kept. To be called once for what `check_nowait` gave.
        """
        try:
            pending = [item for item in uploads.items if isinstance(item, Upload)]
            for upload in pending:
                upload.facts = self._kept.get(upload.hash)
                if upload.facts is None:
                    try:
                        upload.facts = await self._run(self._look, upload)
                    except ImageUnusable as exc:
                        raise self._refusal(exc, upload.place) from None
            for upload in pending:
                assert upload.facts is not None
                await self._keep(uploads.conversation, upload.facts, upload.data)
        finally:
            self._checking -= uploads.size
        kept = {upload.place: upload.facts for upload in pending if upload.facts is not None}
        return tuple(
            _attachment(uploads.conversation, kept[item.place]) if isinstance(item, Upload) else item
            for item in uploads.items
        )

    def _link(self, given: Attachment) -> Attachment:
        if given.url is None:
            raise ImageUnusable("it has neither url nor data")
        check_image_url(given.url, self._hosts)
        return Attachment("image", url=given.url, mime=given.mime if given.mime in MIMES else None)

    def _decode(self, upload: Upload) -> None:
        upload.data, upload.text = decode_base64(upload.text), ""
        if len(upload.data) > self._max_bytes:
            raise self._too_large(upload.place)
        upload.hash = hashlib.sha256(upload.data).hexdigest()

    def _look(self, upload: Upload) -> ImageFacts:
        if upload.text or not upload.hash:
            self._decode(upload)
        return inspect(upload.data, upload.hash)

    def _too_large(self, place: int) -> DoorError:
        text = f"an image is over {self._max_bytes} bytes - at `$.attachments[{place}]`"
        return DoorError("too_large", text, "the setting is max_image_bytes")

    def _refusal(self, exc: ImageUnusable, place: int) -> DoorError:
        self._counts["refused"].inc()
        return DoorError("bad_attachment", f"an image can't be used: {exc.reason} - at `$.attachments[{place}]`")

    async def _keep(self, conversation: str, facts: ImageFacts, data: bytes) -> None:
        """Have an image on disk, and that *conversation* shows it."""
        hash = facts.hash
        while (purging := self._purging.get(hash)) is not None:
            await asyncio.shield(purging)
        known = hash in self._kept
        if known and (conversation, hash) in self._shown:
            self._counts["known"].inc()
            return
        self._busy[hash] = self._busy.get(hash, 0) + 1
        try:
            written = False if known else await self._run(self._store.keep, hash, data)
            await self._backend.kv_set(_owner(hash), conversation, b"")
        finally:
            self._busy[hash] -= 1
            if not self._busy[hash]:
                del self._busy[hash]
        self._counts["kept" if written else "known"].inc()
        if not known:
            self._kept.put(hash, facts, REMEMBER_S)
        self._shown.put((conversation, hash), None, REMEMBER_S)
        self._remember(LoadedImage(data, facts.mime, facts.width, facts.height, hash))

    # -- for a turn, and for readers -------------------------------------------------------------------------

    async def load(self, attachment: Attachment, conversation: str) -> LoadedImage:
        """The image of an attachment of *conversation*, fetched if need be. Raises `ImageUnusable`."""
        try:
            if attachment.hash is not None:
                image = await self.read(conversation, attachment.hash)
                if image is None:
                    raise ImageUnusable("it is no longer kept")
                return image
            text = _base64_of(attachment)
            if text is not None:
                return await self._load_data(text, conversation)
            assert attachment.url is not None
            return await self._load_url(attachment.url, conversation)
        except BackendUnavailable as exc:
            raise ImageUnusable(exc.reason) from exc
        except DoorError as exc:
            raise ImageUnusable(exc.message) from exc

    async def read(self, conversation: str, hash: str) -> LoadedImage | None:
        """An image that *conversation* shows; None when it shows no such image. Raises `BackendUnavailable`."""
        if (conversation, hash) not in self._shown:
            if await self._backend.kv_get(_owner(hash), conversation) is None:
                return None
            if await self._backend.record(conversation) is None:
                return None  # purged, and its image will be
        image = self._cache.get(hash)
        if image is not None:
            self._cache.move_to_end(hash)
            return image
        data = await self._run(self._store.read, hash)
        if data is None:
            return None
        try:
            facts = await self._run(inspect, data, hash)
        except ImageUnusable as exc:
            raise BackendUnavailable("images", f"{self._store.path(hash)} is damaged: {exc.reason}") from exc
        image = LoadedImage(data, facts.mime, facts.width, facts.height, hash)
        self._remember(image)
        return image

    async def _load_data(self, text: str, conversation: str) -> LoadedImage:
        """What a plugin made, for a message never has its data."""
        upload = Upload(0, text)
        facts = await self._run(self._look, upload)
        return LoadedImage(upload.data, facts.mime, facts.width, facts.height, facts.hash)

    async def _load_url(self, url: str, conversation: str) -> LoadedImage:
        known = self._urls.get(url)
        if isinstance(known, ImageUnusable):
            raise ImageUnusable(known.reason)
        image = None
        if known is not None:
            image = self._cache.get(known) or await self.read(conversation, known)
        if image is None:
            task = self._fetching.get(url)
            if task is None:
                task = self._fetching[url] = host_task(self._fetch(url))
                task.add_done_callback(lambda _: self._fetching.pop(url))
            found = await asyncio.shield(task)
            if isinstance(found, ImageUnusable):
                raise ImageUnusable(found.reason)
            image = found
        facts = ImageFacts(image.hash, image.mime, image.width, image.height, len(image.data))
        await self._keep(conversation, facts, image.data)
        return image

    async def _fetch(self, url: str) -> LoadedImage | ImageUnusable:
        try:
            data = await self._fetcher.fetch(url)
            hash = await self._run(_hash, data)
            facts = await self._run(inspect, data, hash)
        except ImageUnusable as exc:
            self._counts["unusable"].inc()
            self._urls.put(url, ImageUnusable(exc.reason), FAILED_S)
            return exc
        except BackendUnavailable as exc:
            return ImageUnusable(exc.reason)
        self._counts["fetched"].inc()
        self._urls.put(url, hash, URL_S)
        image = LoadedImage(data, facts.mime, facts.width, facts.height, hash)
        self._remember(image)
        return image

    def _remember(self, image: LoadedImage) -> None:
        if image.hash in self._cache:
            return
        self._cache[image.hash] = image
        self._cached += len(image.data)
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1].data)

    # -- retention -------------------------------------------------------------------------------------------

    async def purge(self, before: float) -> int:
        """Delete images that nobody has wanted since *before* (Unix seconds) and no conversation shows; how many.

        Conversations are purged first. An old image that is still shown is looked at again a day later.
        """
        deleted = 0
        for hash in await self._run(self._store.older, before):
            if hash in self._busy or hash in self._purging:
                continue
            done = self._purging[hash] = asyncio.get_running_loop().create_future()
            try:
                deleted += await self._purge_one(hash, before)
            finally:
                del self._purging[hash]
                done.set_result(None)
        return deleted

    async def _purge_one(self, hash: str, before: float) -> bool:
        shown_in = await self._backend.kv_keys(_owner(hash), "")
        for conversation in shown_in:
            if await self._backend.record(conversation) is not None:
                await self._run(self._store.mark, hash, before + RECHECK_S)
                return False
        self._kept.drop(hash)
        if (image := self._cache.pop(hash, None)) is not None:
            self._cached -= len(image.data)
        for conversation in shown_in:  # first, so that what a kill leaves is a file, which the next purge finds
            self._shown.drop((conversation, hash))
            await self._backend.kv_set(_owner(hash), conversation, None)
        return await self._run(self._store.delete, hash, before)


class _Recent(Generic[K, V]):
    """What was learned lately: bounded in number, and forgotten after its time. The oldest go first."""

    def __init__(self) -> None:
        self._rows: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def get(self, key: K) -> V | None:
        row = self._rows.get(key)
        return row[0] if row is not None and row[1] > time.monotonic() else None

    def __contains__(self, key: K) -> bool:
        row = self._rows.get(key)
        return row is not None and row[1] > time.monotonic()

    def put(self, key: K, value: V, seconds: float) -> None:
        self._rows[key] = (value, time.monotonic() + seconds)
        self._rows.move_to_end(key)
        if len(self._rows) > REMEMBER:
            self._rows.popitem(last=False)

    def drop(self, key: K) -> None:
        self._rows.pop(key, None)


def described(attachment: Attachment) -> str:
    """An attachment in words, for whoever can't see it: `[image: PNG, 640x480, 23 KiB]`."""
    words = [attachment.mime.removeprefix("image/").upper()] if attachment.mime in MIMES else []
    if attachment.width and attachment.height:
        words.append(f"{attachment.width}x{attachment.height}")
    if attachment.bytes:
        words.append(_size(attachment.bytes))
    if attachment.hash is None and attachment.url is not None and not _is_data(attachment.url):
        try:
            words.append(f"at {URL(attachment.url).host}")
        except ValueError:
            pass
    return f"[image: {', '.join(words)}]" if words else "[image]"


def _size(count: int) -> str:
    if count < 1024:
        return f"{count} bytes"
    return f"{round(count / 1024)} KiB" if count < 1024 * 1024 else f"{count / 1024 / 1024:.1f} MiB"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _owner(hash: str) -> str:
    """Under this name the backend keeps which conversations show an image. The space keeps it from plugins' names."""
    return f"image {hash}"


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _base64_of(attachment: Attachment) -> str | None:
    """The base64 in an attachment, or in its `data:` URL; None when it has another URL. Raises `ImageUnusable`."""
    if attachment.data is not None:
        if attachment.url is not None:
            raise ImageUnusable("it has both url and data")
        return attachment.data
    if attachment.url is None or not _is_data(attachment.url):
        return None
    head, comma, text = attachment.url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageUnusable("its data: url is not base64")
    return text


def _attachment(conversation: str, facts: ImageFacts) -> Attachment:
    """An image as the record has it."""
    url = f"/v1/conversations/{quote(conversation, safe='')}/images/{facts.hash}"
    return Attachment("image", url, None, facts.mime, facts.hash, facts.width, facts.height, facts.bytes)
