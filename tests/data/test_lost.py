"""Shards that are lost, cut or changed, and files that are kept about them: told at the start, counted, or made again."""

import bz2
import gzip
import lzma
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxvl.data.cache import Cache, opened, stamp
from jaxvl.data.indexing import ensure_indexes, index_path
from jaxvl.data.source import Place, Want
from jaxvl.data.sources import open_source
from jaxvl.data.stream import BadData, open_data, read_samples
from jaxvl.data.tarindex import build_index, load_index
from jaxvl.data.tarsource import _open
from jaxvl.data.tarwalk import BLOCK
from tests.data.broken_tars import entry, header_at
from tests.data.shards import members, options, tar_bytes, write_shards

WHOLE = tar_bytes([m for n in range(6) for m in members(n)])
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
IN_PLACE = {
    "pointer": POINTER,
    "empty": b"",
    "page": b"\n <!DOCTYPE html><html><body>404</body></html>",
    "torn": gzip.compress(WHOLE)[:12],
    "zstd": b"\x28\xb5\x2f\xfd\x04\x58" + bytes(range(200)),
    "packed": b"\x04\x22\x4d\x18" + bytes(range(200)),
    "archive": b"PK\x03\x04" + bytes(range(200)),
    "nottar": bytes(i * i * 31 % 251 for i in range(20_000)),
}


def indexed(data: bytes, torn: bool = False):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return build_index(file.fileno(), (len(data), 0), torn)


@pytest.mark.parametrize("word", IN_PLACE)
def test_a_lost_shard_is_told_by_name_and_counts(tmp_path: Path, word: str) -> None:
    write_shards(tmp_path / "s", [4] * 4)
    for shard in range(1, 4):
        (tmp_path / "s" / f"{shard:04d}.tar").write_bytes(IN_PLACE[word])
    with pytest.raises(BadData, match=rf"(?s)12 of 16 samples are bad, 12 of them in shards that are lost, above.*{word}.*3 of 4 shards"):
        open_data(options(str(tmp_path / "s"), tmp_path))
    with pytest.warns(UserWarning, match=r"3 of 4 shards: .*0001\.tar' first"):
        assert len(open_data(options(str(tmp_path / "s"), tmp_path, max_bad_rate=0.8))) == 4
    other = write_shards(tmp_path / "other", [8], first=50)
    with pytest.raises(BadData, match="24 of 32"):  # a source without a whole shard takes the others' mean
        open_data(options((other, *(str(tmp_path / "s" / f"{n:04d}.tar") for n in range(1, 4))), tmp_path))


def test_an_empty_archive_has_lost_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [4, 0])
    with pytest.warns(UserWarning, match="a whole tar without a sample"):
        assert len(open_data(options(str(tmp_path / "s"), tmp_path, max_bad_rate=0.0))) == 4
    assert indexed(bytes(1 << 20)).damage == ("empty",), "a file that was never filled"


def test_a_cut_shard_counts_what_it_lacks(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [6, 6])
    (tmp_path / "s" / "0001.tar").write_bytes(gzip.compress(WHOLE)[:-300])
    with pytest.raises(BadData, match="in shards that are lost.*(?s:.)*torn"):
        open_data(options(str(tmp_path / "s"), tmp_path))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_packed_shards_are_read_and_their_ends_are_missed(tmp_path: Path, pack) -> None:
    cache, packed = Cache(str(tmp_path), 1 << 30), pack(WHOLE)
    damaged = bytearray(packed)
    damaged[-6] ^= 1  # a checksum
    for number, (data, torn) in enumerate(
        ((packed, False), (pack(WHOLE[:9000]) + pack(WHOLE[9000:]) + bytes(512), False), (packed[:-1], True), (bytes(damaged), True))
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        fd, _, found = opened(str(path), cache)
        content = os.pread(fd, 1 << 20, 0)
        os.close(fd)
        assert found == torn and (content == WHOLE or torn)
        assert opened(str(path), cache).torn == torn, "the copy remembers"
    (tmp_path / "name.tar").write_bytes(tar_bytes(members(1, "BZh")))
    assert len(indexed((tmp_path / "name.tar").read_bytes()).rows) == 1 and not opened(str(tmp_path / "name.tar"), cache).torn


def test_a_bomb_is_lost_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that unpacks to more than the cache may hold; with a larger cache it is there."""
    write_shards(tmp_path / "s", [6, 6])
    (tmp_path / "s" / "0001.tar").write_bytes(gzip.compress(WHOLE + bytes(1 << 22)))
    with pytest.warns(UserWarning, match=r"raise data\.cache_gb"):
        assert open_data(options(str(tmp_path / "s"), tmp_path, cache_gb=1e-3, max_bad_rate=0.5)).counts.tolist() == [6, 0]
    assert open_data(options(str(tmp_path / "s"), tmp_path)).counts.tolist() == [6, 6]
    monkeypatch.setattr("jaxvl.data.cache.SMALL", 1 << 20)
    with pytest.warns(UserWarning, match="unpacks to more than 100 times its"):
        open_data(options(str(tmp_path / "s"), tmp_path / "other", max_bad_rate=0.5))


def test_every_cut_of_a_tar_or_gzip_loses_nothing_without_a_word(tmp_path: Path) -> None:
    """At each block, in the middle of blocks and in the padding between members."""
    for cut in range(0, len(WHOLE) - 1, BLOCK // 2):
        index = indexed(WHOLE[:cut])
        assert index.pairs == 6 or index.damage or len(index.bad), cut
    assert indexed(WHOLE[: header_at(WHOLE, "000003.png")]).damage == ("unended",)
    assert not indexed(WHOLE).damage and indexed(WHOLE + WHOLE).damage == ("gap",)
    hole = header_at(WHOLE, "000003.png"), header_at(WHOLE, "000004.png")
    assert indexed(WHOLE[: hole[0]] + bytes(hole[1] - hole[0]) + WHOLE[hole[1] :]).damage == ("gap",), "of the size of a sample"
    assert indexed(WHOLE[: hole[0]] + bytes(60 * BLOCK)).damage == ("gap",), "never written to the end"
    packed = gzip.compress(WHOLE)
    for cut in range(20, len(packed) - 1, 97):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(packed[:cut])
        fd, version, torn = opened(str(path), Cache(str(tmp_path), 1 << 30))
        assert torn and "torn" in build_index(fd, version, torn).damage
        os.close(fd)


def _pax(*records: bytes) -> bytes:
    """A pax header of these records."""
    body = b"".join(records)
    head = bytearray(tar_bytes([entry("PaxHeader", b"x")])[:BLOCK])
    head[124:136] = b"%011o\0" % len(body)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + body + bytes(-len(body) % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    digits = next(d for d in range(1, 9) if len(str(length + d)) == d)
    return b"%d %s=%s\n" % (length + digits, key, value)


@pytest.mark.parametrize(
    "header",
    [
        _pax(_record(b"size", b"9" * 5000)),
        _pax(b"9" * 5000 + b" path=x\n"),
        _pax(_record(b"GNU.sparse.size", b"1" * 5000), _record(b"size", b"-1")),
        _pax(b"3 x\n"),
        _pax(b"99 path=short\n"),
    ],
)
def test_numbers_that_no_file_has_mark_their_shard_alone(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(header + WHOLE)
    (tmp_path / "1.tar").write_bytes(WHOLE)
    shards, cache = [str(tmp_path / f"{n}.tar") for n in range(2)], Cache(str(tmp_path / "cache"), 1 << 30)
    first, second = ensure_indexes(shards, str(tmp_path / "index"), cache)
    assert load_index(Path(index_path(shards[0], str(tmp_path / "index")))).damage == ("garbage",)
    assert first.pairs >= 5 and second.pairs == 6 and not second.damages


def test_whatever_a_shard_raises_marks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "s", [3, 2])
    shards, cache = [str(p) for p in sorted((tmp_path / "s").iterdir())], Cache(str(tmp_path / "cache"), 1 << 30)
    calls = iter((True, False, False))
    monkeypatch.setattr("jaxvl.data.indexing.build_index", lambda *how: 1 // 0 if next(calls) else build_index(*how))
    with pytest.warns(UserWarning, match=r"0000\.tar' cannot be indexed: ZeroDivisionError"):
        assert [s.images for s in ensure_indexes(shards, str(tmp_path / "index"), cache)] == [0, 2]
    assert [s.images for s in ensure_indexes(shards, str(tmp_path / "index"), cache)] == [3, 2], "and it is tried again"


def test_long_pax_headers_keep_their_names() -> None:
    fork = _record(b"LIBARCHIVE.xattr.com.apple.ResourceFork", b"A" * 300_000)
    name = "名" * 80
    parts = [
        _pax(fork, _record(b"path", f"{name}.{e}".encode())) + tar_bytes([(f"x.{e}", e.encode())])[: 2 * BLOCK] for e in ("png", "txt")
    ]
    index = indexed(b"".join(parts) + bytes(1024))
    assert [index.key(r) for r in range(index.pairs)] == [name] and not index.damage


@pytest.mark.parametrize("kind", ["zeros between headers", "magics", "headers that end in zeros", "headers that end in garbage", "records"])
def test_the_walk_takes_time_in_proportion(kind: str) -> None:
    """Below 0.3 s of CPU time a megabyte, where a walk that reads anything over and over takes more, and ever more."""
    one = bytearray(tar_bytes([("0.jpg", b"")])[:BLOCK])

    def header(size: int) -> bytes:
        one[124:136], one[148:156] = b"%011o\0" % size, b" " * 8
        one[148:156] = b"%06o\0 " % sum(one)
        return bytes(one)

    blocks = 6000
    data = {
        "zeros between headers": lambda: (header(0) + bytes(BLOCK)) * (blocks // 2),
        "magics": lambda: b"ustar\0" * (BLOCK * blocks // 6),
        "headers that end in zeros": lambda: (
            b"".join(header((blocks - i) * BLOCK) for i in range(blocks)) + bytes(blocks * BLOCK) + b"x" * BLOCK
        ),
        "headers that end in garbage": lambda: b"".join(header((blocks - i - 1) * BLOCK) for i in range(blocks)) + b"x" * BLOCK,
        "records": lambda: _pax(b"5 a=\n" * (BLOCK * blocks // 20)) * 4,
    }[kind]()
    begin = time.process_time()
    indexed(data)
    assert time.process_time() - begin < 0.3 * len(data) / 2**20


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A shard of six samples in a store."""
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/0.tar", WHOLE)
    return f"memory://{tmp_path.name}/0.tar"


def _source(store: str, folder: Path):
    return open_source(store, Place(str(folder / "index"), Cache(str(folder / "cache"), 1 << 30)))


def test_a_shard_that_changed_in_its_store_is_noticed(store: str, tmp_path: Path) -> None:
    """Of the same length, with other samples, once the copy is gone."""
    source = _source(store, tmp_path)
    fsspec.filesystem("memory").pipe(store[8:], tar_bytes([m for n in range(50, 56) for m in members(n)]))
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(OSError, match=r"0\.tar has changed since it was indexed; start again"):
        source.read(0, 0, Want())
    assert _source(store, tmp_path).read(0, 0, Want()).key == "000050"


@pytest.mark.parametrize("told", ["ETag", "Last-Modified", "Content-MD5", "last_modified", "versionId", "generation", "modificationTime"])
def test_what_stores_tell_of_versions_is_heard(store: str, monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    seen = []
    for version in ("a", "b"):
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", lambda *_, v=version: {"size": 5, told: v})
        seen.append(stamp(store))
    assert seen[0] != seen[1] and seen[0][0] == 5


def test_no_credential_is_in_the_name_of_an_index() -> None:
    name = index_path("https://me:secret@host/a.tar?X-Amz-Signature=0123abcd&part=3", "indexes")
    assert "0123abcd" not in name and "secret" not in name and name.startswith("indexes/a.tar?part=3-")


@pytest.mark.parametrize("when", ["before", "while open"])
def test_a_cut_copy_is_fetched_again(store: str, tmp_path: Path, when: str) -> None:
    source = _source(store, tmp_path)
    if when == "while open":
        source.read(0, 0, Want())
    (copy,) = (tmp_path / "cache" / "shards").glob("*.tar")
    os.truncate(copy, len(WHOLE) // 2)
    records = [source.read(0, row, Want()) for row in range(6)]
    assert [r.captions[0] for r in records] == [f"number {n}" for n in range(6)]
    os.truncate(copy, 0)
    _open.cache_clear()
    rebuilt = open_source(store, Place(str(tmp_path / "index"), Cache(str(tmp_path / "cache"), 1 << 30), rebuild=True))
    assert rebuilt.counts.tolist() == [6]


def test_a_flipped_index_is_built_again(tmp_path: Path) -> None:
    """Each byte of the file once, before a run and in its midst: the same samples, and a word where they were at stake."""
    shard = write_shards(tmp_path / "s", [2])
    path = Path(index_path(f"{shard}/0000.tar", str(tmp_path / "cache" / "index")))
    expected = [(r.key, r.image, r.captions) for r in read_samples(open_data(options(shard, tmp_path)), np.arange(2))]
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        for midst in (False, True):
            dataset = open_data(options(shard, tmp_path)) if midst else None
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            _open.cache_clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*damaged")
                found = [(r.key, r.image, r.captions) for r in read_samples(dataset or open_data(options(shard, tmp_path)), np.arange(2))]
            assert found == expected and path.read_bytes() == good, at


def test_flipped_class_tables_are_made_again(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "s", [6])
    for changes in ({"label": "class"}, {"label": "class", "classes": "all"}):
        names = open_data(options(shard, tmp_path, **changes)).classes
        (path,) = (tmp_path / "cache" / "index").glob("classes-*" if "classes" in changes else "labels-*")
        good = path.read_bytes()
        for at in range(0, len(good), max(1, len(good) // 40)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            assert open_data(options(shard, tmp_path, **changes)).classes == names == ("c0", "c1", "c2")
            assert path.read_bytes() == good
