"""What bytes are: the image they hold, by their content and never by a name or a claim. The only importer of Pillow."""

from __future__ import annotations

import io

import msgspec
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import ImageUnusable

__all__ = ["MIMES", "ImageFacts", "decode_base64", "inspect"]

MAX_PIXELS = 50_000_000
"""The largest image, width times height. A few kilobytes can claim any number of pixels, and whoever shows the image
pays for them; the phones of today stay below this unless told otherwise."""

MAX_READS = 20_000
"""How often a header may be read from before it is no header: a real one takes some hundred reads, five megabytes of
tiny chunks a million, which would hold the interpreter for seconds."""

_KINDS: tuple[tuple[bytes, bytes, str, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", b"", "image/png", PngImageFile),
    (b"\xff\xd8\xff", b"", "image/jpeg", JpegImageFile),
    (b"GIF87a", b"", "image/gif", GifImageFile),
    (b"GIF89a", b"", "image/gif", GifImageFile),
    (b"RIFF", b"WEBP", "image/webp", WebPImageFile),
)
"""How each format begins, and what stands at its ninth byte."""

MIMES = frozenset(kind[2] for kind in _KINDS)


class ImageFacts(msgspec.Struct, frozen=True):
    """What is known of an image once its bytes were looked at. `bytes` is how many they are."""

    hash: str
    mime: str
    width: int
    height: int
    bytes: int


class _Counted(io.BytesIO):
    """Bytes that may be read from so many times and no more."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("the header does not end")
        return super().read(size)


def inspect(data: bytes, hash: str) -> ImageFacts:
    """The facts of an image, from its header; no pixel is decoded. Raises `ImageUnusable`.

    Blocks for some 100 µs: from a thread, where it matters. The format's reader is called by its own name, so that
    no other is tried, and none that another program in this process has added.
    """
    found = next((kind for kind in _KINDS if data.startswith(kind[0]) and data.startswith(kind[1], 8)), None)
    if found is None:
        raise ImageUnusable("it is no PNG, JPEG, GIF or WEBP image")
    mime, reader = found[2:]
    try:
        width, height = reader(_Counted(data)).size
    except Exception as exc:  # what a reader makes of bytes that were made to break it may be anything
        raise ImageUnusable(f"it begins like {mime}, but its header can't be read") from exc
    if width * height > MAX_PIXELS:
        raise ImageUnusable(f"it is {width}x{height}; the most is {MAX_PIXELS // 1_000_000} million pixels")
    return ImageFacts(hash, mime, width, height, len(data))


def decode_base64(text: str) -> bytes:
    """The bytes of base64 as the standard writes it: one line, padded. Raises `ImageUnusable`.

    By the JSON library's own decoder, which is as strict as the interpreter's in its strict mode, at a fifth of the
    cost: 17 µs for an image of 30 KiB.
    """
    try:
        return msgspec.convert(text, bytes)
    except (msgspec.ValidationError, UnicodeError):
        raise ImageUnusable("its data is not valid base64") from None
