import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.models.text import Text, TextOptions, pool, resolve
from tests.models.reference import draw, jit, run

TINY = TextOptions(variant="", vocab_size=30, width=16, depth=2, heads=4, mlp_dim=24, eos_id=20, dtype="float32")
LLAMA = TINY._replace(position="rope", norm="rms", kv_heads=2, head_dim=6, gated=True, act="silu", pool="last")
TOKENS = jnp.array([[3, 7, 20, 25, 0, 0], [4, 20, 0, 0, 0, 0]])


def test_each_pool_reads_its_token():
    states = jnp.arange(12.0).reshape(2, 6, 1)
    counted = TOKENS != 0
    read = lambda name: pool(TINY._replace(pool=name), states, TOKENS, counted)[:, 0].tolist()
    assert read("eos") == [2, 7] and read("argmax") == [3, 7] and read("last") == [3, 7]
    assert read("end") == [5, 11] and read("first") == [0, 6] and read("mean") == [1.5, 6.5]
    assert pool(TINY._replace(pool="mean"), states, TOKENS, jnp.zeros((2, 6), bool)).tolist() == [[0], [0]]
    assert pool(TINY._replace(pool="last"), states, TOKENS, counted[:, ::-1])[:, 0].tolist() == [5, 11]


@pytest.mark.parametrize("options", [
    TINY._replace(head=8, head_bias=True), TINY._replace(causal=False, pool="mean"), TINY._replace(causal=False, pool="map"),
    TINY._replace(causal=False, post_norm=True, embed_norm=True, final_norm=False, token_types=2, pool="first", pooler=16),
])  # fmt: skip
def test_padding_changes_nothing_that_is_read(options):
    params = draw(Text(options._replace(positions=9)), TOKENS)
    short, long = (run(Text(options), params, tokens) for tokens in (TOKENS, jnp.pad(TOKENS, ((0, 0), (0, 3)))))
    np.testing.assert_allclose(long.pooled, short.pooled, atol=1e-5)
    np.testing.assert_allclose(long.tokens[:, :6][TOKENS != 0], short.tokens[TOKENS != 0], atol=1e-5)


def test_a_causal_tower_does_not_see_the_future_and_a_bidirectional_one_does():
    changed = TOKENS.at[0, 3].set(9)
    for options, sees in ((TINY, False), (TINY._replace(causal=False), True)):
        both = run(Text(options), draw(Text(options), TOKENS), jnp.stack([TOKENS[0], changed[0]])).tokens[:, :3]
        assert bool(abs(both[0] - both[1]).max() > 1e-4) is sees


def test_left_padding_under_a_mask_equals_right_padding_with_rope():
    left = jnp.array([[0, 0, 3, 7, 20, 25], [0, 0, 0, 0, 4, 20]])
    both = jnp.concatenate([TOKENS, left])
    pooled = run(Text(LLAMA), draw(Text(LLAMA), TOKENS), both, both != 0).pooled
    np.testing.assert_allclose(pooled[:2], pooled[2:], atol=1e-5)


@pytest.mark.parametrize("options, gradient", [(LLAMA, True), (TINY._replace(pool="last", positions=9), False)])
def test_a_key_value_prefix_equals_the_whole_sequence_also_in_gradient(options, gradient):
    model = Text(options)
    params = {"params": draw(model, TOKENS)}
    head, tail = jnp.array([[5, 6, 8]]), TOKENS[:, :4]
    whole = jnp.concatenate([jnp.repeat(head, 2, 0), tail], axis=1)

    def split(p):
        prefix = model.apply(p, head, keys_values=True).keys_values
        return model.apply(p, tail, tail != 0, prefix=prefix).tokens

    def joint(p):
        return model.apply(p, whole, whole != 0).tokens[:, 3:]

    value = lambda f: lambda p: (jnp.where((tail != 0)[..., None], f(p), 0) ** 2).sum()
    got, want = (jit(lambda p, f=f: (f(p), jax.grad(value(f))(p) if gradient else ()))(params) for f in (split, joint))
    np.testing.assert_allclose(got[0][tail != 0], want[0][tail != 0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), got[1], want[1])


def test_clip_text_tower_has_the_published_number_of_parameters():
    options = TextOptions(variant="M", vocab_size=49408, eos_id=49407, head=512)
    params = jax.eval_shape(Text(options).init, jax.random.key(0), jnp.zeros((1, 77), int))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 63_428_096


def test_wrong_captions_and_options_are_refused_with_numbers():
    params = {"params": draw(Text(TINY), TOKENS)}
    with pytest.raises(ValueError, match="captions of 7 tokens are longer than the 6 learned positions"):
        Text(TINY).apply(params, jnp.zeros((1, 7), int))
    for wrong, words in (
        (TINY._replace(eos_id=0), "text.pool='eos' needs text.eos_id between 1 and 29"), (TINY._replace(vocab_size=0), "text.vocab_size=0"),
        (TINY._replace(pool="cls"), "text.pool='cls' is none of eos"), (LLAMA._replace(head_dim=5), "an even width, not 5"),
        (LLAMA._replace(rope_scaling=(8.0,)), "rope_scaling=.* must be empty or"), (TINY._replace(variant="XL"), "size 'XL' is none of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resolve(wrong)
