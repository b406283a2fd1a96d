"""Indexes of many shards: found where they are kept, checked against their shards, built where missing or stale."""

import contextlib
import multiprocessing
import os
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from jaxvl import progress as bars
from jaxvl.data.cache import Cache, Uncached, digest, is_remote, locked, opened, stamp
from jaxvl.data.tarindex import DamagedIndex, Index, Summary, build_index, empty_index, load_index, read_summary, save_index
from jaxvl.processes import end_with
from jaxvl.secrets import public

PROCESSES_FROM = 1 << 31  # bytes of shards below which starting processes costs more than it saves
GONE = (0, 0)  # the stamp of a shard that cannot be reached, which is tried again at each start
STORE_THREADS = 32  # a remote store answers slowly, and many questions at once


def index_path(shard: str, folder: str) -> str:
    """Where the index of `shard` is kept."""
    return os.path.join(folder, f"{os.path.basename(public(shard))[-80:]}-{digest(shard)}.idx")


def ensure_indexes(shards: Sequence[str], folder: str, cache: Cache, rebuild: bool = False) -> list[Summary]:
    """The summary of every shard's index in `folder`, built first where there is none for the shard as it is now."""
    stamps = _stamps(shards)
    paths = [Path(index_path(s, folder)) for s in shards]
    held = [None if rebuild else read_summary(p) for p in paths]
    spoilt = [path for path, summary in zip(paths, held, strict=True) if summary is None and not rebuild and path.exists()]
    if spoilt:
        warnings.warn(
            f"{len(spoilt):,} of {len(paths):,} indexes, {spoilt[0]} first, are damaged or of another version: "
            "they are built again, with the samples that `data check --record` had left out",
            stacklevel=2,
        )
    todo = [i for i, (summary, now) in enumerate(zip(held, stamps, strict=True)) if summary is None or summary.stamp != now]
    if todo:
        with locked(Path(folder) / "build.lock"):
            _build([(shards[i], stamps[i], paths[i]) for i in todo], cache, rebuild)
    built = {i: read_summary(paths[i]) for i in todo}
    summaries = [built.get(i, summary) for i, summary in enumerate(held)]
    if lost := [str(path) for path, summary in zip(paths, summaries, strict=True) if summary is None]:
        raise OSError(f"the index {lost[0]} has gone while it was in use; nothing else may write in {folder}")
    return [s for s in summaries if s is not None]


def _build(jobs: list[tuple[str, tuple[int, int], Path]], cache: Cache, rebuild: bool) -> None:
    large = sum(stamp[0] for _, stamp, _ in jobs) >= PROCESSES_FROM
    for _ in progress(parallel(_build_one, (cache, rebuild), jobs, cores() if large else 1), len(jobs), "indexing shards"):
        pass


def _build_one(how: tuple[Cache, bool], job: tuple[str, tuple[int, int], Path]) -> None:
    (cache, rebuild), (shard, version, path) = how, job
    held = None if rebuild else read_summary(path)
    if held is None or held.stamp != version:  # else another process has built it while this one waited
        save_index(_index_shard(shard, version, cache), path)


def mend(shard: str, version: tuple[int, int], path: Path, cache: Cache) -> None:
    """Build the index of `shard` at `path` anew, where the file turns out to be damaged while it is in use."""
    with locked(path.parent / "build.lock"):
        try:
            load_index(path)  # another process may have mended it
        except DamagedIndex as error:
            warnings.warn(f"{error}: it is built again, with the samples that `data check --record` had left out", stacklevel=2)
            save_index(_index_shard(shard, version, cache), path)


def _index_shard(shard: str, version: tuple[int, int], cache: Cache) -> Index:
    if not is_remote(shard):  # a pattern can match anything, and one bad file must not stop a run
        try:
            if not stat.S_ISREG(os.stat(shard).st_mode):
                return empty_index("special", version)
            os.close(os.open(shard, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return empty_index("unreadable", GONE)
    try:
        fd, version, torn = opened(shard, cache)
    except Uncached as error:
        if is_remote(shard):  # no shard of a store is read without its copy
            raise
        warnings.warn(str(error), stacklevel=2)
        return empty_index("uncached", GONE)
    try:
        return build_index(fd, version, torn)
    except Exception as error:  # whatever is in one shard, the others go on
        warnings.warn(f"shard {shard!r} cannot be indexed: {error!r}", stacklevel=2)
        return empty_index("unreadable", GONE)
    finally:
        os.close(fd)


def _stamps(shards: Sequence[str]) -> list[tuple[int, int]]:
    if any(map(is_remote, shards)):
        with futures.ThreadPoolExecutor(STORE_THREADS) as pool:
            return list(pool.map(_stamp, shards))
    return [_stamp(s) for s in shards]


def _stamp(shard: str) -> tuple[int, int]:
    try:
        return stamp(shard)
    except OSError:
        if is_remote(shard):
            raise
        return GONE


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def parallel(function: Callable, shared: Any, items: Sequence[Any], workers: int) -> Iterator[Any]:
    """function(shared, item) of every item, in order, in `workers` processes where that is more than one.

    They end with this process, and with whatever ends the iteration.
    """
    if workers < 2 or len(items) < 2:
        yield from (function(shared, item) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with futures.ProcessPoolExecutor(min(workers, len(items)), context, _share, (os.getpid(), function, shared)) as pool:
        try:
            with _uninterrupted():
                results = pool.map(_call_shared, items)
            yield from results
        except BaseException:  # what is at work would be waited for
            for process in list(pool._processes.values()):
                process.kill()
            raise


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started in the block ignores Ctrl-C, which reaches all processes of a terminal, and is this one's to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _share(parent: int, function: Callable, shared: Any) -> None:
    """Keep what every call of this process needs: it comes once, and not with each item."""
    global _shared
    end_with(parent, signal.SIGKILL)
    _shared = function, shared


def _call_shared(item: Any) -> Any:
    function, shared = _shared
    return function(shared, item)


_shared: tuple[Callable, Any]


def progress(items: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    """`items`, with a progress bar on standard error."""
    return iter(bars.progress(items, title, total=total))
