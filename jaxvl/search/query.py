"""`jaxvl search query`: what an index holds that is nearest to a text or an image, and for lexical vectors by which words."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxvl.data.decode import Undecodable
from jaxvl.data.text import Cleaning
from jaxvl.evals.embed import Model, embed_image, embed_texts
from jaxvl.manifest import open_regular
from jaxvl.search import lexical
from jaxvl.search.backends import open_backend, vectors
from jaxvl.search.build import Sparsity, sparsified, told
from jaxvl.search.model import Identity, open_run, same
from jaxvl.search.store import Index, open_index
from jaxvl.terminal import table, tell

SHOWN = 8  # words of a hit in the table; --json has all


class Hit(NamedTuple):
    """words: what each shared word adds to the score, the greatest first; None where it was not asked for."""

    item: int
    name: str
    score: float
    words: dict[str, float] | None = None


def main(
    folder: Path, *, text: str | None, image: Path | None, k: int, backend: str, run: Path | None, explain: bool, as_json: bool
) -> int:
    """Print the k best items. Raises ValueError where the index is damaged, or is not of the run that embeds the query."""
    index = open_index(folder)
    if explain and not index.lexical:
        raise ValueError(f"--explain tells scores by words, and the vectors of {folder} are dense")
    index.needs(run=str, overrides=list, ema=bool, what=str, **Identity.__annotations__)
    if "cleaning" in index.meta:  # which older ones lack
        index.needs(cleaning=Cleaning)
    if index.lexical:
        index.needs(pieces=list, sparsity=Sparsity)
    run = run or Path(index.meta["run"])
    opened = open_run(run, index.meta["overrides"], step=None if _exported(run) else index.step, ema=index.meta["ema"])
    same(opened.identity, Identity(**{field: index.meta[field] for field in Identity._fields}), run, folder)
    with jax.set_mesh(opened.model.mesh):
        query = embed(index, opened.model, text, image)
        search = open_backend(index, backend, opened.model.mesh)
        search(query, k)  # reads the index from disk, and compiles
        begin = time.perf_counter()
        answer = search(query, k)
        took = time.perf_counter() - begin
        found = hits(index, answer, query, explain)
    quality = told(index.measured, backend + "/")
    if as_json:
        asked: dict[str, Any] = {"text": text} if image is None else {"image": str(image)}
        if index.lexical:
            asked["words"] = _by_word(index, query.indices, query.data)
        content = {"query": asked, "backend": backend, "quality": quality, "hits": [_plain(hit) for hit in found]}
        tell(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        show(found, f"{index.total:,} {index.meta['what']} searched in {1e3 * took:.1f} ms, {quality}")
    if index.lexical and not query.nnz:
        tell("the query has no word above the index's threshold, so nothing can be found", error=True)
    return 0


def embed(index: Index, model: Model, text: str | None, image: Path | None) -> Any:
    """The query as the index's items, a text cleaned as they were: a csr_array [1, V], or float32 [1, d]. Raises ValueError for a text that the method cannot embed, or no image."""
    if image is None:
        if model.method.embed_text is None or model.tokenizer is None:
            raise ValueError("the method of this run embeds no texts; ask with --image")
        out = embed_texts(model, [text or ""], 1, Cleaning(**index.meta.get("cleaning", {})))
    else:
        try:
            with open_regular(image) as file:
                out = embed_image(model, file.read())[None]
        except Undecodable as error:
            raise ValueError(f"{image} cannot be decoded: {error}") from None
    if not np.isfinite(out).all():
        raise ValueError("the embedding of the query is not finite; the model has diverged")
    return sparsified(out, Sparsity(**index.meta["sparsity"])) if index.lexical else out


def hits(index: Index, found: lexical.Hits, query: Any, explain: bool) -> list[Hit]:
    """The hits of one query. Of lexical vectors those that share no word with it are none."""
    rows = vectors(index) if explain else None
    out = []
    for item, score in zip(found.ids[0].tolist(), found.scores[0].tolist(), strict=True):
        if item < 0 or (index.lexical and score <= 0):
            break
        words = None if rows is None else _by_word(index, *lexical.contributions(query, rows[[item]]))
        out.append(Hit(item, index.name(item), score, words))
    return out


def show(found: list[Hit], title: str) -> None:
    """Print the hits as a table."""
    explained = bool(found) and found[0].words is not None
    rows = [(str(rank), f"{hit.score:.4f}", hit.name, sentence(hit.words or {})) for rank, hit in enumerate(found, 1)]
    head = ("#", "score", "item", "words")[: 4 if explained else 3]
    table(title, head, [row[: len(head)] for row in rows], left=("item", "words"), box="SIMPLE_HEAD")


def sentence(words: dict[str, float]) -> str:
    """ "dog 0.112 + red 0.034 + 12 others 0.021": the parts add up to the score."""
    first = list(words.items())[:SHOWN]
    rest = list(words.values())[SHOWN:]
    shown = [f"{word} {part:.4f}" for word, part in first]
    return " + ".join([*shown, *([f"{len(rest)} others {sum(rest):.4f}"] if rest else [])])


def _by_word(index: Index, words: np.ndarray, values: np.ndarray) -> dict[str, float]:
    pieces = index.meta["pieces"]
    return {pieces[word]: float(value) for word, value in zip(words, values, strict=True)}


def _plain(hit: Hit) -> dict[str, Any]:
    return {key: value for key, value in hit._asdict().items() if value is not None}


def _exported(run: Path) -> bool:
    return not (run / "checkpoints").is_dir()
