"""A recipe tried out on shapes alone, with stand-ins for what only its data tell, so that what cannot be is refused before anything is opened.

A stand-in is as lenient as it can be: what it passes may still be refused once the data are there, and what it refuses can be right
with no data at all.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxvl.data.lexicon import Lexicon, Prompt, template
from jaxvl.data.text import TRAINED
from jaxvl.methods.method import Run
from jaxvl.optim import check_constant, make_optimizer
from jaxvl.parts import assemble

SPECIAL = 4  # ids that are no words
VOCABULARY = 1 << 15  # ids of a tokenizer that is somewhere else
CLASSES = 1 << 12  # of data that have not been counted
STEPS = 10_000  # of epochs of unknown length


class Sizes(NamedTuple):
    """What the step needs of a tokenizer that has not been trained."""

    vocab_size: int
    eos: int
    mask: int
    context_length: int
    ends: bool = True
    lexicon: Lexicon | None = None
    prompt: Prompt | None = None


def vocabulary(recipe: Any) -> int:
    """The number of ids that a config.Recipe names, 0 where its tokenizer has to be loaded for it."""
    return recipe.text.vocab_size or (recipe.tokenizer.vocab_size if recipe.tokenizer.name in TRAINED else 0)


def sizes(recipe: Any, size: int) -> Sizes:
    """A stand-in for the tokenizer of a config.Recipe, with `size` ids. Raises ValueError for a prompt that is none."""
    o = recipe.tokenizer
    words = getattr(recipe.method, "entries", 0) or max(size - SPECIAL, 1)
    lexicon = Lexicon(np.arange(SPECIAL, SPECIAL + words, dtype=np.int32), (), {}) if o.lexicon else None
    return Sizes(size, size - 1, size - 2, o.context_length, o.end, lexicon, _prompt(o.prompt, o.context_length) if o.prompt else None)


def rehearse(recipe: Any) -> None:
    """Raises ValueError for towers, a method, adapters or an optimiser of a config.Recipe that cannot be.

    Makes no array and starts no backend, which a run of several processes must not have done before they have met.
    """
    # Which attention kernel suits the device would be asked of the backend; neither it nor the precision changes a shape.
    plain = {"attention": "xla", "dtype": "float32"}
    towers = {name: getattr(recipe, name) for name in ("image", "text")}
    recipe = recipe._replace(**{n: o._replace(**{k: v for k, v in plain.items() if k in o._fields}) for n, o in towers.items()})
    tokenizer = None if recipe.data.captions == "none" else sizes(recipe, vocabulary(recipe) or VOCABULARY)
    steps = recipe.train.steps or STEPS + 2 * recipe.optim.warmup_steps
    parts = assemble(recipe, tokenizer, Run(steps, max(steps // 10, 1), recipe.optim.warmup_steps, *_classes(recipe)))
    params, _ = jax.eval_shape(lambda key: parts.method.init(key, parts.spec), jax.eval_shape(lambda: jax.random.key(0)))
    check_constant(parts.recipe.optim, params, parts.method.constant)
    make_optimizer(parts.recipe.optim, params, steps)


def _classes(recipe: Any) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """How many classes the data may have, and their groups at every level that the config names."""
    if not recipe.data.classes:
        return 0, ()
    coarse = getattr(recipe.method, "num_coarse", ())
    count = below = getattr(recipe.method, "classes", 0) or max(CLASSES, 4 * max(coarse, default=0))
    parents = []
    for level in range(len(recipe.data.levels)):
        groups = (coarse[level] if level < len(coarse) else 0) or max(below // 4, 2)
        parents.append(tuple(i * groups // below for i in range(below)))
        below = groups
    return count, tuple(parents)


def _prompt(prompt: str, context_length: int) -> Prompt:
    """A prompt about as long as the words and marks of its template, which is what most tokenizers make of it."""
    head, tail = (re.findall(r"\w+|[^\w\s]", side) for side in template(prompt).split("{}"))
    before = min(len(head), context_length - len(tail) - 1)
    return Prompt(prompt, tuple(range(SPECIAL, SPECIAL + max(before - 1, 0))), len(tail), before)
