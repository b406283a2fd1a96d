"""`jaxvl bench search`: what every backend of `jaxvl search` costs and finds, on vectors that are made for it.

Lexical: each vector has `active` of V words, one from each of as many strata of equal use, words being used as Zipf's law says; vectors of one of
TOPICS share about half of them, so that there is something to find. Dense: unit vectors around as many centres. Latencies are of single queries,
all backends taking turns; scipy's own product is timed twice, with the transpose it is given and with one that was prepared for it.
"""

import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
import scipy.sparse as sp

from jaxvl.evals import topk
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.search import build, lexical
from jaxvl.search.backends import AT, POSTINGS, PRUNED, Search, csr, open_backend, vectors
from jaxvl.search.extras import EXTRAS, LIBRARIES
from jaxvl.search.lexical import Pruning
from jaxvl.search.store import drafting, finish
from jaxvl.terminal import tell

TOTAL, WORDS, ACTIVE, WIDTH, QUERIES = 100_000, 17_182, 296, 512, 100
TOPICS, OFFSET = 1000, 100  # use of word r: 1 / (r + OFFSET), by which the most used is in about half of the vectors
BATCH = 10_000
SLOW = 5  # queries asked of what takes seconds each
DEVICE_BYTES = 1 << 30  # of lexical vectors held as dense ones, where that is not accelerator memory


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print JSON. Raises ValueError for a config, which nothing would read."""
    if config or overrides:
        raise ValueError("bench search measures vectors of its own: it takes neither --config nor overrides")
    tell(json.dumps(run(TOTAL, WORDS, ACTIVE, WIDTH, QUERIES, rounds=rounds), indent=2))
    return 0


def run(total: int, words: int, active: int, width: int, queries: int, *, rounds: int) -> dict[str, Any]:
    versions = {"jax": jax.__version__, "scipy": scipy.__version__} | {
        package: importlib.metadata.version(package) for package, module in LIBRARIES.values() if _installed(module)
    }
    device = jax.devices()[0]
    here = {"device": device.device_kind, "devices": jax.device_count(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        first = of_words(Path(folder) / "lexical", total, words, active, queries, rounds)
        second = of_numbers(Path(folder) / "dense", total, width, queries, rounds)
    return {"versions": versions, **here, "lexical": first, "dense": second}


def of_words(out: Path, total: int, words: int, active: int, queries: int, rounds: int) -> dict[str, Any]:
    """Build times in seconds, bytes, latencies in milliseconds and recall of the backends of lexical vectors."""
    mesh, pruning = make_mesh(MeshOptions()), Pruning()
    also = ["seismic"] if _installed(LIBRARIES["seismic"][1]) else []
    meta = {
        "kind": "lexical",
        "total": total,
        "width": words,
        "pruning": pruning._asdict(),
        "also": also,
        "pieces": [str(i) for i in range(words)],
    }
    seconds: dict[str, float] = {}
    with drafting(out) as draft:
        entries = 0
        for batch in word_vectors(total, words, active, seed=0):
            entries += _timed(seconds, "rows", partial(build.append_sparse, draft, batch, entries))
            draft.append_names([""] * batch.shape[0])
        rows = vectors(build.so_far(draft, meta))
        _timed(seconds, "postings", lambda: build.write_sparse(draft, POSTINGS, lexical.invert(rows)))
        _timed(seconds, "pruned", lambda: build.write_sparse(draft, PRUNED, lexical.invert(lexical.prune(rows, pruning.items))))
        for name in also:
            _timed(seconds, name, partial(EXTRAS[name].build, rows, draft.folder))
        index = _timed(seconds, "hashing", lambda: finish(draft, out, 0, meta, {}))
    bytes_of = lambda *starts: sum(p.stat().st_size for p in out.iterdir() if p.name.startswith(starts))
    rows, asked = vectors(index), next(word_vectors(queries, words, active, seed=1))
    postings = csr(index, POSTINGS)
    ours = {name: open_backend(index, name, mesh) for name in ("exact", "two-stage", *also)}
    runs: dict[str, Callable[[sp.csr_array], Any]] = {name: _ask(search) for name, search in ours.items()}
    runs["scipy, transpose prepared"] = lambda q: lexical.best((q @ postings).toarray()[0], AT)
    singles = [asked[[i]] for i in range(queries)]
    times = _alternated(runs, singles, rounds)
    times |= _alternated({"scipy, query @ index.T": lambda q: lexical.best((q @ rows.T).toarray()[0], AT)}, singles[:SLOW], 1)
    truth = ours["exact"](asked, AT)
    found = {name: _recall(search(asked, AT), truth) for name, search in ours.items() if name != "exact"}
    table = {name: {**_latency(t), "recall@10": found.get(name, 1.0)} for name, t in times.items()}
    table["device"] = _on_device(rows, singles, mesh, rounds)
    common = seconds["rows"] + seconds["hashing"]
    built = {
        "exact": common + seconds["postings"],
        "two-stage": common + seconds["postings"] + seconds["pruned"],
        "device": common,
        **{name: common + seconds[name] for name in also},
    }
    stored = {
        "exact": bytes_of("rows", "postings"),
        "two-stage": bytes_of("rows", "postings", "pruned"),
        "device": bytes_of("rows"),
        **{name: bytes_of("rows", name) for name in also},
    }
    for name in built:
        table[name] |= {"build_s": round(built[name], 2), "bytes": stored[name]}
    touched = np.diff(postings.indptr)
    return {
        "vectors": total, "words": words, "active": entries / total, "most_used": float(touched.max() / total), "postings_a_query": float(np.mean([touched[q.indices].sum() for q in singles])),
        "pruning": pruning._asdict(), "build_steps_s": {k: round(v, 2) for k, v in seconds.items()}, "backends": table,
        "exact_over_scipy": {name: round(table["exact"]["p50_ms"] / table[name]["p50_ms"], 3) for name in table if name.startswith("scipy")},
    }  # fmt: skip


def of_numbers(out: Path, total: int, width: int, queries: int, rounds: int) -> dict[str, Any]:
    """The same of dense vectors, beside the plain product of a query and all items with the same selection."""
    mesh = make_mesh(MeshOptions())
    also = ["faiss"] if _installed(LIBRARIES["faiss"][1]) else []
    meta = {"kind": "dense", "total": total, "width": width, "also": also}
    seconds: dict[str, float] = {}
    with drafting(out) as draft:
        for batch in number_vectors(total, width, seed=0):
            _timed(seconds, "rows", partial(draft.append, "vectors", batch))
            draft.append_names([""] * len(batch))
        for name in also:
            _timed(seconds, name, partial(EXTRAS[name].build, vectors(build.so_far(draft, meta)), draft.folder))
        index = _timed(seconds, "hashing", lambda: finish(draft, out, 0, meta, {}))
    asked = next(number_vectors(queries, width, seed=1))
    ours = {name: open_backend(index, name, mesh) for name in ("exact", *also)}
    whole = jax.device_put(np.asarray(vectors(index)))
    product = jax.jit(lambda q, items: jax.lax.top_k(jnp.dot(q, items.T, precision="highest"), min(AT, total)))
    runs: dict[str, Callable[[Any], Any]] = {name: _ask(search) for name, search in ours.items()}
    runs["plain product"] = lambda q: jax.block_until_ready(product(q, whole))
    times = _alternated(runs, [asked[[i]] for i in range(queries)], rounds)
    together = _alternated(runs, [asked], rounds)
    truth = ours["exact"](asked, AT)
    table = {name: {**_latency(t), f"{queries}_queries_ms": round(1e3 * float(np.median(together[name])), 3)} for name, t in times.items()}
    bytes_of = lambda *starts: sum(p.stat().st_size for p in out.iterdir() if p.name.startswith(starts))
    for name in ours:
        table[name] |= {"recall@10": _recall(ours[name](asked, AT), truth), "bytes": bytes_of("vectors", *([name] if name in also else [])),
                        "build_s": round(seconds["rows"] + seconds["hashing"] + seconds.get(name, 0), 2)}  # fmt: skip
    return {
        "vectors": total,
        "width": width,
        "backends": table,
        "exact_over_product": round(table["exact"]["p50_ms"] / table["plain product"]["p50_ms"], 3),
    }


def word_vectors(total: int, words: int, active: int, *, seed: int) -> Iterator[sp.csr_array]:
    """Unit vectors [b, words] of exactly `active` words each, in batches; the topics are the same for every seed."""
    use = np.cumsum(1 / (np.arange(words) + OFFSET))
    use *= active / use[-1]  # strata of equal use end at 1, 2, ..., active
    topics = np.random.default_rng(2)
    place, weight = topics.random((TOPICS, active)), topics.exponential(size=(TOPICS, active))
    rng = np.random.default_rng(seed)
    for start in range(0, total, BATCH):
        count = min(BATCH, total - start)
        topic, shared = rng.integers(0, TOPICS, count), rng.random((count, active)) < 0.5
        u = np.arange(active) + np.where(shared, place[topic], rng.random((count, active)))
        drawn = np.searchsorted(use, u)
        # Words ascend with the strata; one that two neighbours draw goes to the first, and the next word to the second.
        drawn = np.arange(active) + np.maximum.accumulate(drawn - np.arange(active), 1)
        drawn = np.minimum(drawn, words - active + np.arange(active))
        value = np.where(shared, weight[topic], rng.exponential(size=(count, active))).astype(np.float32)
        value /= np.linalg.norm(value, axis=1, keepdims=True)
        yield sp.csr_array((value.ravel(), drawn.astype(np.int32).ravel(), np.arange(0, count * active + 1, active)), shape=(count, words))


def number_vectors(total: int, width: int, *, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors float32 [b, width] around TOPICS centres, in batches."""
    centres = np.random.default_rng(2).standard_normal((TOPICS, width), np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, total, BATCH):
        count = min(BATCH, total - start)
        x = centres[rng.integers(0, TOPICS, count)] + 2 * rng.standard_normal((count, width), np.float32)
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


def _on_device(rows: sp.csr_array, queries: list[sp.csr_array], mesh: Any, rounds: int) -> dict[str, Any]:
    """The dense form of lexical vectors, of as many as DEVICE_BYTES hold where there is no accelerator."""
    limited = jax.devices()[0].platform == "cpu"
    total = min(rows.shape[0], DEVICE_BYTES // (4 * rows.shape[1])) if limited else rows.shape[0]
    placed = topk.place(lambda start, stop: rows[start:stop].toarray(), total, rows.shape[1], mesh)
    times = _alternated({"device": lambda q: topk.top(placed, q.toarray(), AT)}, queries[:SLOW], rounds)
    truth = lexical.exact(lexical.invert(rows[:total]), sp.vstack(queries[:SLOW], format="csr"), AT)
    found = lexical.Hits(*topk.top(placed, sp.vstack(queries[:SLOW], format="csr").toarray(), AT))
    return {**_latency(times["device"]), "recall@10": _recall(found, truth), "vectors": total, "memory_bytes": int(placed.items.nbytes)}


def _ask(search: Search) -> Callable[[Any], lexical.Hits]:
    return lambda query: search(query, AT)


def _alternated(runs: dict[str, Callable[[Any], Any]], queries: list[Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of every query with every function, which take turns; one query before counts for none."""
    for ask in runs.values():
        ask(queries[0])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for query in queries:
            for name, ask in runs.items():
                begin = time.perf_counter()
                ask(query)
                times[name].append(time.perf_counter() - begin)
    return times


def _latency(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(1e3 * float(np.percentile(seconds, p)), 3) for p in (50, 99)}


def _recall(found: lexical.Hits, truth: lexical.Hits) -> float:
    floor = truth.scores[:, -1:]
    alike = np.stack([np.isin(a, b) for a, b in zip(found.ids, truth.ids, strict=True)]) | (found.scores >= floor)
    return round(float(np.mean(np.minimum(alike.sum(1), truth.ids.shape[1]) / truth.ids.shape[1])), 4)


def _timed(seconds: dict[str, float], name: str, f: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    out = f()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
    return out


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
