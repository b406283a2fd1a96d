"""Queries and what they retrieved, and tables: what an evaluation hands to the report to show."""

from typing import NamedTuple


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
