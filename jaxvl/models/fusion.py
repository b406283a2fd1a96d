"""Layers on top of two towers: a text transformer that reads image tokens, and the heads that predict words."""
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
    def __call__(self, states, mask, images, images_mask=None, *, hidden: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """states [batch, token, width] and their mask bool [batch, token] or None, images [batch, patch, any width] and
        their mask bool [batch, patch] or None -> states [batch, token, width], every layer's [depth, ...] if asked for."""
        o = resolve(self.options)
        block = block_options(o)._replace(cross=True)
        rows = lambda given: None if given is None else given.astype(bool)[:, None, None]
        context = parts.Context(mask=rows(mask), tokens=images.astype(jnp.dtype(o.dtype)), tokens_mask=rows(images_mask))
        x, layers = parts.stack(block, "blocks", hidden=hidden)(states.astype(jnp.dtype(o.dtype)), context, None)
        return (parts.norm(block, "norm")(x) if o.final_norm else x), layers.hidden


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
