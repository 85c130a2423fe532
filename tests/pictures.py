"""Images for tests: small files whose headers say what a test wants, in the four formats that are taken."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib

from PIL import Image

__all__ = ["FORMATS", "encoded", "noise", "picture", "png"]

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48)) -> bytes:
    """A real image, written by a real encoder; no two of them are the same."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).save(buffer, kind)
    return buffer.getvalue()


def noise(size: int) -> bytes:
    """A PNG of *size* random bytes or a little more, whose header is in order."""
    return png(100, 100, os.urandom(size))


def png(width: int, height: int, pixels: bytes = b"", *, before: bytes = b"") -> bytes:
    """A PNG that claims to be so large; *before* are chunks ahead of its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"".join(parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()
