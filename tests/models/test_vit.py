import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl.models.vit import Vit, VitOptions, keep_patches, resolve
from tests.models.reference import draw, run

TINY = VitOptions(variant="", patch=4, width=16, depth=2, heads=4, mlp_dim=24, dtype="float32")
PATCH_SIZES = {
    "Ti/16": 5.5e6,
    "S/16": 21.7e6,
    "S/32": 22.5e6,
    "B/16": 85.8e6,
    "B/32": 87.5e6,
    "L/16": 303.3e6,
    "L/14": 303.2e6,
    "H/14": 630.8e6,
    "g/14": 1011e6,
}


def shapes(options, size=224):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(Vit(options).init, jax.random.key(0), images)["params"]


@pytest.mark.parametrize("variant", PATCH_SIZES)
def test_presets_have_the_published_number_of_parameters(variant):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(VitOptions(variant))))
    assert abs(count / PATCH_SIZES[variant] - 1) < 0.01, f"{count:,}"


def test_vit_b16_has_exactly_the_parameters_of_the_paper_and_explicit_sizes_win():
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(VitOptions("B/16")))) == 85_798_656
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(VitOptions("B/16", head=1000, head_bias=True)))) == 86_567_656
    assert shapes(VitOptions("B/16", width=384, heads=6, mlp_dim=64))["blocks"]["mlp"]["up"]["kernel"].shape == (12, 384, 64)


def test_pools_read_the_tokens_they_say():
    images = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    for pool, classes in (("cls", 1), ("mean", 1), ("mean", 0), ("map", 0)):
        o = TINY._replace(pool=pool, class_tokens=classes, registers=3, pooler=0)
        params = draw(Vit(o), images)
        out = run(Vit(o), params, images, hidden=True)
        assert out.tokens.shape == (2, classes + 3 + 6, 16) and out.hidden.shape == (3, *out.tokens.shape)
        if pool == "cls":
            np.testing.assert_array_equal(out.pooled, out.tokens[:, 0])
        if pool == "mean":
            np.testing.assert_allclose(out.pooled, out.tokens[:, classes + 3 :].mean(1), rtol=1e-6)
        if pool == "map":
            assert params["map"]["probe"].shape == (1, 16)


def test_embedding_is_patches_in_row_order_with_positions_and_class_token_first():
    o = TINY._replace(registers=2)
    images = jax.random.normal(jax.random.key(0), (1, 8, 12, 3))
    params = draw(Vit(o), images)
    got = run(Vit(o), params, images, hidden=True).hidden[0, 0]
    np.testing.assert_allclose(got[0], params["cls"][0] + params["pos"][0], rtol=1e-6)
    np.testing.assert_allclose(got[1:3], params["registers"], rtol=1e-6)
    for row in range(2):
        for column in range(3):
            patch = np.asarray(images[0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4], np.float64)
            want = (
                np.tensordot(patch, np.asarray(params["patch"]["kernel"], np.float64), 3)
                + params["patch"]["bias"]
                + params["pos"][1 + row * 3 + column]
            )
            np.testing.assert_allclose(got[3 + row * 3 + column], want, atol=1e-5)


def test_patch_dropout_keeps_a_keyed_subset_in_order_and_only_in_training():
    x = jnp.arange(24.0).reshape(2, 12, 1)
    kept = keep_patches(jax.random.key(0), x, 0.5)[..., 0]
    assert kept.shape == (2, 6) and (jnp.diff(kept, axis=1) > 0).all() and set(kept[1].tolist()) <= set(range(12, 24))
    assert (kept[0] + 12 != kept[1]).any()
    np.testing.assert_array_equal(kept, keep_patches(jax.random.key(0), x, 0.5)[..., 0])
    many = jax.jit(jax.vmap(lambda key: keep_patches(key, x, 0.25)[0, :, 0]))(jax.random.split(jax.random.key(1), 2000))
    counts = np.bincount(np.asarray(many).astype(int).ravel(), minlength=12)
    assert abs(counts / 2000 - 0.25).max() < 0.05

    o = TINY._replace(patch_dropout=0.5)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = draw(Vit(o), images)
    length = lambda **rngs: jax.eval_shape(lambda p: Vit(o).apply({"params": p}, images, rngs=rngs), params).tokens.shape[1]
    assert length() == 17 and length(dropout=jax.random.key(2)) == 9


def test_mask_token_replaces_marked_patches_before_positions():
    o = TINY._replace(mask_token=True)
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    params = draw(Vit(o), images)
    got, plain = (
        run(Vit(o), params, images, marked, hidden=True).hidden[0, 0] for marked in (jnp.array([[False, True, False, False]]), None)
    )
    np.testing.assert_allclose(got[2], params["mask_token"][0] + params["pos"][2], rtol=1e-6)
    np.testing.assert_array_equal(jnp.delete(got, 2, axis=0), jnp.delete(plain, 2, axis=0))


def test_wrong_images_and_options_are_refused_with_numbers():
    images = jnp.zeros((1, 8, 8, 3))
    params = {"params": draw(Vit(TINY), images)}
    with pytest.raises(ValueError, match="8 x 9 pixels do not divide into patches of 4 x 4"):
        Vit(TINY).apply(params, jnp.zeros((1, 8, 9, 3)))
    whole = jax.random.normal(jax.random.key(1), (1, 9, 11, 3))
    cut, plain = (run(Vit(TINY._replace(drop_remainder=True)), params["params"], x).tokens for x in (whole, whole[:, :8, :8]))
    np.testing.assert_array_equal(cut, plain)
    with pytest.raises(ValueError, match="3 x 2 patches and 1 class tokens need 7 positions, the parameters have 5"):
        Vit(TINY).apply(params, jnp.zeros((1, 12, 8, 3)))
    for wrong, words in (
        (VitOptions("B"), "has no patch size"), (VitOptions("X/16"), "size 'X' is none of Ti, S"), (TINY._replace(patch=0), "patch=0 must be"),
        (TINY._replace(pool="cls", class_tokens=0), "needs image.class_tokens"), (TINY._replace(pool="max"), "image.pool='max' is none of cls"),
        (TINY._replace(patch_dropout=1.0), "patch_dropout=1.0 is not in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            resolve(wrong)
