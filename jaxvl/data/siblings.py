"""Modification texts made from captions: captions that differ in one word, and the words that lead from one to the other.

The construction of TIRG for Fashion-200k (Vo et al., CVPR 2019, section 4.1), quirks included, since its test queries were made so.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

SiblingRule = Literal["substring", "token"]
MARKS = {".": "dotmark", "?": "questionmark", "&": "andmark", "*": "starmark"}


def clean(caption: str) -> str:
    """A caption with the marks that a tokenizer would drop written out as words."""
    caption = caption.strip()
    for mark, word in MARKS.items():
        caption = caption.replace(mark, word)
    return caption


def replacement(source: str, target: str) -> tuple[str, str]:
    """The first word of each caption that the other lacks, or its last word where it has no such word."""
    mine, theirs = source.split(), target.split()
    return next((w for w in mine if w not in theirs), mine[-1]), next((w for w in theirs if w not in mine), theirs[-1])


def modification(source: str, target: str) -> str:
    """ "replace A with B", the text that leads from the first caption to the second."""
    return "replace {} with {}".format(*replacement(source, target))


def parents(caption: str, rule: SiblingRule) -> list[str]:
    """The caption with each of its words left out, in order, without repeats.

    "substring" deletes the word wherever its letters stand ("red" also from "shredded"), and a double blank becomes single once, as
    the published queries were made; "token" leaves out one whole word at a time.
    """
    words = caption.split()
    if rule == "token":
        left = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    else:
        left = [caption.replace(word, "").replace("  ", " ").strip() for word in words]
    return list(dict.fromkeys(left))


def families(captions: Iterable[str], rule: SiblingRule = "substring") -> dict[str, list[str]]:
    """Parent caption -> its two or more children, in the order of the captions."""
    children: dict[str, list[str]] = {}
    for caption in dict.fromkeys(captions):
        for parent in parents(caption, rule):
            children.setdefault(parent, []).append(caption)
    return {parent: found for parent, found in children.items() if len(found) > 1}


def modifiable(captions: Sequence[str], rule: SiblingRule = "substring") -> list[bool]:
    """Whether each caption has a sibling, that is, a family."""
    having = {caption for family in families(captions, rule).values() for caption in family}
    return [caption in having for caption in captions]
