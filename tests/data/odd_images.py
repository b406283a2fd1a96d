"""Images whose files are unusual, hostile or cut, made from bytes up where no encoder writes them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth colours with one hard edge, no two corners alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    coarse.paste((250, 10, 40), (0, 0, max(1, width // 4), max(1, height // 5)))
    return coarse


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, color: int = 2, bits: int = 8) -> bytes:
    """A PNG whose header declares this size and kind, with next to nothing behind it."""
    header = struct.pack(">LLBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def with_chunks(data: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with further chunks in front of its pixels, or behind them."""
    at = len(data) - 12 if behind else 33
    return data[:at] + b"".join(chunks) + data[at:]


def exif(orientation: int) -> bytes:
    """A TIFF block that says the orientation, as EXIF holds it."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes().removeprefix(b"Exif\0\0")


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def tiff(width: int, height: int, tile: int, order: str = "<", tags: tuple = ()) -> bytes:
    """A grey deflate TIFF of one black square tile, cut if it is large, with further (tag, type, number, value) entries."""
    data = zlib.compress(bytes(min(tile * tile, 1 << 16)))
    data += bytes(len(data) % 2)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries += [(322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, len(data)), *tags]
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HL", 42, 8 + len(data)) + data + struct.pack(order + "H", len(entries))
    for tag, kind, number, value in sorted(entries):
        form = {3: "HHLH2x", 4: "HHLL", 1: "HHLL"}[kind]
        out += struct.pack(order + form, tag, kind, number, value)
    return out + bytes(4)


def ico(picture: bytes) -> bytes:
    """An icon that says 64 x 64 and holds `picture`."""
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(picture), 22) + picture


def scans(side: int, components: int = 1, rounds: int = 14) -> bytes:
    """A progressive JPEG of `components` that sends every bit of every coefficient in a scan of its own, each of them empty."""
    blocks = (side // 8) ** 2
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64)
    out += segment(0xC2, struct.pack(">BHHB", 8, side, side, components) + b"".join(bytes([c + 1, 0x11, 0]) for c in range(components)))
    out += segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    out += segment(0xC4, b"\x10" + bytes([1] * 15 + [0]) + bytes([*range(0xE0, 0, -0x10), 0]))
    bits, left = "", blocks
    while left:  # runs of blocks without a coefficient
        run = min(left, 32767)
        power = run.bit_length() - 1
        bits += "1" * (14 - power) + "0" + (format(run - (1 << power), f"0{power}b") if power else "")
        left -= run
    bits += "1" * (-len(bits) % 8)
    empty = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")
    for c in range(components):
        out += segment(0xDA, bytes([1, c + 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8))
    for c in range(components):
        for k in range(1, 64):
            for low in reversed(range(rounds)):
                high = 0 if low == rounds - 1 else low + 1
                out += segment(0xDA, bytes([1, c + 1, 0, k, k, high << 4 | low])) + empty
    return out + b"\xff\xd9"


def samsung(blocks: int = 2) -> bytes:
    """What Samsung's phones append: blocks, then a directory that tells how far in front of it they begin."""
    data = [struct.pack("<HHL", 0, 0x0A01 + i, 8) + b"\xff\xd8\xff\xe1name" + bytes(range(256)) for i in range(blocks)]
    back = [sum(map(len, data[i:])) for i in range(blocks)]
    entries = b"".join(struct.pack("<HHLL", 0, 0x0A01 + i, back[i], len(data[i])) for i in range(blocks))
    directory = b"SEFH" + struct.pack("<LL", 107, blocks) + entries
    return b"".join(data) + directory + struct.pack("<L", len(directory)) + b"SEFT"
