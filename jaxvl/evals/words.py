"""What lexical vectors say in words: the greatest entries of each, the words of a caption, and how evenly a set of vectors uses them."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxvl.data import lexicon
from jaxvl.models import sparse

ROWS = 512  # vectors ordered at a time


class Use(NamedTuple):
    """How a set of vectors uses each word, [V]. mean: m_j, the mean entry. share: of the vectors in which it is active."""

    mean: np.ndarray
    share: np.ndarray


class Found(NamedTuple):
    """Of the words of captions among the first few of their images: shares of images with any of them and with all, mean share of the words."""

    any: float
    all: float
    words: float


def names(tokenizer: Any, entries: int) -> list[str]:
    """The word of each coordinate; its number where the tokenizer has no list of words."""
    kept = getattr(tokenizer, "lexicon", None)
    return [str(i) for i in range(entries)] if kept is None else [lexicon.bare(piece) for piece in kept.pieces]


def order(s: np.ndarray, k: int) -> np.ndarray:
    """Places of the k greatest entries of each row of s [row, V], greatest first, of equal ones the lowest first; int32 [row, k]."""
    blocks = [s[at : at + ROWS] for at in range(0, len(s), ROWS)]
    same = lambda block: np.pad(block, [(0, min(ROWS, len(s)) - len(block)), (0, 0)])
    return np.concatenate([np.asarray(_top(same(block), k)) for block in blocks])[: len(s)]


def keep(s: np.ndarray, places: np.ndarray) -> np.ndarray:
    """s [row, V] with all but the entries at `places` [row, k] set to 0."""
    out = np.zeros_like(s)
    np.put_along_axis(out, places, np.take_along_axis(s, places, 1), 1)
    return out


def use(s: np.ndarray, threshold: float) -> Use:
    """A word is active in a vector where its entry is strictly greater than `threshold`."""
    return Use(s.mean(0, dtype=np.float64), (s > threshold).mean(0))


def of_captions(tokenizer: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """The coordinates of the words of each caption of tokens int32 [text, token], each once, ascending; what a prompt puts around it is no part of it."""
    kept, prompt = tokenizer.lexicon, tokenizer.prompt
    column = np.full(max(tokenizer.vocab_size, int(tokens.max(initial=0)) + 1), -1)
    column[kept.ids] = np.arange(len(kept.ids))
    ends = (tokens != 0).sum(1) - (prompt.tail if prompt else 0)
    begin = prompt.head if prompt else 0
    rows = (np.unique(column[row[begin:end]]) for row, end in zip(tokens, ends, strict=True))
    return [row[row >= 0] for row in rows]


def found(captions: Sequence[np.ndarray], top: np.ndarray) -> Found:
    """Of the words of captions those among `top` [image, k] of the image of the same place; images whose caption has no word are left out."""
    hits = [np.isin(words, first) for words, first in zip(captions, top, strict=True) if len(words)]
    if not hits:
        return Found(float("nan"), float("nan"), float("nan"))
    return Found(float(np.mean([h.any() for h in hits])), float(np.mean([h.all() for h in hits])), float(np.mean([h.mean() for h in hits])))


@partial(jax.jit, static_argnums=1)
def _top(s: jax.Array, k: int) -> jax.Array:
    return sparse.top_indices(s, k)
