"""What the benches take instead of a run's own parts: a small built-in config, and the sizes of a tokenizer that has not been trained."""

from pathlib import Path
from typing import Any

from jaxvl.config import Recipe
from jaxvl.data.text import load_tokenizer
from jaxvl.rehearsal import sizes, vocabulary

SMALL = Path(__file__).with_name("small.py")


def tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe; of one that a run would train, and where the config tells the vocabulary, only the sizes."""
    size = vocabulary(recipe)
    return sizes(recipe, size) if size else load_tokenizer(recipe.tokenizer)
