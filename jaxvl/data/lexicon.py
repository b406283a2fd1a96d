"""Which ids of a tokenizer are words of lexical vectors, and the prompt that asks a decoder for the words of a caption.

The list is kept with the run's tokenizer as lexicon.json, hashed: coordinate j of every vector and row j of every codebook belong to its
j-th id, so a codebook read with another list would be nonsense that nothing else notices.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.data.lists import read_object, text_lines

FILE = "lexicon.json"
MARKS = ("▁", "Ġ", "##")  # in front of a piece: where a word begins (SentencePiece, byte-level BPE), where it goes on (WordPiece)

# Li et al. 2024, https://arxiv.org/abs/2407.17827, section 3.2.
PROMPTS = {
    "focus": 'The focus of "The man is riding a white horse." lies on important words:"man", "riding", "white", "horse". '
    'The focus of "{}" lies on important words:',
}
# Captions that begin and end in what tokenizers like to join with the quotation marks around them.
PROBES = (
    "",
    "A man",
    "a",
    "<PERSON> in it.",
    '"So" it said: "no"',
    ". dot.",
    "(a) b)",
    "'s own'",
    "1 of 2",
    "äöü",
    "日本",
    "-x-",
    "?!",
    " x ",
    "http://a",
    "#a",
    "\\n",
)

RULES = {"ascii_lower_len2": r"[a-z]{2,}", "ascii_any": r"[A-Za-z]+", "all": r"(?s).*"}


class Lexicon(NamedTuple):
    """ids: int32 [V], ascending, of the tokenizer as jaxvl counts them (padding is 0). pieces: their names. made: the options they come of."""

    ids: np.ndarray
    pieces: tuple[str, ...]
    made: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Of the pieces in their order: two lists with one hash mean the same words, whatever a tokenizer numbers them."""
        return hashlib.sha256("\n".join(self.pieces).encode()).hexdigest()


class Prompt(NamedTuple):
    """A text with one {} for the caption. shared: the ids that every prompt begins with. tail: how many ids every prompt ends in. head: how many
    ids there are in front of a caption; the last of them is not shared, since a caption may join with it."""

    template: str
    shared: tuple[int, ...]
    tail: int
    head: int


def check(rule: str, prompt: str, min_count: int) -> None:
    """Raises ValueError naming the key of the tokenizer's section, its value and what would be right."""
    if rule and rule not in RULES and not Path(rule).is_file():
        raise ValueError(f"tokenizer.lexicon is {rule!r}; it takes {', '.join(RULES)}, a file of ids, or '' for none")
    if prompt and template(prompt).count("{}") != 1:
        raise ValueError(
            f"tokenizer.prompt is {prompt!r}; it takes {', '.join(PROMPTS)}, a text with one {{}} for the caption, or '' for the caption alone"
        )
    if min_count < 0:
        raise ValueError(f"tokenizer.lexicon_min_count is {min_count}; it must be at least 0")


def template(prompt: str) -> str:
    return PROMPTS.get(prompt, prompt)


def choose(
    vocabulary: Mapping[str, int], special: Iterable[str], offset: int, made: Mapping[str, Any], count: Callable[[], Counter[int]]
) -> Lexicon:
    """The words that a rule keeps of a tokenizer's vocabulary {piece: its own id}.

    made: rule, min_count, stop, as the options name them. count: how often each of our ids is in the captions, asked for only where min_count is
    above 0. Raises ValueError where the rule's file is no list of ids, or where nothing is kept.
    """
    rule, special = made["rule"], set(special)
    names = {own + offset: piece for piece, own in vocabulary.items() if piece not in special}
    if rule in RULES:
        kept = {i for i, piece in names.items() if re.fullmatch(RULES[rule], bare(piece))}
    else:
        kept = {i + offset for i in _listed(Path(rule))}
        if strange := sorted(kept - names.keys()):
            raise ValueError(f"tokenizer.lexicon: {rule} lists {strange[0] - offset}, which is no word of a tokenizer of {len(names)}")
    kept -= {i + offset for i in made["stop"]}
    if made["min_count"]:
        seen = count()
        kept = {i for i in kept if seen[i] >= made["min_count"]}
    if not kept:
        raise ValueError(
            f"tokenizer.lexicon {rule!r} keeps none of {len(names)} pieces"
            + (f" seen {made['min_count']} times" if made["min_count"] else "")
        )
    ids = sorted(kept)
    return Lexicon(np.array(ids, np.int32), tuple(names[i] for i in ids), dict(made))


def bare(piece: str) -> str:
    """A piece without the mark of where a word begins or goes on."""
    return next((piece.removeprefix(mark) for mark in MARKS if piece.startswith(mark)), piece)


def save(lexicon: Lexicon, folder: Path, offset: int) -> None:
    """Writes lexicon.json; ids in it are the tokenizer's own, before `offset`."""
    body = {"sha256": lexicon.sha256, "made": lexicon.made, "ids": (lexicon.ids - offset).tolist(), "pieces": lexicon.pieces}
    (folder / FILE).write_text(json.dumps(body, ensure_ascii=False, indent=0) + "\n")


def load(folder: Path, vocabulary: Mapping[str, int], offset: int, made: Mapping[str, Any]) -> Lexicon:
    """What `save` wrote. Raises ValueError where it is damaged, or is of another tokenizer or of other options than `made`."""
    file = folder / FILE
    try:
        body = read_object(file, "ids", "pieces", "made", "sha256")
        found = Lexicon(np.array(body["ids"], np.int32) + offset, tuple(map(str, body["pieces"])), dict(body["made"]))
        hashed = found.sha256
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{file}, the list of words that this run's codebooks are of, cannot be read ({error})") from None
    if hashed != body["sha256"] or len(found.ids) != len(found.pieces):
        raise ValueError(f"{file} has been changed: its words hash to {hashed[:12]}, and it was saved with {str(body['sha256'])[:12]}")
    for i, piece in zip(body["ids"], found.pieces, strict=True):
        if vocabulary.get(piece) != i:
            raise ValueError(
                f"{file}: {piece!r} is id {vocabulary.get(piece)} of the tokenizer beside it, not {i}; they are not of one run"
            )
    for key, value in made.items():
        if found.made.get(key) != value:
            name = "lexicon" if key == "rule" else f"lexicon_{key}"
            raise ValueError(
                f"config.tokenizer.{name} is {value!r}, but this run's codebooks are of the {len(found.ids)} words of {found.made.get(key)!r}"
            )
    return found


def facts(tokenizer: Any) -> dict[str, Any]:
    """What a method may want to know of a tokenizer: its words, and the ends of its prompt. Empty where it has neither."""
    words, prompt = getattr(tokenizer, "lexicon", None), getattr(tokenizer, "prompt", None)  # sizes that stand for a tokenizer have neither
    known = {} if words is None else {"words": tuple(words.ids.tolist())}
    return known if prompt is None else {**known, "prefix": prompt.shared, "tail": prompt.tail, "head": prompt.head}


def stamp(tokenizer: Any) -> dict[str, str]:
    """What a checkpoint keeps of the words that its codebooks are of: their hash, nothing for a tokenizer (or None) without."""
    words = getattr(tokenizer, "lexicon", None)
    return {} if words is None else {"words": words.sha256}


def same(tokenizer: Any, meta: Mapping[str, Any], where: Path) -> None:
    """Raises ValueError where the codebooks of a checkpoint with this meta are of other words than the tokenizer keeps."""
    mine, saved = stamp(tokenizer).get("words"), meta.get("words")
    if saved != mine:
        tell = lambda digest: f"words that hash to {digest[:12]}" if digest else "no words"
        raise ValueError(f"the checkpoint in {where} has codebooks of {tell(saved)}, but the tokenizer of this run keeps {tell(mine)}")


def shared_ends(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], int]:
    """The ids that all rows begin with, and how many of the following they end with in common."""
    alike = lambda rows: next((n for n, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))
    front = alike(rows)
    return tuple(rows[0][:front]), alike([row[front:][::-1] for row in rows])


def _listed(file: Path) -> list[int]:
    text = " ".join(line for _, line in text_lines(file))
    try:
        return [int(i) for i in re.split(r"[\s,\[\]]+", text.strip("[] ")) if i]
    except ValueError as error:
        raise ValueError(f"tokenizer.lexicon: {file} must hold ids, one a line or as a JSON list ({error})") from None
