"""`jaxvl search export`: an index as other search engines read it.

anserini    documents/part-00000.jsonl of Anserini's JsonVectorCollection: {"id", "contents", "vector": {word: whole number}}. Impact indexes count
            whole numbers, so weights are multiplied by SCALE and rounded, and a word that comes to 0 is left out; quantisation.json says so
qdrant      collection.json creates the collection, points-00000.json ... are bodies of its upsert; weights are kept
opensearch  mapping.json creates the index, bulk.jsonl goes to _bulk; words are rank_features, of which the engine keeps nine significant bits
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxvl.new_files import new_folder
from jaxvl.progress import progress
from jaxvl.search.backends import vectors
from jaxvl.search.store import Index, open_index
from jaxvl.terminal import tell

SCALE = 10_000  # of the whole numbers: half a unit is 5e-5, one part in 150 of the smallest weight that 1/√V keeps of 17,182 words
POINTS = 1000  # of a file
FIELD = "words"


def main(folder: Path, kind: str, out: Path, scale: int) -> int:
    """Write the index in `folder` as `kind` into the new folder `out`, which appears when it is whole. Raises ValueError and FileExistsError."""
    index = open_index(folder)
    if index.lexical:
        index.needs(pieces=list)
    if scale < 1:
        raise ValueError(f"--scale is {scale}; weights are multiplied by it and rounded, so it must be at least 1")
    if kind == "anserini" and not index.lexical:
        raise ValueError(f"anserini indexes words, and the vectors of {folder} are dense; qdrant and opensearch take them")
    with new_folder(out) as partial:
        LAYOUTS[kind](index, partial, scale)
        partial.rename(out)
    tell(str(out))
    return 0


def quantised(weights: np.ndarray, scale: int) -> np.ndarray:
    """Whole numbers for weights: round(scale · w), halves to even; int64. Raises ValueError above what 32 bits hold, which is what Lucene counts with."""
    whole = np.rint(weights.astype(np.float64) * scale)
    if whole.size and whole.max() >= 2**31:
        raise ValueError(f"--scale is {scale}, which makes {whole.max():.3g} of a weight; whole numbers have 32 bits there")
    return whole.astype(np.int64)


def _anserini(index: Index, out: Path, scale: int) -> None:
    (out / "documents").mkdir()
    _json(
        out / "quantisation.json",
        {
            "scale": scale,
            "rule": "round(scale * weight), halves to even; words that come to 0 are left out",
            "items": index.total,
            "words": index.meta["width"],
        },
    )
    pieces = index.meta["pieces"]
    with open(out / "documents" / "part-00000.jsonl", "w") as file:
        for item, words, weights in _rows(index):
            whole = quantised(weights, scale)
            vector = {pieces[word]: int(n) for word, n in zip(words, whole, strict=True) if n}
            _line(file, {"id": str(item), "contents": index.name(item), "vector": vector})


def _qdrant(index: Index, out: Path, scale: int) -> None:
    del scale  # weights are kept as they are
    made = {"sparse_vectors": {FIELD: {}}} if index.lexical else {"vectors": {"size": index.meta["width"], "distance": "Dot"}}
    _json(out / "collection.json", made)
    points: list[dict[str, Any]] = []
    number = 0
    for item, words, weights in _rows(index):
        vector: Any = {FIELD: {"indices": words.tolist(), "values": weights.tolist()}} if index.lexical else weights.tolist()
        points.append({"id": item, "vector": vector, "payload": {"item": index.name(item)}})
        if len(points) == POINTS or item == index.total - 1:
            (out / f"points-{number:05d}.json").write_text(json.dumps({"points": points}, ensure_ascii=False) + "\n")
            points, number = [], number + 1
    if index.lexical:
        _json(out / "words.json", {str(n): piece for n, piece in enumerate(index.meta["pieces"])})


def _opensearch(index: Index, out: Path, scale: int) -> None:
    del scale
    field = (
        {"type": "rank_features"}
        if index.lexical
        else {"type": "knn_vector", "dimension": index.meta["width"], "space_type": "innerproduct"}
    )
    name = FIELD if index.lexical else "vector"
    _json(
        out / "mapping.json",
        {"settings": {} if index.lexical else {"index.knn": True}, "mappings": {"properties": {"item": {"type": "keyword"}, name: field}}},
    )
    with open(out / "bulk.jsonl", "w") as file:
        for item, words, weights in _rows(index):
            value = (
                {index.meta["pieces"][word]: w for word, w in zip(words, weights.tolist(), strict=True)}
                if index.lexical
                else weights.tolist()
            )
            _line(file, {"index": {"_id": str(item)}})
            _line(file, {"item": index.name(item), name: value})


LAYOUTS: dict[str, Callable[[Index, Path, int], None]] = {"anserini": _anserini, "qdrant": _qdrant, "opensearch": _opensearch}


def _rows(index: Index) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(item, its words, its weights) of the whole index; of a dense one all its numbers and no words."""
    rows = vectors(index)
    for item in progress(range(index.total), "exporting", unit="items"):
        if index.lexical:
            part = slice(rows.indptr[item], rows.indptr[item + 1])
            yield item, rows.indices[part], rows.data[part]
        else:
            yield item, np.zeros(0, np.int32), rows[item]


def _line(file: IO[str], content: dict[str, Any]) -> None:
    file.write(json.dumps(content, ensure_ascii=False) + "\n")


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
