"""Mutated shards, read to the pixels: no crash, no hang, no caption with another's image, and no sample lost without a word."""

import bz2
import gzip
import hashlib
import json
import lzma
import random
import tarfile
import time
import warnings

import pytest

from jaxvl.data import decode
from jaxvl.data.cache import Cache
from jaxvl.data.dataset import DataOptions, decode_options
from jaxvl.data.source import Bad, Place, Want
from jaxvl.data.sources import open_source
from jaxvl.data.targroup import group
from jaxvl.data.tarwalk import Member
from tests.data.broken_tars import BLOCK
from tests.data.shards import number_of, picture, tar_bytes

LIMIT = 20.0  # seconds
SAMPLES = 6
HOW = decode_options(DataOptions(image_size=8, crop_scale=(1.0, 1.0)))


def _caption(number):
    """A text that says whose it is, and of which damage can be told."""
    return f"number {number} {hashlib.md5(b'%d' % number).hexdigest()}"


def _base(rng):
    """A healthy tar of one of the kinds that are written, and how to pack it."""
    long = "folder-of-a-long-name/" * rng.choice((0, 0, 5, 8))
    entries = []
    for number in range(SAMPLES):
        key = long + hashlib.md5(b"key %d" % number).hexdigest()[:12]
        parts = [("png", picture(number)), ("txt", _caption(number).encode()), ("json", json.dumps({"n": number}).encode())]
        entries += [(f"{key}.{extension}", data) for extension, data in parts[: rng.choice((2, 3))]]
    if rng.random() < 0.2:
        rng.shuffle(entries)
    kind = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)) if long else tarfile.USTAR_FORMAT
    pack = rng.choice((None, None, None, None, gzip.compress, bz2.compress, lzma.compress))
    return tar_bytes(entries, kind), pack


def _flip(data, rng):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 16, 200))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data, rng):
    return data[: rng.randrange(len(data))]


def _out(data, rng):
    at, length = rng.randrange(len(data)), rng.choice((1, 3, 100, 511, 1500, 5000))
    return data[:at] + data[at + length :]


def _in(data, rng):
    at = rng.randrange(len(data))
    return (
        data[:at] + rng.choice((rng.randbytes, bytes, lambda n: b"ustar\0" * n, lambda n: data[:n]))(rng.randrange(1, 2000) | 1) + data[at:]
    )


def _over(data, rng):
    at, length = rng.randrange(len(data)), rng.choice((8, 100, 512, 3000)) | 1
    return data[:at] + rng.randbytes(length)[: len(data) - at] + data[at + length :]


def _zeros(data, rng):
    """Zeros over a stretch that is followed by members; the end of a tar is zeros by right."""
    at = rng.randrange(max(1, len(data) // 3))
    length = rng.randrange(1, len(data) // 3)
    return data[:at] + bytes(length) + data[at + length :]


def _header(data, rng):
    """A field of a header replaced, and its checksum made right."""
    starts = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(starts)
    block = bytearray(data[at : at + BLOCK])
    if rng.random() < 0.5:
        sizes = (
            b"%011o\0" % rng.randrange(1 << 16),
            b"7" * 11 + b"\0",
            b"\x80" + rng.randbytes(11),
            b"\xff" * 12,
            b"%011o\0" % rng.randrange(1 << 30),
        )
        block[124:136] = rng.choice(sizes)
    else:
        block[156] = rng.choice(b"01234567LKxXgSDMVA\0")
        block[482] = block[504] = rng.randrange(2)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + BLOCK :]


PLAIN = (_flip, _cut, _out, _in, _over, _zeros, _header)
PACKED = (_flip, _cut, _out, _in, _over)
SILENT = (_header,)  # a size may swallow a sample whole, and nothing is left that could tell


def _names(rng):
    """Names of members that are hard to put together."""
    folders = rng.sample(["", "images/", "captions/", "cats/", "dogs/", "a/images/", "a/texts/", "imgs/x/", "./"], rng.choice((1, 1, 2, 3)))
    infixes, extensions = (
        rng.sample(["", ".1", ".2", ".raw", ".cap", ".1.a"], rng.choice((1, 2, 3))),
        ["jpg", "txt", "json", "cls", "npy", "bin"],
    )
    one = lambda: rng.choice(folders) + rng.choice("ab") + rng.choice(infixes) + "." + rng.choice(extensions[: rng.choice((2, 3, 6))])
    return [one() for _ in range(rng.randrange(1, 14))]


def _read(path, folder):
    """The number of every pair that is delivered, and the words for all else."""
    source = open_source(str(path), Place(str(folder / "index"), Cache(str(folder / "cache"), 1 << 30)))
    words, pairs = [bad.reason for bad in source.known()], []
    for row in range(int(source.counts[0])):
        record = source.read(0, row, Want())
        if isinstance(record, Bad):
            words.append(record.reason)
            continue
        try:
            pixels = decode.decode_eval(record.image, HOW)
        except decode.Undecodable as error:
            words.append(error.reason)
            continue
        pairs.append((number_of(pixels), record.captions[0]))
    return pairs, words


@pytest.mark.parametrize("seeds", [pytest.param(range(150), id="share"), pytest.param(range(150, 5000), id="rest", marks=pytest.mark.long)])
def test_no_shard_crashes_hangs_or_lies(seeds, tmp_path):
    captions = {_caption(n): n for n in range(SAMPLES)}
    for seed in seeds:
        rng = random.Random(seed)
        data, pack = _base(rng)
        mutate = rng.choice(PACKED if pack else PLAIN)
        data = mutate(pack(data) if pack else data, rng)
        twice = not pack and len(data) > 10 * BLOCK and rng.random() < 0.2
        if twice:  # the second may take away what told of the first
            data = rng.choice(PLAIN[:-1])(data, rng)
        path = tmp_path / f"{seed}.tar"
        path.write_bytes(data)
        begin = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an index that could not be built
            pairs, words = _read(path, tmp_path)
        assert time.monotonic() - begin < LIMIT, f"seed {seed}"
        wrong = [(n, text) for n, text in pairs if captions.get(text, n) != n]
        assert not wrong, f"seed {seed} {mutate.__name__}: {wrong}"
        whole = {n for n, text in pairs if text in captions}
        assert len(whole) == SAMPLES or words or len(pairs) == SAMPLES or twice or mutate in SILENT, (
            f"seed {seed} {mutate.__name__}: {whole}"
        )
        path.unlink()


@pytest.mark.parametrize(
    "seeds", [pytest.param(range(2000), id="share"), pytest.param(range(2000, 60_000), id="rest", marks=pytest.mark.long)]
)
def test_no_names_join_what_has_a_partner_or_use_a_part_twice(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        names = _names(rng)
        at = dict(enumerate((name.removeprefix("./") for name in names), 1))
        head = lambda name: b"\xff\xd8\xff" if name.endswith(("jpg", "bin")) else b"x"
        samples, words = group(Member(name.encode(), "file", n, 1, False, head(name)) for n, name in enumerate(names, 1))
        used = [place for sample in samples for place, _ in sample.members.values()]
        assert len(used) == len(set(used)), f"seed {seed}"
        for sample in samples:
            parts = {slot: at[place] for slot, (place, _) in sample.members.items()}
            stems = {name.rpartition(".")[0] for name in parts.values()}
            if {"image", "text"} <= parts.keys() and len(stems) > 1:
                assert "joined" in words or parts["image"].rpartition(".")[0] == parts["text"].rpartition(".")[0], f"seed {seed}"
                own = f"{parts['image'].rpartition('.')[0]}.txt"
                assert parts["text"] == own or own not in at.values(), f"seed {seed}"
