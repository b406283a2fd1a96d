"""What the benches take instead of a run's own parts: a small built-in config, and the sizes of a tokenizer that has not been trained."""
from pathlib import Path
from typing import Any, NamedTuple

from jaxvl.config import Recipe
from jaxvl.data.text import load_tokenizer

SMALL = Path(__file__).with_name("small.py")


class Sizes(NamedTuple):
    """What the step needs of a tokenizer that has not been trained."""

    vocab_size: int
    eos: int
    mask: int
    context_length: int


def tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe; of one that a run would train, and where the config tells the vocabulary, only the sizes."""
    o = recipe.tokenizer
    size = recipe.text.vocab_size or (o.vocab_size if o.name == "bpe" else 0)
    return Sizes(size, size - 1, size - 2, o.context_length) if size else load_tokenizer(o)
