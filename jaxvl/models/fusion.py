"""Layers on top of two towers: a text transformer that reads image tokens, and the heads that predict words."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvl.models import parts
from jaxvl.models.text import TextOptions, block_options, resolve


class Fusion(nn.Module):
    """Text states attend to image tokens in every layer (the upper half of ALBEF's and TCL's BERT).

    options: as the text tower's, with the number of fusion layers as `depth`; `final_norm` as there.
    """

    options: TextOptions

    @nn.compact
    def __call__(
        self, states, mask, images, images_mask=None, *, keys_values=None, source=None, hidden: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """states [batch, token, width] and their mask bool [batch, token] or None, images [batch, patch, any width] and
        their mask bool [batch, patch] or None -> states [batch, token, width], every layer's [depth, ...] if asked for.

        `keys_values` of `image_keys_values` stand in for the images, and are then read by any number of rows: row r of group
        g reads those of image source[g, r] of its group, the images being cut in as many groups as the rows; without `source`
        row i reads image i.
        """
        o = resolve(self.options)
        block = block_options(o)._replace(cross=True)
        rows = lambda given: None if given is None else given.astype(bool)[:, None, None]
        tokens = None if images is None else images.astype(jnp.dtype(o.dtype))
        context = parts.Context(mask=rows(mask), tokens=tokens, tokens_mask=rows(images_mask), source=source)
        x, layers = parts.stack(block, "blocks", hidden=hidden)(states.astype(jnp.dtype(o.dtype)), context, None, keys_values)
        return (parts.norm(block, "norm")(x) if o.final_norm else x), layers.hidden


class ImageKeysValues(nn.Module):
    """The part of `Fusion` that depends on the images alone, with the same parameters: images [batch, patch, any width] ->
    keys and values of every layer, each [depth, batch, patch, kv_head, head_width]."""

    options: TextOptions

    @nn.compact
    def __call__(self, images) -> tuple[jax.Array, jax.Array]:
        o = resolve(self.options)
        each = nn.scan(
            parts.CrossKeysValues,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=o.depth,
            unroll=1 if o.scan else o.depth,
        )
        return each(block_options(o)._replace(cross=True), name="blocks")(None, images.astype(jnp.dtype(o.dtype)))[1]


def image_keys_values(options: TextOptions, params: Any, images: jax.Array) -> Any:
    """`ImageKeysValues` with the parameters of a `Fusion`."""
    return ImageKeysValues(options).apply({"params": params}, images)


class LmHead(nn.Module):
    """Vocabulary logits float32 [..., vocab] of states [..., width]: an own matrix, or `embedding` [vocab, width] where tied."""

    options: TextOptions

    @nn.compact
    def __call__(self, states, embedding=None):
        o = self.options
        init = nn.initializers.normal(o.init_std or o.width**-0.5)
        kernel = embedding.T if embedding is not None else self.param("kernel", init, (o.width, o.vocab_size), jnp.float32)
        return jnp.matmul(states, kernel.astype(states.dtype), preferred_element_type=jnp.float32)


class MlmHead(nn.Module):
    """BERT's masked-word head: dense, activation, norm, then the word embeddings [vocab, width] and a bias.

    With `tied` False it has a decoder of its own, and keeps as `spare_bias` the second bias that published files of that
    kind carry and no forward pass reads.
    """

    options: TextOptions
    tied: bool = True

    @nn.compact
    def __call__(self, states, embedding):
        o = self.options
        block = block_options(o)
        x = parts.ACTIVATIONS[o.act](parts.dense(block, o.width, o.width, True, "transform")(states))
        x = parts.norm(block, "norm")(x)
        bias = self.param("bias", nn.initializers.zeros, (o.vocab_size,), jnp.float32)
        if not self.tied:
            self.param("spare_bias", nn.initializers.zeros, (o.vocab_size,), jnp.float32)
        return LmHead(o, name="decoder")(x, embedding if self.tied else None) + bias
