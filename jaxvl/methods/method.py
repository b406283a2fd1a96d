"""What a pre-training method is to the rest of the program: a tuple of pure functions."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxvl.losses.pairs import unit as unit

Batch = dict[str, jax.Array]


class PairScore(NamedTuple):
    """How well an image and a text match when they are read together, cut so that what many pairs share is computed once.

    image_side: (params, images float [b, S, S, 3]) -> pytree of [layer, b, ...]: what every text that meets an image reads of it.
    text_side: (params, tokens int32 [b, L]) -> pytree of [b, ...]: a text before it has met an image.
    score: (params, images, texts, source int32 [group, r]) -> float32 [group * r], greater for a better match. `images` of image_side
      and the group * r rows of `texts` of text_side are cut in as many groups; row r of group g pairs its text with image
      source[g, r] of the group, so that a group that lies on one device needs no other's images.
    flops: (height, width, length) -> FLOPs by part: "image_tower" and "keys_values" of one image, "text_tower" of one text, "pair" of
      one pair whose sides are there.
    temperature: (params) -> float32 [], τ, by which cosines of embeddings are divided to be logits; None where there is none.
    """

    image_side: Callable[[Any, jax.Array], Any]
    text_side: Callable[[Any, jax.Array], Any]
    score: Callable[[Any, Any, Any, jax.Array], jax.Array]
    flops: Callable[[int, int, int], dict[str, float]]
    temperature: Callable[[Any], jax.Array] | None = None


class Run(NamedTuple):
    """What a method may need to know of the run it is part of, 0 or empty where it is not known (an evaluation has no steps).

    steps, epoch, warmup: optimiser steps of the run, of one pass over the data, and of the learning rate's warm-up. classes: of the
    training data. parents: of each class, then of each group of the level before, the group above it. words: the ids that the tokenizer
    keeps as words (`data/lexicon.py`); prefix, tail: the ids that every prompt begins with, and how many it ends in; head: how many stand in front of a caption.
    """

    steps: int = 0
    epoch: int = 0
    warmup: int = 0
    classes: int = 0
    parents: tuple[tuple[int, ...], ...] = ()
    words: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    tail: int = 0
    head: int = 0


class Renewed(NamedTuple):
    """What `Method.refresh` gives back. forget: bool [], whether the optimiser begins anew with the parameters of `Method.renewed`."""

    params: Any
    memory: Any
    forget: jax.Array


class Term(NamedTuple):
    """A part of a loss as `jaxvl bench` weighs it.

    flops: forward FLOPs of one example, as in `Method.flops`. run: value and gradient of the part alone as a function of arrays with leading batch or queue axis
      and of scalars, None where it cannot be run apart. shapes: of those arrays, for a global batch.
    """

    flops: float
    run: Callable | None = None
    shapes: tuple[jax.ShapeDtypeStruct, ...] = ()


class Method(NamedTuple):
    """Pure functions of explicit arrays; everything but `params` that a method remembers is in `memory`.

    A batch on the device holds "image" float [B, S, S, 3], augmented and normalised, and "tokens" int32 [B, L]; with
    augment.views=2 also "image_aug", a second view of the same images, with data.id "id" int32 [B], equal for samples of one
    image, with data.label "label" int32 [B], with data.captions="none" no "tokens". `batch_spec` is a dict of its shapes and dtypes. `key` is a PRNG key, None where nothing is to be random.

    init: (key, batch_spec) -> (params, memory).
    encode: (params, batch, key) -> embeddings, a pytree of floats with leading axis [B]. Row i depends on row i of the batch
      alone, so that a batch can be encoded in parts. None where a method cannot be cut like this.
    objective: (params, memory, embeddings, batch, key) -> (loss float32 [], aux); sees all rows at once. Scalars in the
      dict `aux` are logged.
    loss: (params, memory, batch, key) -> (loss, aux), the two above in sequence; see `in_sequence`.
    update: (memory, params, aux) -> memory, after the optimiser's step; `params` are the new ones.
    embed_image: (params, images float [b, S, S, 3]) -> float32 [b, width] of unit norm.
    embed_text: (params, tokens int32 [b, L]) -> float32 [b, width] of unit norm; None where images are all that is embedded.
    flops: (batch_spec) -> FLOPs of the forward pass of training for one example, a multiply-add counted as two.
    rules: ordered (path pattern, PartitionSpec) pairs that place every leaf of `params` and `memory`.
    score_pair: see PairScore. It and compose are None where a method has no such face.
    compose: (params, images float [b, S, S, 3], tokens int32 [b, L]) -> float32 [b, width] of unit norm, the query that means each
      image changed as its text says.
    with_memory: (params, memory) -> the params that embed_image, embed_text, score_pair and compose take, where they need some of the
      memory (running statistics); None where the trained ones will do. See `for_faces`.
    refresh: (params, memory, step int32 []) -> Renewed, before the step; None where nothing is renewed but by gradients. What it renews
      stays renewed where the step itself is dropped.
    renewed: pattern of the parameters that it overwrites, whose optimiser state is kept apart; "" for none.
    reads: the arrays of a batch that `loss` needs.
    constrain: (params) -> params, what every step begins with, such as a scalar cut back to its bounds; None for nothing.
    terms: (batch_spec) -> {name: Term}, whose FLOPs add up to `flops`; None where nobody has taken the loss apart.
    features: (params, batch) -> arrays [B, ...] that frozen towers make of a batch and `encode` reads in it where they are there, so that they
      are computed once however often rows are encoded; None for a method without.
    embed_patches: (params, images) -> float32 [b, row, column, d]: patches in the space of the embeddings, of unit norm; None without.
    embed_words: (params, columns int32 [b]) -> float32 [b, d]: what the text tower makes of a word alone, for a method whose embeddings have a
      coordinate for each word; None for others.
    waits: (option, step) pairs: the step at which what the option is for begins, or has grown to its full weight.
    resumed: (memory, step) -> None where a run goes on from a checkpoint; raises ValueError where a change of its config made it miss something
      on the way. None for nothing to miss.
    constant: pattern of parameters that the method takes as constants; an optimiser that would move them is refused. "" for none.
    """

    init: Callable[[jax.Array, dict], tuple[Any, Any]]
    encode: Callable[[Any, Batch, jax.Array | None], Any] | None
    objective: Callable[[Any, Any, Any, Batch, jax.Array | None], tuple[jax.Array, dict]] | None
    loss: Callable[[Any, Any, Batch, jax.Array | None], tuple[jax.Array, dict]]
    update: Callable[[Any, Any, dict], Any]
    embed_image: Callable[[Any, jax.Array], jax.Array]
    embed_text: Callable[[Any, jax.Array], jax.Array] | None
    flops: Callable[[dict], float]
    rules: tuple[tuple[str, PartitionSpec], ...]
    score_pair: PairScore | None = None
    compose: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None
    with_memory: Callable[[Any, Any], Any] | None = None
    constrain: Callable[[Any], Any] | None = None
    terms: Callable[[dict], dict[str, Term]] | None = None
    refresh: Callable[[Any, Any, jax.Array], Renewed] | None = None
    renewed: str = ""
    reads: tuple[str, ...] = ("image", "tokens")
    features: Callable[[Any, Batch], Batch] | None = None
    embed_patches: Callable[[Any, jax.Array], jax.Array] | None = None
    embed_words: Callable[[Any, jax.Array], jax.Array] | None = None
    waits: tuple[tuple[str, int], ...] = ()
    resumed: Callable[[Any, int], None] | None = None
    constant: str = ""


def for_faces(method: Method, params: Any, memory: Any) -> Any:
    """The params that the inference faces of a method take."""
    return params if method.with_memory is None else method.with_memory(params, memory)


def split_key(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The keys of two parts of a computation; None splits into None."""
    return (None, None) if key is None else tuple(jax.random.split(key))


def in_sequence(encode: Callable, objective: Callable) -> Callable:
    """`Method.loss` of its two parts; the first key goes to `encode`, the second to `objective`."""

    def loss(params: Any, memory: Any, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, dict]:
        key_encode, key_objective = split_key(key)
        return objective(params, memory, encode(params, batch, key_encode), batch, key_objective)

    return loss


def unchanged(memory: Any, params: Any, aux: dict) -> Any:
    """`Method.update` of a method that remembers nothing from step to step."""
    del params, aux
    return memory


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded_exp(t: jax.Array, bound: float) -> jax.Array:
    """min(e^t, bound): a scale whose logarithm is learned.

    Where t is at or above the bound, a gradient that descent would follow upwards is zero, and one that leads back down
    passes as if t were at the bound. So t rests at the bound as if it were cut back after each step, and can leave again;
    with the plain minimum it never could.
    """
    return jnp.minimum(jnp.exp(t), bound)


def _bounded_exp_forward(t: jax.Array, bound: float) -> tuple[jax.Array, jax.Array]:
    scale = bounded_exp(t, bound)
    return scale, scale


def _bounded_exp_backward(bound: float, scale: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((scale < bound) | (g > 0), g * scale, 0),)


bounded_exp.defvjp(_bounded_exp_forward, _bounded_exp_backward)
