"""Bad samples, counted by reason and shard, and the point at which there are too many."""

import collections
import contextlib
from collections.abc import Generator, Iterable
from typing import Any

from jaxvl.data.source import Bad

SETTLE = 1024  # samples before a rate of bad ones means something
LINES = 12  # of a table in an error
KEPT = 1 << 16  # bad samples that such a table counts, the latest


class BadData(ValueError):
    """Too many samples cannot be used; the message has reasons and shards."""


def table(bad: Iterable[Bad]) -> str:
    """Lines of count, reason and shard, the most frequent first."""
    tally = collections.Counter((b.shard, b.reason) for b in bad)
    lines = [f"  {count:>8,}  {reason:<12} {shard}" for (shard, reason), count in tally.most_common(LINES)]
    return "\n".join(lines + [f"  ... and {len(tally) - LINES} more"] * (len(tally) > LINES))


def watched(batches: Generator[Any], limit: float) -> Generator[Any]:
    """`batches`, until the samples found bad are more than `limit` of those tried. Raises BadData then."""
    seen, found = 0, 0
    bad: collections.deque[Bad] = collections.deque(maxlen=KEPT)
    with contextlib.closing(batches):
        for batch in batches:
            seen += len(batch.ids)
            found += len(batch.bad)
            bad.extend(batch.bad)
            if found > limit * max(seen + found, SETTLE):
                raise BadData(
                    f"{found:,} of {seen + found:,} samples were bad, above data.max_bad_rate={limit}:\n{table(bad)}\n"
                    "`jaxvl data check --json` names them all, and with --record later runs leave them out; "
                    "a higher data.max_bad_rate accepts them"
                )
            yield batch
