"""`jaxvl bench evaluation`: metric-learning numbers of an embedding set the size of Stanford Online Products, streamed, and beside it what
a matrix of all scores costs.

The matrix of 60,502 x 60,502 scores alone is 14.6 GB, so it is built for a part of the rows; the streamed route is timed on that part too.
"""

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxvl.evals.class_retrieval import measure
from jaxvl.evals.metric_learning import by_label
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.terminal import tell

ROWS, CLASSES, WIDTH = 60_502, 11_316, 512
KS = (1, 10, 100, 1000)


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print JSON; one round, whatever `rounds` says, for a round takes minutes. Raises ValueError for a config, which nothing would read."""
    del rounds
    if config or overrides:
        raise ValueError("bench evaluation measures embeddings of its own: it takes neither --config nor overrides")
    tell(json.dumps(run(ROWS, CLASSES, WIDTH, part=6_000), indent=2))
    return 0


def run(rows: int, classes: int, width: int, *, part: int) -> dict[str, Any]:
    """Seconds and peak bytes of the process. Raises RuntimeError where the two routes disagree on the part, whose numbers are the same."""
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, classes, rows).astype(np.int32))
    points = np.empty((rows, width), np.float32)
    for start in range(0, rows, 4096):  # in blocks, so that making them is not the peak
        at = slice(start, start + 4096)
        of = labels[at]
        centre = np.stack([np.random.default_rng(int(c)).standard_normal(width, np.float32) for c in of])
        x = centre + 3 * rng.standard_normal(centre.shape, np.float32)
        points[at] = x / np.linalg.norm(x, axis=1, keepdims=True)
    mesh = make_mesh(MeshOptions())
    small = slice(0, part)
    streamed_small, numbers_small = _timed(lambda: measure(points[small], labels[small], None, None, KS, mesh))
    streamed, numbers = _timed(lambda: measure(points, labels, None, None, KS, mesh))
    peak = peak_bytes()
    matrix, (ranks, precisions) = _timed(lambda: by_label(points[small] @ points[small].T, labels[small]))
    recall = float((ranks.stable[ranks.stable >= 0] < 1).mean())
    found = numbers_small["r@1"], numbers_small["map@r"]
    if not np.allclose(found, (recall, np.nanmean(precisions.ap_at_r)), atol=2e-3):  # float32 sums of another order may swap near ties
        raise RuntimeError(f"streamed {found} and matrix {recall, float(np.nanmean(precisions.ap_at_r))} numbers differ")
    return {
        "rows": rows, "width": width, "numbers": numbers, "streamed_s": streamed, "streamed_peak_process_bytes": peak, "matrix_bytes": 4 * rows * rows,
        "part_rows": part, "part_streamed_s": streamed_small, "part_matrix_s": matrix, "part_matrix_peak_process_bytes": peak_bytes(),
        "matrix_s_scaled_to_rows": matrix * (rows / part) ** 2,
    }  # fmt: skip


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed(f: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    out = f()
    return time.perf_counter() - begin, out
