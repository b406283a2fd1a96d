"""Which format a file is of, by its first bytes: the formats that are read, and the pictures that are named but not read."""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, features

JP2, JXL = b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x0cJXL \r\n\x87\n"

# Pillow's name of each format that is read -> how its files begin.
READ = {
    "JPEG": (b"\xff\xd8",),
    "PNG": (b"\x89PNG",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG2000": (b"\xff\x4f\xff\x51", JP2),
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
    "ICO": (b"\0\0\1\0",),
}

# A word for a format that is not read -> its name, how its files begin, and how they are called.
UNREAD: dict[str, tuple[str, tuple[bytes, ...], tuple[str, ...]]] = {
    "jxl": ("JPEG XL", (b"\xff\x0a", JXL), ("jxl",)),
    "heic": ("HEIC", (), ("heic", "heif", "hif")),
    "avif": ("AVIF", (), ()),  # where this Pillow cannot read it
    "jxr": ("JPEG XR", (b"II\xbc\0", b"II\xbc\1"), ("jxr", "wdp", "hdp")),
    "svg": ("SVG", (), ("svg", "svgz")),
    "psd": ("Photoshop", (b"8BPS",), ("psd", "psb")),
    "exr": ("OpenEXR", (b"\x76\x2f\x31\1",), ("exr",)),
    "hdr": ("Radiance HDR", (b"#?RADIANCE", b"#?RGBE"), ("hdr",)),
    "eps": ("PostScript", (b"%!PS", b"\xc5\xd0\xd3\xc6"), ("eps",)),
    "pdf": ("PDF", (b"%PDF-",), ("pdf",)),
    "raw": ("camera raw", (b"FUJIFILMCCD-RAW", b"IIRO", b"IIU\0", b"FOVb"), ("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf")),
    "tga": ("Targa", (), ("tga",)),
    "pcx": ("PCX", (), ("pcx",)),
    "dds": ("DirectDraw Surface", (b"DDS ",), ("dds",)),
    "qoi": ("QOI", (b"qoif",), ("qoi",)),
    "icns": ("Apple icons", (b"icns",), ("icns",)),
    "xcf": ("GIMP", (b"gimp xcf",), ("xcf",)),
    "dicom": ("DICOM", (), ("dcm",)),
}
EXTENSIONS = {extension: word for word, (_, _, extensions) in UNREAD.items() for extension in extensions}

BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"crx ": "raw"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "heic"
)  # of ISO base media files
GENERAL = (b"mif1", b"msf1")  # brands of pictures in any coding; without another it is HEIC or one rarer still
VECTOR = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml|<!--|<!DOCTYPE svg|<svg[\s>])", re.IGNORECASE)
SNIFFED = 1024  # bytes in which a format shows itself, of which SVG takes the most


class Undecodable(ValueError):
    """An image that must not be used. `reason`: empty, notimage, truncated, corrupt, bomb, tiny, or a word of UNREAD."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def sniff(head: bytes) -> str:
    """The format that a file of these first bytes has: a key of READ, "WEBP" or "AVIF", a key of UNREAD, or "" for none of them."""
    head = head[:SNIFFED]
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] in (b"WEBP", b"") else ""
    if head[4:8] == b"ftyp":
        length = max(16, min(int.from_bytes(head[:4]), 256))
        brands = [head[8:12]] + [head[i : i + 4] for i in range(16, length, 4)]
        found = [BRANDS[brand] for brand in brands if brand in BRANDS]
        if "AVIF" in found:
            return _readable_avif()
        general = any(brand in GENERAL for brand in brands) and length <= len(head)
        return found[0] if found else "heic" if general else ""
    if head[8:10] == b"CR" and head[:4] == b"II*\0":
        return "raw"
    if head[128:132] == b"DICM":
        return "dicom"
    for name, starts in READ.items():
        if head.startswith(starts):
            return name
    for word, (_, starts, _) in UNREAD.items():
        if starts and head.startswith(starts):
            return word
    if VECTOR.match(head) and re.search(rb"<svg[\s>]", head, re.IGNORECASE):
        return "svg"
    return ""


def unread(paths: Iterable[Path]) -> list[str]:
    """Of these files those that are called like a picture that is not read, each with its format."""
    words = ((path, EXTENSIONS.get(path.suffix[1:].lower())) for path in paths)
    return [f"{path} is {UNREAD[word][0]}" for path, word in words if word]


def told(word: str) -> str:
    """What a reason of this word means."""
    return f"the image is {UNREAD[word][0]}, a format that is not read; convert it to JPEG, PNG or WebP"


@functools.cache
def _readable_avif() -> str:
    Image.init()
    return "AVIF" if "AVIF" in Image.OPEN and features.check("avif") else "avif"
