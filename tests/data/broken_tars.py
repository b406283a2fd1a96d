"""Tars that are damaged, or that few would write."""

import gzip
import io
import random
import tarfile

from tests.data.broken_case import Case
from tests.data.shards import members, picture, tar_bytes

BLOCK = 512


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

    giants = {
        "giant size": b"77777777777\0",
        "size of 2**80": b"\x80" + (1 << 80).to_bytes(11, "big"),
        "negative size": b"\xff" * 12,
    }
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
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "000002.png",
        "GNU.sparse.realsize": "4096",
    }
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
        case.entries = [
            entry("set", kind),
            entry("000009.d", kind),
            ("._000001.png", b"Mac"),
            ("README", b"read me"),
            *case.entries,
        ]
        case.entries += [(".DS_Store", b"\0\0"), ("set/._000002.png", b"Mac"), *members(2, "set/000002")]
        case.good.append("000002")
    case = cases["extra members"] = Case("every sample").whole(1, 2)
    case.entries = [
        ("000001.npy", b"\x93NUMPY"),
        *case.entries,
        ("000002.cls", b"4"),
        ("000002.seg.png", picture(99)),
        ("000003.npy", b""),
    ]
    case.bad = ["000003"]

    case = cases["names with dots"] = Case("every pair, and none of lone parts").whole(1)
    case.entries += [m for n in (2, 3) for m in members(n, f"photo.{n}")] + [
        ("000004.raw.png", picture(4)),
        ("000004.txt", b"four"),
    ]
    case.entries += [("000001.depth.png", picture(9)), ("000005.en.txt", b"five"), ("000005.small.jpg", picture(5))]
    case.good, case.bad = [*case.good, "photo", "000004"], ["000005"]
    case = cases["parts by name"] = Case("every sample")
    for n in (1, 2):
        (_, a), (_, b), (_, c) = members(n)
        case.entries += [(f"{n:06d}.photo.png", a), (f"{n:06d}.caption.txt", b), (f"{n:06d}.meta.json", c)]
        case.good.append(f"{n:06d}")
    case = cases["lone parts in two folders"] = Case("whole pairs only").whole(1)
    case.entries += [*members(2, "cats/000002"), ("cats/000003.png", picture(3)), ("dogs/000003.txt", b"a dog")]
    case.good, case.bad = [*case.good, "000002"], ["000003"]

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
