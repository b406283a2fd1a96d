"""Masked language modelling: which words are hidden, and the loss of telling them, with a teacher's opinion as target."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import log_softmax, softmax


class Masked(NamedTuple):
    """Captions with words hidden. K is the most words of a caption that are predicted.

    tokens: int [B, L]. positions: int [B, K], where to predict. labels: int [B, K], the words there. counted: bool [B, K],
    False where a caption has fewer than K.
    """

    tokens: jax.Array
    positions: jax.Array
    labels: jax.Array
    counted: jax.Array


def mask_words(key: jax.Array, tokens: jax.Array, maskable: jax.Array, *, vocab_size: int, mask_id: int, rate: float, most: int) -> Masked:
    """Chooses each maskable word with probability `rate`; shows 80 % of them as `mask_id`, 10 % as any id, 10 % as they are.

    maskable: bool [B, L]. `most` is K: where more words of a caption are chosen, K of them at random are hidden and the others
    stay as they are, which makes shapes static without a bias towards any place. Devlin et al., BERT, 2019, section 3.1.
    """
    key_choice, key_how, key_word = jax.random.split(key, 3)
    draw = jnp.where(maskable, jax.random.uniform(key_choice, tokens.shape), 2.0)
    # The K smallest draws of a row are the first K places of its order; the ones below the rate are chosen.
    smallest, positions = lax.top_k(-draw, most)
    counted = -smallest < rate
    rows = jnp.arange(len(tokens))[:, None]
    chosen = jnp.zeros(tokens.shape, bool).at[rows, positions].set(counted)
    how = jax.random.uniform(key_how, tokens.shape)
    word = jax.random.randint(key_word, tokens.shape, 0, vocab_size, tokens.dtype)
    shown = jnp.where(how < 0.8, mask_id, jnp.where(how < 0.9, word, tokens))
    return Masked(jnp.where(chosen, shown, tokens), positions, jnp.take_along_axis(tokens, positions, 1), counted)


def masked_as(tokens: jax.Array, labels: jax.Array) -> Masked:
    """`Masked` of draws that were made elsewhere: what is shown and the words to predict, -100 for none, both int [B, L]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Masked(tokens, positions, jnp.maximum(labels, 0), labels != -100)


class WordLosses(NamedTuple):
    """Sums over a caption's hidden words, each float [B]; their quotients with `many`, the number of words, are means."""

    hard: jax.Array
    soft: jax.Array
    many: jax.Array


def word_losses(
    logits: jax.Array,  # [B, K, V]
    teacher: jax.Array,  # [B, K, V]; constants to the gradient
    labels: jax.Array,  # int [B, K]
    counted: jax.Array,  # bool [B, K]
    *,
    axis: int = -1,
) -> WordLosses:
    r"""Cross entropy of the student's words with the hidden ones and with the teacher's distribution over the vocabulary.

    hard: :math:`-\log p_y`; soft: :math:`-\sum_w q_w \log p_w` with q the softmax of the teacher. `axis` 1 takes the soft term's
    log p along the sequence instead of the vocabulary, the error of the code that released TCL's first checkpoints; it is
    meant for logits of all positions in order.
    """
    kind = jnp.promote_types(jnp.float32, logits.dtype)
    log_p = log_softmax(logits.astype(kind))
    hard = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    q = softmax(lax.stop_gradient(teacher.astype(kind)))
    soft = -jnp.sum(q * (log_p if axis == -1 else log_softmax(logits.astype(kind), axis)), -1)
    total = lambda x: jnp.sum(jnp.where(counted, x, 0), 1)
    return WordLosses(total(hard), total(soft), counted.sum(1).astype(kind))


def masked_words(losses: WordLosses, alpha: jax.Array | float, groups: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, hard, soft): (1 - alpha) hard + alpha soft, means over hidden words, 0 where there is none; mean of the groups'."""
    per_group = [x.reshape(groups, -1).sum(1) for x in losses]
    hard, soft = (jnp.mean(x / jnp.maximum(per_group[2], 1)) for x in per_group[:2])
    return (1 - alpha) * hard + alpha * soft, hard, soft
