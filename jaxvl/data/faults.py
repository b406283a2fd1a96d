"""What shards lack: faults of whole shards, told before a run, and the samples that are lost with them."""

from collections.abc import Sequence

import numpy as np

from jaxvl.data.reasons import LOST, REASONS
from jaxvl.data.source import Source


def fault_notes(sources: Sequence[Source]) -> list[str]:
    """A sentence for each kind of fault that shards have: how many, what it is, and the first."""
    total, found = sum(len(s.shards) for s in sources), dict[str, list[str]]()
    for source in sources:
        for word, shards in source.faults:
            found.setdefault(word, []).extend(source.shards[shard] for shard in shards)
    return [f"{len(names):,} of {total:,} shards: {REASONS[word]} ({names[0]!r} first)" for word, names in found.items()]


def lost_samples(sources: Sequence[Source]) -> int:
    """How many samples lost and cut shards lack, by the mean of the whole shards of their source, or of all sources where it has none."""
    lost = [sorted({shard for word, shards in s.faults if word in LOST for shard in shards}) for s in sources]
    held = [s.counts + s.bad for s in sources]
    whole = [np.delete(h, gone) for h, gone in zip(held, lost, strict=True)]
    everywhere = next((np.concatenate(h) for h in (whole, [h[h > 0] for h in held]) if sum(map(len, h))), np.zeros(1))
    lacking = 0.0
    for all_, rest, gone in zip(held, whole, lost, strict=True):
        lacking += np.maximum((rest if len(rest) else everywhere).mean() - all_[gone], 0).sum()
    return round(lacking)
