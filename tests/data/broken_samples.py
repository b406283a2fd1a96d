"""Images and captions that are broken, or unusual but fine."""

import io
import struct
import zlib

from PIL import Image

from tests.data.broken_case import Case
from tests.data.shards import picture


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header declares this size, with next to nothing behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def pictures() -> dict[str, Case]:
    """Images that are broken, huge, or unusual but fine."""
    cases: dict[str, Case] = {}
    photo = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 40).convert("RGB")
    jpeg = saved(photo, "JPEG")
    case = cases["corrupt images"] = Case("the whole one").add(1, jpeg, b"fine", True)
    case.add(2, jpeg[: len(jpeg) // 2], b"half", False).add(3, jpeg[:2] + bytes(500), b"zeros", False)
    case.add(4, b"\x89PNG\r\n\x1a\n" + bytes(80), b"no png", False, "png").add(5, saved(photo, "PNG")[:-900], b"cut png", False, "png")
    case.add(6, jpeg[:4], b"four bytes", False).add(7, saved(photo, "WEBP")[:-300], b"cut webp", False, "webp")
    case = cases["empty images"] = Case("the whole one").add(1, jpeg, b"fine", True).add(2, b"", b"none", False)
    case = cases["no images"] = Case("the whole one").add(1, jpeg, b"fine", True).add(2, None, b"no picture", False)
    page = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>"
    case = cases["web pages as images"] = Case("the whole one").add(1, jpeg, b"fine", True).add(2, page, b"page", False)
    case.add(3, b'{"error": "not found"}', b"json", False).add(4, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"svg", False)
    case.add(5, b"plain words", b"words", False).add(6, b"%PDF-1.4\n%%EOF", b"pdf", False).add(7, b"PK\3\4" + bytes(60), b"zip", False)
    case = cases["one pixel"] = Case("the whole one").add(1, jpeg, b"fine", True)
    case.add(2, picture(2, size=(1, 1)), b"dot", False, "png").add(3, picture(3, "GIF", (1, 1)), b"tracking dot", False, "gif")
    case = cases["decompression bombs"] = Case("the whole one").add(1, jpeg, b"fine", True)
    case.add(2, png_of(50_000, 50_000), b"2.5 gigapixels", False, "png").add(3, png_of(2**31 - 1, 2**31 - 1), b"more", False, "png")
    case.add(
        4,
        jpeg[: jpeg.index(b"\xff\xc0") + 5] + b"\xff\xff\xff\xff" + jpeg[jpeg.index(b"\xff\xc0") + 9 :],
        b"jpeg",
        False,
    )
    case.add(5, saved(Image.new("1", (15_000, 15_000)), "PNG"), b"one that would decode", False, "png")

    case = cases["unusual colours"] = Case("every sample")
    wide = Image.new("I;16", (20, 10), 40_000)
    unusual = [
        photo.convert("CMYK"),
        photo.convert("L"),
        photo.convert("P"),
        photo.convert("RGBA"),
        photo.convert("LA"),
        photo.convert("1"),
        wide,
    ]
    for n, image in enumerate(unusual, 1):
        kind = "JPEG" if image.mode == "CMYK" else "PNG"
        case.add(n, saved(image, kind), b"colours", True, kind.lower())
    case.add(8, saved(photo.convert("P"), "PNG", transparency=3), b"palette with a hole", True, "png")
    case.add(9, saved(photo.convert("CMYK"), "TIFF"), b"print", True, "tif").add(10, saved(photo, "BMP"), b"bitmap", True, "bmp")
    case = cases["unusual jpegs"] = Case("every sample")
    case.add(1, saved(photo, "JPEG", progressive=True), b"progressive", True).add(2, saved(photo, "JPEG", subsampling=0), b"4:4:4", True)
    exif = Image.Exif()
    exif[0x0112] = 6
    case.add(3, saved(photo, "JPEG", exif=exif), b"turned", True).add(4, jpeg + b"trailing bytes" * 9, b"trailer", True)
    case = cases["animations"] = Case("every sample, as its first frame")
    frames = [Image.new("RGB", (16, 16), (80 * i, 9, 9)) for i in range(3)]
    for n, kind in enumerate(("GIF", "WEBP", "PNG"), 1):
        case.add(n, saved(frames[0], kind, save_all=True, append_images=frames[1:]), b"moves", True, kind.lower())
    case = cases["names and contents"] = Case("every sample")
    for n, extension in enumerate(("JPG", "jpeg", "PNG", "webp", "Jpg", "orig.jpg", "image", "bin"), 1):
        case.add(n, jpeg, b"content decides", True, extension)
    case.entries = [(n.replace("000005.txt", "000005.TXT"), d) if isinstance(d, bytes) else d for n, d in case.entries]
    return cases


def captions() -> dict[str, Case]:
    """Captions that are missing, broken, or unusual but fine."""
    cases: dict[str, Case] = {}
    image = picture(5, "JPEG")
    case = cases["missing captions"] = Case("the whole one").add(1, image, b"fine", True)
    case.add(2, image, None, False, meta=None).add(3, image, None, False, meta=b'{"width": 12}').add(4, image, None, False, meta=b"no json")
    case = cases["captions in the json only"] = Case("nothing unless data.caption_field asks for it").add(1, image, b"fine", True)
    case.add(2, image, None, False, meta=b'{"caption": "in the json"}').add(3, image, None, False, meta=b'{"captions": ["one", "two"]}')
    case = cases["broken json"] = Case("every sample: the pair is whole")
    for n, meta in enumerate((b"{", b"[1, 2]", b"\xff\xfe", b"", b"[" * 100_000), 1):
        case.add(n, image, b"fine", True, meta=meta)
    case = cases["empty and blank captions"] = Case("the whole one").add(1, image, b"fine", True)
    for n, text in enumerate((b"", b" ", b"\n\r\n\t", b"\0\0\0", b"\xef\xbb\xbf", "\u3000\u200b".encode()), 2):
        case.add(n, image, text, False, meta=b'{"caption": "but KEY.txt rules"}')
    case = cases["undecodable captions"] = Case("the whole one").add(1, image, b"fine", True)
    for n, text in enumerate(("caf\u00e9".encode("latin-1"), b"\xff\xfe\x00\x01\x80", "utf sixteen".encode("utf-16"), b"ab\xc3"), 2):
        case.add(n, image, text, False)
    case = cases["unusual captions"] = Case("every sample")
    unusual = (
        b"\xef\xbb\xbfwith a mark",
        b"nul\0inside",
        b"two\r\nlines\r\n",
        "名前 \U0001f600".encode(),
        b"x" * 1_000_000,
        b"word " * 210_000,
    )
    for n, text in enumerate((*unusual, b"\x1b[31mred", ("é" * 600_000).encode()), 1):
        case.add(n, image, text, True)
    case = cases["nothing usable"] = Case("nothing, and it ends")
    for n in range(1, 20):
        case.add(n, b"not an image", b"fine", False)
    return cases
