"""A matrix as a small PNG in a data URI, so that an HTML page without scripts can show ten thousand numbers.

Decision: 30 lines here instead of a plotting library, which would be a heavy import for one picture per head.
"""

from __future__ import annotations

import base64
import struct
import zlib

import torch
from torch import Tensor

NEGATIVE, MIDDLE, POSITIVE = (33, 92, 130), (247, 246, 242), (196, 88, 32)  # blue, near white, orange
LEVELS = 127  # on each side of zero


def palette() -> bytes:
    """RGB of every index 0..254: `LEVELS` is zero."""
    out = bytearray()
    for index in range(2 * LEVELS + 1):
        side = POSITIVE if index >= LEVELS else NEGATIVE
        share = abs(index - LEVELS) / LEVELS
        out += bytes(round(m + (s - m) * share) for m, s in zip(MIDDLE, side, strict=True))
    return bytes(out)


def scale_of(matrix_KK: Tensor) -> float:
    """The value drawn in full color: the 99th percentile of |x|, so that one large entry does not fade the others."""
    size = matrix_KK.abs().flatten().double()
    return float(torch.quantile(size, 0.99)) or float(size.max()) or 1.0


def png_uri(matrix_KK: Tensor, scale: float) -> str:
    """The matrix in the diverging palette, -scale to scale, one pixel an entry; row 0 on top."""
    share = (matrix_KK.double() / scale).clamp(-1, 1)
    share = share.sign() * share.abs().sqrt()  # small entries stay visible
    index = (share * LEVELS).round().to(torch.int64) + LEVELS
    height, width = index.shape
    rows = b"".join(b"\0" + bytes(row) for row in index.tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette
    parts = ((b"IHDR", header), (b"PLTE", palette()), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts)
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
