"""Shards with everything that goes wrong in shards, and a manifest of what must and must not come out of each.

    python -m tests.data.broken_shards FOLDER

A key is a member's base name up to its first dot. Of each shard, `good_keys` must be delivered and `bad_keys` must not;
`free_keys` may be either, but count.
"""

import gzip
import io
import json
import os
import random
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.data.shards import members, picture, tar_bytes

Entry = tuple[str, bytes] | tarfile.TarInfo
BLOCK = 512


class Case:
    """One shard on its way to the manifest: its entries or its bytes, and its keys."""

    def __init__(self, expected: str) -> None:
        self.expected, self.entries = expected, []
        self.good: list[str] = []
        self.bad: list[str] = []
        self.free: list[str] = []
        self.data: bytes | None = None
        self.special: Callable[[Path], None] | None = None

    def whole(self, *numbers: int) -> "Case":
        """Add whole samples."""
        for n in numbers:
            self.entries += members(n)
            self.good.append(f"{n:06d}")
        return self

    def add(self, number: int, image: bytes | None, text: bytes | None, good: bool, extension: str = "jpg", meta: bytes | None = b"{}") -> "Case":
        """Add a sample of these parts."""
        key = f"{number:06d}"
        parts = ((extension, image), ("txt", text), ("json", meta))
        self.entries += [(f"{key}.{e}", data) for e, data in parts if data is not None]
        (self.good if good else self.bad).append(key)
        return self

    def tar(self, kind: int = tarfile.USTAR_FORMAT) -> bytes:
        """The entries as a tar."""
        return tar_bytes(self.entries, kind)


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


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, device or folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header_at(tar: bytes, name: str) -> int:
    """Where the header of member `name` lies."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getmember(name).offset


def with_size(tar: bytes, name: str, field: bytes) -> bytes:
    """`tar` with the size of a member replaced, and the header's checksum made right again."""
    at = header_at(tar, name)
    header = bytearray(tar[at : at + BLOCK])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + BLOCK :]


def structure() -> dict[str, Case]:
    """Tars that are damaged, or that few would write."""
    cases: dict[str, Case] = {}

    case = cases["healthy"] = Case("every sample").whole(1, 2, 3)

    for name, member, offset in (("image", "000003.png", 20), ("text", "000003.txt", 3), ("json", "000003.json", 9)):
        case = cases[f"truncated in an {name}"] = Case("samples before the cut").whole(1, 2)
        tar = tar_bytes(case.entries + members(3) + members(4))
        case.data, case.bad = tar[: header_at(tar, member) + BLOCK + offset], ["000003", "000004"]
    case = cases["truncated in a header"] = Case("samples before the cut").whole(1, 2)
    tar = tar_bytes(case.entries + members(3))
    case.data, case.bad = tar[: header_at(tar, "000003.png") + 100], ["000003"]

    cases["zero bytes"] = Case("nothing")
    cases["zero bytes"].data = b""
    cases["only zero blocks"] = Case("nothing")
    cases["only zero blocks"].data = bytes(10240)
    cases["a web page"] = Case("nothing")
    cases["a web page"].data = b"<!doctype html><html><body>404 Not Found</body></html>" * 40
    cases["noise"] = Case("nothing")
    cases["noise"].data = bytes(i * i * 31 % 251 for i in range(20_000))

    case = cases["no end of archive"] = Case("every sample").whole(1, 2)
    case.data = case.tar().rstrip(b"\0") + bytes(30)
    case = cases["garbage after the end"] = Case("every sample").whole(1, 2)
    case.data = case.tar() + b"garbage" * 300
    case = cases["two tars end to end"] = Case("every sample of both").whole(1, 2)
    case.data = case.tar() + tar_bytes(members(3))
    case.good.append("000003")
    case = cases["many zero blocks in the middle"] = Case("every sample").whole(1)
    case.data = case.tar() + bytes(5_000_192) + tar_bytes(members(2))
    case.good.append("000002")

    case = cases["gzip under the name tar"] = Case("every sample").whole(1, 2)
    case.data = gzip.compress(case.tar())
    case = cases["gzip cut short"] = Case("samples before the cut").whole(1)
    noise = ("000002.jpg", random.Random(0).randbytes(60_000))
    case.data, case.bad = gzip.compress(tar_bytes([*case.entries, noise, *members(3)]))[:-30_000], ["000002", "000003"]

    case = cases["header with a wrong checksum"] = Case("the other samples").whole(1, 2, 3)
    tar, at = case.tar(), header_at(case.tar(), "000002.png")
    case.data = tar[: at + 148] + b"0000000\0" + tar[at + 156 :]
    case.good, case.bad = ["000001", "000003"], ["000002"]
    case = cases["header of noise"] = Case("the other samples").whole(1, 2, 3)
    tar, at = case.tar(), header_at(case.tar(), "000002.txt")
    case.data = tar[:at] + bytes(range(256)) * 2 + tar[at + BLOCK :]
    case.good, case.bad = ["000001", "000003"], ["000002"]
    case = cases["bytes lost"] = Case("the other samples").whole(1, 2, 3, 4)
    tar, at = case.tar(), header_at(case.tar(), "000002.png")
    case.data = tar[: at + BLOCK + 5] + tar[at + BLOCK + 1000 + 3 :]
    case.good, case.bad, case.free = ["000001", "000003", "000004"], [], ["000002"]
    case = cases["bytes put in"] = Case("the other samples").whole(1, 2, 3)
    tar, at = case.tar(), header_at(case.tar(), "000002.png")
    case.data = tar[:at] + b"\r\n" * 77 + tar[at:]

    giants = {"giant size": b"77777777777\0", "size of 2**80": b"\x80" + (1 << 80).to_bytes(11, "big"), "negative size": b"\xff" * 12}
    for name, field in giants.items():
        case = cases[name] = Case("the other samples").whole(1, 2, 3)
        case.data = with_size(case.tar(), "000002.png", field)
        case.good, case.bad = ["000001", "000003"], ["000002"]
    case = cases["size that swallows samples"] = Case("the others, and the swallowed").whole(1, 2, 3, 4)
    case.data = with_size(case.tar(), "000002.png", b"%011o\0" % (BLOCK * 7 + 100))
    case.good, case.bad = ["000001", "000003", "000004"], ["000002"]
    return cases


def entries() -> dict[str, Case]:
    """Members that are no plain files, and names of all sorts."""
    cases: dict[str, Case] = {}
    case = cases["symbolic and hard links"] = Case("no linked sample").whole(1)
    case.entries += [entry("000002.png", tarfile.SYMTYPE, "/etc/passwd"), ("000002.txt", b"a link")]
    case.entries += [entry("000003.png", tarfile.LNKTYPE, "000001.png"), ("000003.txt", b"a hard link")]
    case.entries += [("000004.png", picture(4)), entry("000004.txt", tarfile.SYMTYPE, "000001.txt")]
    case.bad = ["000002", "000003", "000004"]
    case.whole(5)
    case = cases["FIFOs and devices"] = Case("the others").whole(1)
    for n, kind in enumerate((tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE), 2):
        case.entries += [entry(f"{n:06d}.png", kind), (f"{n:06d}.txt", b"a device")]
        case.bad.append(f"{n:06d}")
    case.whole(6)
    case = cases["sparse member"] = Case("the other sample").whole(1)
    sparse = tarfile.TarInfo("000002.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "000002.png", "GNU.sparse.realsize": "4096"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        data = b"1\n0\n100\n".ljust(BLOCK, b"\0") + picture(2)
        sparse.size = len(data)
        tar.addfile(sparse, io.BytesIO(data))
    case.data, case.bad = out.getvalue() + tar_bytes([("000002.txt", b"holes"), *case.entries]), ["000002"]

    case = cases["path traversal"] = Case("labels only: delivered, nothing written")
    for n, folder in enumerate(("../../../tmp/", "/etc/", "a/../../b/", "./", "deep/er/"), 1):
        case.entries += members(n, f"{folder}{n:06d}")
        case.good.append(f"{n:06d}")
    case = cases["long names"] = Case("every sample").whole(1)
    long = "k" * 90
    case.entries += members(2, f"{'folder/' * 30}{long}")
    case.good.append(long)
    case.data = case.tar(tarfile.GNU_FORMAT)
    case = cases["pax names"] = Case("every sample").whole(1)
    case.entries += [m for n, key in enumerate(("名前", "clé", "w" * 300), 2) for m in members(n, key)]
    case.good += ["名前", "clé", "w" * 300]
    case.data = case.tar(tarfile.PAX_FORMAT)
    case = cases["NULs and noise in names"] = Case("nothing breaks").whole(1)
    tar = tar_bytes([*case.entries, *members(2, "caf\u00e9"), *members(3, "x0y")], tarfile.GNU_FORMAT)
    case.data, case.free = tar.replace("caf\u00e9".encode(), b"ca\xff\xfe\xe9").replace(b"x0y.", b"x\0y."), ["x"]
    for name, kind in (("folders and dotfiles", tarfile.DIRTYPE),):
        case = cases[name] = Case("every sample").whole(1)
        case.entries = [entry("set", kind), entry("000009.d", kind), ("._000001.png", b"Mac"), ("README", b"read me"), *case.entries]
        case.entries += [(".DS_Store", b"\0\0"), ("set/._000002.png", b"Mac"), *members(2, "set/000002")]
        case.good.append("000002")
    case = cases["extra members"] = Case("every sample").whole(1, 2)
    case.entries = [("000001.npy", b"\x93NUMPY"), *case.entries, ("000002.cls", b"4"), ("000002.seg.png", picture(99)), ("000003.npy", b"")]
    case.bad = ["000003"]

    case = cases["interleaved members"] = Case("every sample").whole(1, 2, 3)
    case.entries = case.entries[::3] + case.entries[1::3] + case.entries[2::3]
    case = cases["members in reverse"] = Case("every sample").whole(1, 2, 3)
    case.entries.reverse()
    case = cases["image and text in two folders"] = Case("every sample")
    for n in (1, 2):
        (image, a), (text, b), _ = members(n)
        case.entries += [(f"images/{image}", a), (f"texts/{text}", b)]
        case.good.append(f"{n:06d}")
    case = cases["duplicate keys"] = Case("the first of each").whole(1, 2)
    case.entries += [("000001.png", picture(200)), ("000001.txt", b"another"), *members(2)]
    case = cases["one key in two folders"] = Case("both").whole(1)
    case.entries += members(1, "more/000001")
    case = cases["image given twice, text once"] = Case("no wrong pair").whole(1)
    case.entries += [("000002.png", picture(2)), ("000002.png", picture(200)), ("000002.txt", b"of which?")]
    case.free = ["000002"]
    case = cases["old tar without magic"] = Case("every sample").whole(1, 2)
    tar = bytearray(case.tar())
    for name, _ in case.entries:
        at = header_at(case.tar(), name)
        tar[at + 257 : at + BLOCK] = bytes(BLOCK - 257)
        tar[at + 148 : at + 156] = b" " * 8
        tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])
    case.data = bytes(tar)
    return cases


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
    case.add(4, jpeg[: jpeg.index(b"\xff\xc0") + 5] + b"\xff\xff\xff\xff" + jpeg[jpeg.index(b"\xff\xc0") + 9 :], b"jpeg", False)
    case.add(5, saved(Image.new("1", (15_000, 15_000)), "PNG"), b"one that would decode", False, "png")

    case = cases["unusual colours"] = Case("every sample")
    wide = Image.new("I;16", (20, 10), 40_000)
    unusual = [photo.convert("CMYK"), photo.convert("L"), photo.convert("P"), photo.convert("RGBA"), photo.convert("LA"), photo.convert("1"), wide]
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
    unusual = (b"\xef\xbb\xbfwith a mark", b"nul\0inside", b"two\r\nlines\r\n", "名前 \U0001f600".encode(), b"x" * 1_000_000, b"word " * 210_000)
    for n, text in enumerate((*unusual, b"\x1b[31mred", ("é" * 600_000).encode()), 1):
        case.add(n, image, text, True)
    case = cases["nothing usable"] = Case("nothing, and it ends")
    for n in range(1, 20):
        case.add(n, b"not an image", b"fine", False)
    return cases


def files() -> dict[str, Case]:
    """Files that only look like shards."""
    cases: dict[str, Case] = {}
    for name, make in (("a FIFO", os.mkfifo), ("a folder", os.mkdir), ("a link to nothing", lambda path: os.symlink("nowhere", path))):
        cases[name] = Case("nothing, and no waiting")
        cases[name].special = make
    return cases


def write(folder: Path) -> Path:
    """Write all shards and manifest.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (problem, case) in enumerate((structure() | entries() | pictures() | captions() | files()).items()):
        path = folder / f"{number:02d}-{problem.replace(' ', '-').replace(',', '')}.tar"
        if case.special:
            case.special(path)
        else:
            path.write_bytes(case.tar() if case.data is None else case.data)
        keys = {"good_keys": case.good, "bad_keys": case.bad, "free_keys": case.free}
        listed.append({"file": path.name, "problem": problem, "expected": case.expected, **keys})
    (folder / "manifest.json").write_text(json.dumps({"shards": listed}, indent=1, ensure_ascii=False))
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
