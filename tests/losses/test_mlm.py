"""Hidden words: how many, which and as what; the loss where there is none, and where groups have their own means."""

import jax
import numpy as np

from jaxvl.losses.mlm import WordLosses, mask_words, masked_as, masked_words, word_losses

ROWS, L, V, MASK = 4000, 12, 50, 49
TOKENS = np.random.default_rng(0).integers(1, 40, (ROWS, L)).astype(np.int32)
MASKABLE = np.ones((ROWS, L), bool)
MASKABLE[:, 0] = MASKABLE[::2, 7:] = False
hide = jax.jit(mask_words, static_argnames=("vocab_size", "mask_id", "rate", "most"))


def test_words_are_hidden_at_their_rates():
    m = jax.tree.map(np.asarray, hide(jax.random.key(0), TOKENS, MASKABLE, vocab_size=V, mask_id=MASK, rate=0.3, most=L))
    rows = np.arange(ROWS)[:, None]
    chosen = np.zeros((ROWS, L), bool)
    chosen[rows, m.positions] = m.counted
    assert not chosen[~MASKABLE].any() and m.counted.sum() == chosen.sum()
    np.testing.assert_allclose(chosen.sum(0) / MASKABLE.sum(0).clip(1), [0, *[0.3] * (L - 1)], atol=0.035)
    np.testing.assert_array_equal(m.labels, TOKENS[rows, m.positions])
    np.testing.assert_array_equal(m.tokens[~chosen], TOKENS[~chosen])
    shown, before = m.tokens[chosen], TOKENS[chosen]
    np.testing.assert_allclose(np.mean(shown == MASK), 0.8 + 0.1 / V, atol=0.02)
    np.testing.assert_allclose(np.mean(shown == before), 0.1 + 0.1 / V, atol=0.02)
    others = shown[(shown != MASK) & (shown != before)]
    assert set(others) == set(range(V)) - {MASK}, "any id may take the place of a word, special ones included"


def test_a_cap_leaves_places_alike_and_words_beyond_it_alone():
    m = jax.tree.map(np.asarray, hide(jax.random.key(1), TOKENS, MASKABLE, vocab_size=V, mask_id=MASK, rate=0.9, most=3))
    assert m.positions.shape == (ROWS, 3) and (m.tokens != TOKENS).sum(1).max() <= 3
    long = m.positions[1::2][m.counted[1::2]]
    np.testing.assert_allclose(np.bincount(long, minlength=L)[1:] / len(long), 1 / (L - 1), atol=0.02)
    none = hide(jax.random.key(2), TOKENS[:2], np.zeros((2, L), bool), vocab_size=V, mask_id=MASK, rate=1.0, most=3)
    assert not none.counted.any() and (none.tokens == TOKENS[:2]).all()


def test_losses_are_means_over_hidden_words_and_nothing_hidden_costs_nothing():
    rng = np.random.default_rng(3)
    logits, teacher = rng.standard_normal((2, 4, 5, 7)).astype(np.float32)
    labels = np.full((4, 5), -100, np.int32)
    labels[0, 1], labels[0, 3], labels[2, 4] = 3, 0, 6
    run = jax.jit(jax.value_and_grad(lambda x, labels, groups: loss(x, teacher, labels, groups), has_aux=True), static_argnums=2)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    q = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    at = [(0, 1), (0, 3), (2, 4)]
    hard, soft = [-log_p[i][labels[i]] for i in at], [-(q[i] * log_p[i]).sum() for i in at]
    for groups, mean in ((1, np.mean), (2, lambda x: (np.mean(x[:2]) + x[2]) / 2), (4, lambda x: (np.mean(x[:2]) + x[2]) / 4)):
        (value, parts), grad = run(logits, labels, groups)
        np.testing.assert_allclose(parts, [mean(hard), mean(soft)], rtol=1e-5)
        np.testing.assert_allclose(value, 0.7 * mean(hard) + 0.3 * mean(soft), rtol=1e-5)
        assert not grad[labels == -100].any() and grad[labels != -100].all()
        (value, _), grad = run(logits, np.full_like(labels, -100), groups)
        assert value == 0 and not grad.any()


def loss(x, teacher, labels, groups):
    m = masked_as(labels, labels)
    losses = word_losses(x, teacher, m.labels, m.counted)
    assert isinstance(losses, WordLosses)
    value, hard, soft = masked_words(losses, 0.3, groups)
    return value, (hard, soft)
