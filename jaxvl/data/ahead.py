"""Remote shards, fetched before their samples are asked for."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
from typing import Any

from jaxvl.data.dataset import Dataset, source_of

THREADS = 8  # downloads at a time


def fetch_ahead(
    batches: Generator[Any], dataset: Dataset, near: Callable[[int], Iterable[int]], start: int, batch_size: int
) -> Generator[Any]:
    """`batches`, while threads fetch the remote shards among near(n), from which samples n and soon after are drawn.

    n is `start` at the first batch and `batch_size` more at each next one. What fails here is left to the reader of
    the shard, who fails with the same error. Where no shard is remote, `batches` are passed on as they are.
    """
    if not any(source.fetch for source in dataset.sources):
        return batches
    return _fetching(batches, dataset, near, start, batch_size)


def _fetching(
    batches: Generator[Any], dataset: Dataset, near: Callable[[int], Iterable[int]], start: int, batch_size: int
) -> Generator[Any]:
    asked: frozenset[int] = frozenset()
    with contextlib.closing(batches), contextlib.ExitStack() as stack:
        pool = futures.ThreadPoolExecutor(THREADS, "fetch")
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for n in itertools.count(start, batch_size):
            shards = frozenset(near(n))
            for shard in sorted(shards - asked):
                source, local = source_of(dataset, shard)
                if source.fetch is not None:
                    pool.submit(source.fetch, local)
            asked = shards
            batch = next(batches, None)
            if batch is None:
                return
            yield batch
