"""Pictures of matrices, decoded by the rules of the PNG format."""

from __future__ import annotations

import base64
import struct
import zlib

import torch

from pipeline.report.png import LEVELS, palette, png_uri, scale_of


def decode(uri: str) -> list[list[int]]:
    """Palette indices of one of our PNGs, by the format's own rules."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (size,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        parts[name], at = body, at + 12 + size
    width, height, depth, color = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    raw = zlib.decompress(parts[b"IDAT"])
    assert (depth, color, len(raw)) == (8, 3, height * (width + 1)) and parts[b"PLTE"] == palette()
    return [list(raw[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)]


def test_a_picture_holds_the_matrix() -> None:
    matrix = torch.tensor([[0.0, 1.0, -1.0], [0.25, -5.0, 7.0]])
    assert decode(png_uri(matrix, 1.0)) == [
        [LEVELS, 2 * LEVELS, 0],
        [LEVELS + round(LEVELS / 2), 0, 2 * LEVELS],
    ]
    assert len(palette()) == 3 * (2 * LEVELS + 1) and scale_of(torch.zeros(2, 2)) == 1.0
