"""The parts of a recipe: its method, completed by tokenizer and run, and the shapes of the batches it sees. Makes no array."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvl import evals
from jaxvl.data import lexicon
from jaxvl.methods import METHODS
from jaxvl.methods.method import Method, Run
from jaxvl.models import lora
from jaxvl.optim import frozen


class Parts(NamedTuple):
    """What training and evaluating a run share. recipe: a config.Recipe, completed by the tokenizer, the adapters and `run`. tokenizer: None where the data
    have no captions. spec: shapes and dtypes of a global batch as the method sees it."""

    recipe: Any
    tokenizer: Any
    method: Method
    spec: dict[str, jax.ShapeDtypeStruct]
    run: Run = Run()


def assemble(recipe: Any, tokenizer: Any, run: Run = Run()) -> Parts:
    """Method and batch spec of a config.Recipe for a tokenizer (None without captions) and a run.

    Raises ValueError for towers, a method or adapters that cannot be.
    """
    text = recipe.text
    if tokenizer is not None:
        known = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos, "mask_id": tokenizer.mask or 0}
        text = text._replace(**{key: getattr(text, key) or value for key, value in known.items() if key in text._fields})
        if text.vocab_size < tokenizer.vocab_size:
            raise ValueError(f"config.text.vocab_size is {text.vocab_size}; the tokenizer has {tokenizer.vocab_size} ids")
        if getattr(text, "pool", "") in ("eos", "argmax") and not tokenizer.ends:
            raise ValueError(
                f"config.text.pool is {text.pool!r}, and captions end in no EOS: the tokenizer's own template puts none, or tokenizer.end is False; "
                f"set config.text.pool to 'last'"
            )
        run = run._replace(**lexicon.facts(tokenizer))
    optim = recipe.optim._replace(groups=lora.groups(recipe.optim.groups)) if recipe.lora.rank else recipe.optim
    choice = METHODS[recipe.method.name]
    options = choice.complete(recipe.method, run)
    method = lora.wrap(choice.build(recipe.image, text, options), recipe.lora, partial(frozen, optim))
    evals.suits(recipe.evals, recipe.method.name, method)
    size, batch = recipe.data.image_size, recipe.train.batch_size
    spec = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)}
    if tokenizer is not None:
        spec["tokens"] = jax.ShapeDtypeStruct((batch, tokenizer.context_length), jnp.int32)
    if recipe.data.label:
        spec["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if recipe.augment.views == 2:
        spec["image_aug"] = spec["image"]
    if recipe.data.triplets:
        if method.compose is None:
            raise ValueError(
                f"config.data.triplets is {recipe.data.triplets!r}, but the method {recipe.method.name} composes no queries; leave it empty"
            )
        for name, plain in (
            ("augment.views", recipe.augment.views == 1),
            ("augment.hflip", recipe.augment.hflip != "unsided"),
            ("data.id", not recipe.data.id),
        ):
            if not plain:
                raise ValueError(f"config.{name} cannot be set with data.triplets, whose batches have two images and three texts a row")
        spec["image_reference"] = spec["image"]
        spec |= {f"tokens_{name}": spec["tokens"] for name in ("reference", "modification")}
        spec |= {name: jax.ShapeDtypeStruct((batch,), jnp.int32) for name in ("id", "id_reference")}
    if recipe.data.id:
        spec["id"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if missing := {"tokens", "label"} & set(method.reads) - set(spec):
        key = {"tokens": "data.captions must not be none", "label": "data.label must name a field"}
        raise ValueError(
            f"config.method.name is {recipe.method.name!r}, which reads {' and '.join(sorted(missing))}: {'; '.join(key[k] for k in sorted(missing))}"
        )
    return Parts(recipe._replace(text=text, optim=optim, method=options), tokenizer, method, spec, run)
