"""What the benches take instead of a run's own parts: a small built-in config, and the sizes of a tokenizer that has not been trained."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvl.config import Recipe
from jaxvl.data.lexicon import Lexicon, Prompt, template
from jaxvl.data.text import TRAINED, load_tokenizer

SMALL = Path(__file__).with_name("small.py")


SPECIAL = 4  # ids that are no words


class Sizes(NamedTuple):
    """What the step needs of a tokenizer that has not been trained."""

    vocab_size: int
    eos: int
    mask: int
    context_length: int
    lexicon: Lexicon | None = None
    prompt: Prompt | None = None


def tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe; of one that a run would train, and where the config tells the vocabulary, only the sizes."""
    o = recipe.tokenizer
    size = recipe.text.vocab_size or (o.vocab_size if o.name in TRAINED else 0)
    if not size:
        return load_tokenizer(o)
    words = getattr(recipe.method, "entries", 0) or size - SPECIAL
    lexicon = Lexicon(np.arange(SPECIAL, SPECIAL + words, dtype=np.int32), (), {}) if o.lexicon else None
    return Sizes(size, size - 1, size - 2, o.context_length, lexicon, _prompt(o.prompt, o.context_length) if o.prompt else None)


def _prompt(prompt: str, context_length: int) -> Prompt:
    """A prompt about as long as the words and marks of its template, which is what most tokenizers make of it."""
    head, tail = (re.findall(r"\w+|[^\w\s]", side) for side in template(prompt).split("{}"))
    before = min(len(head), context_length - len(tail) - 1)
    return Prompt(prompt, tuple(range(SPECIAL, SPECIAL + max(before - 1, 0))), len(tail), before)
