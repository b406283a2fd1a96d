"""`jaxvl search index`: embeds a source and writes the index, a batch at a time. One process, over the devices that it sees."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax.sharding import Mesh

from jaxvl.data.dataset import cleaning_of
from jaxvl.models import sparse
from jaxvl.progress import progress, say
from jaxvl.search import lexical
from jaxvl.search.backends import AT, POSTINGS, PRUNED, ROWS, SAMPLE, VECTORS, open_backend, recall, vectors
from jaxvl.search.extras import EXTRAS, library
from jaxvl.search.items import items
from jaxvl.search.lexical import Pruning
from jaxvl.search.model import open_run
from jaxvl.search.store import Draft, Index, drafting, finish
from jaxvl.terminal import tell

WORDS = 1 << 22  # entries of a sparse array that are written at a time


class Sparsity(NamedTuple):
    """Which entries of a lexical vector are kept, of items and queries alike: the `active` greatest, or with 0 those above `threshold`."""

    threshold: float
    active: int = 0


def main(run: Path, source: str, out: Path, overrides: Sequence[str], *, step: int | None, ema: bool, batch_size: int, threshold: float | None, active: int,
         pruning: Pruning, also: Sequence[str]) -> int:  # fmt: skip
    """Index `source` with the model in `run`. Raises ValueError for what does not fit, before anything is embedded, and FileExistsError."""
    opened = open_run(run, overrides, step=step, ema=ema)
    lexicals = bool(opened.pieces)
    kind = "lexical" if lexicals else "dense"
    if threshold is not None and active:
        raise ValueError("--threshold and --active are two ways to choose the words of a vector; give one of them")
    if not lexicals and (threshold is not None or active):
        raise ValueError(f"--threshold and --active choose words of lexical vectors; those of {run} are dense")
    for name in also:
        if EXTRAS[name].kind != kind:
            raise ValueError(f"--also {name} is for {EXTRAS[name].kind} vectors; those of {run} are {kind}")
        library(name)
    lexical.check(pruning)
    with jax.set_mesh(opened.model.mesh), drafting(out) as draft:
        cleaning = cleaning_of(opened.model.data)
        found = items(opened.model, source, batch_size, cleaning)
        meta = {
            **opened.identity._asdict(),
            "run": str(run.absolute()),
            "source": source,
            "overrides": list(overrides),
            "ema": ema,
            "what": found.what,
            "cleaning": cleaning._asdict(),
        }
        if lexicals:
            how = Sparsity(sparse.default_threshold(len(opened.pieces)) if threshold is None else threshold, active)
            meta |= {"sparsity": how._asdict(), "pieces": opened.pieces}
            batches: Any = ((sparsified(x, how), names) for x, names in found.batches)
        else:
            batches = found.batches
        index = write(draft, out, batches, meta, opened.identity.step, pruning=pruning, also=also, mesh=opened.model.mesh)
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{index.total:,} {found.what}, {kind} vectors of {index.meta['width']:,}, {size / 1e6:,.1f} MB; {told(index.measured)}")
    tell(str(out))
    return 0


def sparsified(s: np.ndarray, how: Sparsity) -> sp.csr_array:
    """Vectors [n, V] as a csr_array of what `how` keeps. Raises ValueError for numbers that are negative or not finite."""
    if not np.isfinite(s).all() or (s < 0).any():
        raise ValueError("lexical vectors must be finite and not negative; the model has diverged")
    x = jnp.asarray(s)
    kept = sparse.top(x, min(how.active, s.shape[1])) if how.active else sparse.above(x, how.threshold)
    return sp.csr_array(np.asarray(kept, np.float32))


def write(
    draft: Draft,
    out: Path,
    batches: Iterable[tuple[Any, list[str]]],
    meta: dict[str, Any],
    step: int,
    *,
    pruning: Pruning,
    also: Sequence[str],
    mesh: Mesh,
) -> Index:
    """The index `out` of batches of vectors, csr_array [b, V] or float32 [b, d], and their names; measures what is approximate in it.

    Raises ValueError where there is no item, or where dense vectors are not finite.
    """
    count = entries = width = 0
    sparse_rows = True
    for rows, names in batches:
        sparse_rows, width = sp.issparse(rows), rows.shape[1]
        if sparse_rows:
            entries += append_sparse(draft, rows, entries)
        else:
            if not np.isfinite(rows).all():
                raise ValueError("an embedding is not finite; the model has diverged or an image is broken")
            draft.append(VECTORS, np.asarray(rows, np.float32))
        draft.append_names(names)
        count += len(names)
    if not count:
        raise ValueError("there is nothing to index: no item can be used")
    kind = "lexical" if sparse_rows else "dense"
    meta = {**meta, "kind": kind, "total": count, "width": width, "dtype": "float32", "also": sorted(also)}
    if sparse_rows and not entries:
        raise ValueError("no vector has a word that is kept, so nothing could be found: lower --threshold")
    if sparse_rows:
        meta |= {"pruning": pruning._asdict(), "entries": entries}
        say(f"inverting {entries:,} entries, {entries / count:,.1f} a vector")
        rows = vectors(so_far(draft, meta))
        write_sparse(draft, POSTINGS, lexical.invert(rows))
        write_sparse(draft, PRUNED, lexical.invert(lexical.prune(rows, pruning.items)))
    held = so_far(draft, meta)
    for name in also:
        say(f"building {name}")
        EXTRAS[name].build(vectors(held), draft.folder)
    measured = measure(held, mesh)
    return finish(draft, out, step, meta, measured)


def measure(index: Index, mesh: Mesh) -> dict[str, float | None]:
    """Recall of every approximate backend of the index against exact search, by name."""
    names = [*(["two-stage"] if index.lexical else []), *index.meta["also"]]
    if not names:
        return {}
    truth = open_backend(index, "exact", mesh)
    out: dict[str, float | None] = {}
    for name in progress(names, "measuring recall", unit="backends"):
        value = recall(open_backend(index, name, mesh), truth, vectors(index))
        out[f"{name}/recall@{AT}"] = None if np.isnan(value) else value
    return {"sample": min(SAMPLE, index.total), **out}


def told(measured: dict[str, float | None], backend: str = "") -> str:
    """How much of what exact search finds was found when the index was made: by every backend, or by one."""
    asked = {name.split("/")[0]: value for name, value in sorted(measured.items()) if name.startswith(backend) and "/" in name}
    shown = ", ".join(f"{name} {'unknown' if value is None else f'{value:.4f}'}" for name, value in asked.items())
    return f"recall@{AT} against exact search, measured on {measured['sample']} items of the index: {shown}" if asked else "exact"


def so_far(draft: Draft, meta: dict[str, Any]) -> Index:
    """A draft to search in before it is whole."""
    return Index(draft.folder, 0, meta, {}, {name: draft.read(name) for name in draft.leaves()})


def append_sparse(draft: Draft, rows: sp.csr_array, before: int) -> int:
    """Add vectors [b, V] to ROWS, which has `before` entries; the number of theirs."""
    draft.append(f"{ROWS}.data", rows.data)
    draft.append(f"{ROWS}.indices", rows.indices.astype(np.int32, copy=False))
    draft.append(f"{ROWS}.ends", rows.indptr[1:].astype(np.int64) + before)
    return rows.nnz


def write_sparse(draft: Draft, name: str, array: sp.csr_array) -> None:
    """Write POSTINGS or PRUNED as a whole."""
    for part, values, dtype in (("data", array.data, np.float32), ("indices", array.indices, np.int32)):
        for start in range(0, max(len(values), 1), WORDS):
            draft.append(f"{name}.{part}", values[start : start + WORDS].astype(dtype, copy=False))
    draft.append(f"{name}.ends", array.indptr[1:].astype(np.int64))
