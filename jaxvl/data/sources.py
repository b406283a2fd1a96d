"""Patterns to sources: which shards the words of a config name."""

import glob
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from jaxvl.data.cache import Cache, digest, filesystem, is_remote, locked, reached
from jaxvl.data.kept import keep, kept
from jaxvl.data.source import Place, Source
from jaxvl.data.tarsource import tar_source

MOST = 1_000_000  # shards that one pattern may name
SHARD = re.compile(r"\.tar(?:\.(?:gz|bz2|xz|zst|lz4|lzma))?$|\.(?:tgz|tbz2|txz|tzst)$")  # how shards are called


def expand(pattern: str, cache: Cache) -> tuple[str, ...]:
    """The shards that `pattern` names, in order.

    A path, a folder (its *.tar, *.tar.gz, ...), a glob, brace ranges ("train-{0000..0127}.tar", "{a,b}.tar"), any of these as a URL
    of fsspec, or "glyphs://train?size=20000", which is rendered on first use. Raises ValueError where nothing matches
    or a shard is named twice.
    """
    if pattern.startswith("glyphs://"):
        return _glyphs(pattern, cache)
    words = list(itertools.islice(braces(pattern), MOST + 1))
    if len(words) > MOST:
        raise ValueError(f"data.source {pattern!r} names over {MOST:,} shards; is a digit of its range one too many?")
    shards = list(itertools.chain.from_iterable(_matches(p.removeprefix("file://")) for p in words))
    twice = sorted({s for s in shards if shards.count(s) > 1}) if len(set(shards)) < len(shards) else ()
    if twice:
        raise ValueError(f"data.source {pattern!r} names {twice[0]} more than once")
    return tuple(shards)


def braces(pattern: str) -> Iterator[str]:
    """`pattern` with every {a,b} and {first..last} written out; the width of `first` is kept ("{000..127}")."""
    start, _, rest = pattern.partition("{")
    if start == pattern:
        yield pattern
        return
    words, depth = [""], 0
    for at, letter in enumerate(rest):
        if letter == "}" and depth == 0:
            choices = words if len(words) > 1 else _range(words[0], pattern)
            for choice in choices:
                for word in braces(choice):
                    for tail in braces(rest[at + 1 :]):
                        yield start + word + tail
            return
        depth += (letter == "{") - (letter == "}")
        words = [*words, ""] if letter == "," and depth == 0 else [*words[:-1], words[-1] + letter]
    raise ValueError(f"data.source {pattern!r}: a brace is not closed")


def _range(text: str, pattern: str) -> Iterator[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not span:
        raise ValueError(f"data.source {pattern!r}: {{{text}}} is neither a range {{0000..0127}} nor a list {{a,b}}")
    first, last = int(span[1]), int(span[2])
    if last < first:
        raise ValueError(f"data.source {pattern!r}: the range {{{text}}} ends before it begins")
    return (str(i).zfill(len(span[1])) for i in range(first, last + 1))


def _matches(pattern: str) -> list[str]:
    if is_remote(pattern):
        return _remote_matches(pattern)
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(path) and not path.endswith(".tar"):
        return _shards(pattern, glob.glob(os.path.join(glob.escape(path), "*.t*")))
    if os.path.lexists(path):
        return [path]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"data.source {pattern!r} matches no file (looked for {path})")
    return found


def _remote_matches(pattern: str) -> list[str]:
    store, path = filesystem(pattern)
    with reached(pattern):
        if not glob.has_magic(path):
            if not store.isdir(path):
                return [pattern]
            return _shards(pattern, [store.unstrip_protocol(p) for p in store.glob(path.rstrip("/") + "/*.t*")])
        found = sorted(store.unstrip_protocol(p) for p in store.glob(path))
    if not found:
        raise ValueError(f"data.source {pattern!r} matches no file")
    return found


def _shards(pattern: str, files: list[str]) -> list[str]:
    """Of the files of a folder, those that are called shards."""
    found = {name: SHARD.sub("", name) for name in sorted(files) if SHARD.search(name)}
    if not found:
        raise ValueError(f"data.source {pattern!r} is a folder without *.tar, plain or compressed")
    if twice := [name for name, next_ in itertools.pairwise(found) if found[name] == found[next_]]:
        raise ValueError(
            f"data.source {pattern!r} holds {twice[0]} plain and compressed, the same shard twice; name one of them: {pattern}/*.tar"
        )
    return list(found)


def _glyphs(pattern: str, cache: Cache) -> tuple[str, ...]:
    import matplotlib

    from jaxvl.data import glyphs

    part, _, query = pattern.removeprefix("glyphs://").partition("?")
    words = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(words) - {"size", "pixels", "seed"})
    if part not in glyphs.PARTS or unknown or not all(v.isdigit() for v in words.values()):
        raise ValueError(f"data.source {pattern!r}: write glyphs://{'|'.join(glyphs.PARTS)}?size=N&pixels=N&seed=N")
    made_by = digest(f"{matplotlib.__version__} {Path(glyphs.__file__).read_text()}")
    folder = Path(cache.folder) / "glyphs" / "-".join([part, *(f"{k}{words[k]}" for k in sorted(words)), made_by[:8]])
    with locked(folder.with_suffix(".lock")):
        if kept(folder / "sizes") != _sizes(folder):  # absent, or cut
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            glyphs.write_shards(partial, part, **{k: int(v) for k, v in words.items()})
            keep(partial / "sizes", _sizes(partial))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    return tuple(sorted(str(f) for f in folder.glob("*.tar")))


def _sizes(folder: Path) -> bytes:
    """Names and bytes of the shards in `folder`."""
    return repr(sorted((f.name, f.stat().st_size) for f in folder.glob("*.tar"))).encode()


def open_source(pattern: str, place: Place) -> Source:
    """The source that `pattern` names. Raises ValueError with the pattern and what is wrong with it."""
    if pattern.startswith("tfds://"):
        from jaxvl.data.tfds import tfds_source

        return tfds_source(pattern, place)
    if pattern.startswith("folder://"):
        from jaxvl.data.folder import folder_source

        return folder_source(pattern, place)
    return tar_source(pattern, expand(pattern, place.cache), place)
