"""Remote shards, fetched before their samples are asked for."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from jaxvl.data.dataset import Dataset, source_of

THREADS = 8  # downloads at a time


def fetch_ahead(batches: Iterator[Any], dataset: Dataset, near: Callable[[int], tuple[int, ...]], start: int, batch_size: int) -> Iterator[Any]:
    """`batches`, while threads fetch the remote ones among the shards near(n) that samples n, n + batch_size ... are drawn from.

    What fails here is left to the reader of the shard, who fails with the same error.
    """
    pool = futures.ThreadPoolExecutor(THREADS, "fetch")
    try:
        with contextlib.closing(batches):
            asked: frozenset[int] = frozenset()
            for n in range(start, 2**62, batch_size):
                shards = frozenset(near(n))
                for shard in sorted(shards - asked):
                    source, local = source_of(dataset, shard)
                    if source.fetch is not None:
                        pool.submit(source.fetch, local)
                asked = shards
                yield next(batches)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
