"""Which samples each step was given: a line a step in samples-<process>.jsonl, of the rows that the process has fed.

Together the files of all processes are the history that survives: like metrics.jsonl they are cut where a run is resumed.
"""

import itertools
import re
from collections import defaultdict
from pathlib import Path

from jaxvl.report.metrics import Writer, cut, jsonl_writer, mend, read_lines


def open_samples(folder: Path, process: int, processes: int, step: int) -> Writer:
    """The file of this process, cut after `step`, the one resumed from. Process 0 also cuts those of processes that the run has no more."""
    mine = folder / f"samples-{process}.jsonl"
    others = [path for path, number in _files(folder).items() if number >= processes] if process == 0 else []
    for path in [mine, *others]:
        mend(path, step=int, row=int, ids=list)
        cut(path, step)
    return jsonl_writer(mine)


def read_samples(folder: Path, batch_size: int) -> dict[int, list[int]]:
    """The batch_size ids (rows of the dataset) of every step, from the files of all processes.

    Raises ValueError for a step whose rows were not all given, or one of them twice.
    """
    parts: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for path in _files(folder):
        for _, line in read_lines(path):
            parts[line["step"]].append((line["row"], line["ids"]))
    out = {}
    for step in sorted(parts):
        spans = sorted(parts[step])
        ids = [i for _, part in spans for i in part]
        starts = list(itertools.accumulate((len(part) for _, part in spans), initial=0))[:-1]
        if [row for row, _ in spans] != starts or len(ids) != batch_size:
            raise ValueError(
                f"{folder}: step {step} was given rows {[(row, row + len(part)) for row, part in spans]} of a batch of {batch_size}"
            )
        out[step] = ids
    return out


def _files(folder: Path) -> dict[Path, int]:
    return {
        path: int(found[1])
        for path in sorted(folder.glob("samples-*.jsonl"))
        if (found := re.fullmatch(r"samples-(\d+)\.jsonl", path.name))
    }
