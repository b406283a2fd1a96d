"""Queries and what they retrieved, tables, images in words: what an evaluation hands to the report to show."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the log imports this, and must not wait for NumPy
    import numpy as np


class Hit(NamedTuple):
    """One retrieved item."""

    item: str | bytes  # a caption, or the bytes of a PNG thumbnail
    score: float
    right: bool


class Query(NamedTuple):
    """One query with its best-scored items."""

    item: str | bytes
    hits: tuple[Hit, ...]  # best first
    rank: int  # 0-based rank of the best right answer in the whole gallery
    answer: str | bytes  # one right answer, shown where no hit is right


class Gallery(NamedTuple):
    """Queries of one direction of one evaluation, e.g. title "val: text to image"."""

    title: str
    queries: tuple[Query, ...]


class Table(NamedTuple):
    """Rows of text under a title, e.g. "val: most used words"."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Weighted = tuple[tuple[str, float], ...]  # words with their weights, the greatest first


class Seen(NamedTuple):
    """An image. picture: PNG of what the model saw. words: its greatest entries. spoken: the model's words in its caption. maps: by word, the
    entry of every patch, float32 [row, column]. shared: products of its kept entries with its caption's, which add up to `score`.
    rank: 0-based, of the best right caption among all."""

    picture: bytes
    caption: str
    words: Weighted
    spoken: tuple[str, ...]
    maps: dict[str, np.ndarray]
    shared: Weighted
    score: float
    rank: int


class Sought(NamedTuple):
    """A word and the images in which it is greatest: (picture, entry of the image, map)."""

    word: str
    images: tuple[tuple[bytes, float, np.ndarray], ...]


class Explained(NamedTuple):
    """numbers: of the evaluation, over the whole set. most_used: by side (word, mean entry, share of vectors in which it is active).
    threshold: entries above it are kept. size: images of the set, of which `images` are spread evenly over it."""

    numbers: dict[str, float]
    most_used: dict[str, tuple[tuple[str, float, float], ...]]
    threshold: float
    size: int
    images: tuple[Seen, ...]
    words: tuple[Sought, ...]
