"""LexVLA: the loss of its equations from the embeddings, and every cheaper way to the same value and gradient."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import mesh as meshes
from jaxvl.accumulate import value_and_grad
from jaxvl.methods import METHODS, lexvla
from jaxvl.methods.lexvla import LexvlaOptions
from jaxvl.methods.method import Run
from jaxvl.models import lora
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, check_constant
from jaxvl.state import STATE_RULES

B, V, KEY = 8, 12, jax.random.key(3)
TINY = dict(variant="", width=16, depth=1, heads=2, mlp_dim=32, dtype="float32")
IMAGE = VitOptions(**TINY, patch=4, registers=1)
TEXT = TextOptions(**TINY, vocab_size=30, pool="last", position="rope", norm="rms")
PREFIX, TAIL, WORDS = (5, 6, 7), (8, 9), tuple(range(16, 16 + V))
OPTIONS = LexvlaOptions(adapter_heads=2, mlp1=16, mlp2=16, entries=V, words=WORDS, prefix=PREFIX, tail=2, head=3, word_weight=0.5, image_weight=0.2, text_weight=0.3,
                        penalty_warmup=10)  # fmt: skip
LORA = LoraOptions(rank=2, targets=r"^text/blocks/attn/[qv]/kernel$", base_dtype="float32")
close = np.testing.assert_allclose


@cache
def batch():
    rng = np.random.default_rng(0)
    tokens = np.zeros((B, 12), np.int32)
    for i in range(B):
        caption = rng.integers(10, 30, i % 6 + 1)  # ids below 16 and above 27 are no words
        row = [*PREFIX, *caption, *TAIL]
        tokens[i, : len(row)] = row
    return {"image": rng.standard_normal((B, 8, 8, 3)).astype(np.float32), "tokens": tokens}


def build(**options):
    return lora.wrap(lexvla.build(IMAGE, TEXT, OPTIONS._replace(**options)), LORA, lambda p: jax.tree.map(lambda _: True, p))


@cache
def start():
    """Parameters in which nothing is zero or tied, and a memory at step 5."""
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    params, memory = jax.eval_shape(lambda: build().init(KEY, spec))
    assert memory["step"].shape == ()
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), params)
    return {**params, "t": np.float32(2.0)}, {"step": np.int32(5)}


@cache
def stepped(accumulate=1, **options):
    """((loss, aux), gradients) of the whole batch."""
    params, memory = start()
    return jax.device_get(jax.jit(value_and_grad(build(**options), accumulate))(params, memory, batch(), KEY))


def same(got, want):
    close(got[0][0], want[0][0], rtol=1e-5)
    jax.tree.map(lambda a, b: close(a, b, atol=2e-5), got[1], want[1])


@cache
def embedded():
    params, _ = start()
    method = build()
    return jax.device_get(
        jax.jit(lambda p, b: (method.embed_image(p, b["image"]), method.embed_text(p, b["tokens"]), method.encode(p, b, None)))(
            params, batch()
        )
    )


def test_the_loss_of_the_embeddings():
    s_img, s_txt, encoded = (jax.tree.map(np.float64, x) for x in embedded())
    assert s_img.shape == s_txt.shape == (B, V)
    assert encoded["image"].shape[1] % lexvla.ROWS == 0
    assert not encoded["text"][:, V:].any()
    for s in (s_img, s_txt):
        assert (s > 0).all()
        close(np.linalg.norm(s, axis=1), 1, rtol=1e-5)
    logits = np.exp(2.0) * s_img @ s_txt.T
    cross = lambda l: np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(l)])
    overuse = lambda s: V * sum(m / s.mean(0).sum() * m**2 for m in s.mean(0))
    grown = (5 / 10) ** 2
    want = cross(logits) + cross(logits.T) + grown * (0.2 * overuse(s_img) + 0.3 * overuse(s_txt)) + 0.5 * encoded["words"].mean()
    (loss, aux), grads = stepped()
    close(loss, want, rtol=1e-5)
    close([aux["image_overuse"], aux["text_overuse"]], [overuse(s_img), overuse(s_txt)], rtol=1e-5)
    on = s_img > V**-0.5
    close(
        [aux["image_active"], aux["image_words_used"], aux["image_most_used"]],
        [on.sum(1).mean(), on.any(0).mean(), on.mean(0).max()],
        rtol=1e-6,
    )
    assert not np.any(grads["text_codebook"])
    assert not any(map(np.any, jax.tree.leaves(grads["image"])))
    assert all(np.any(g) for g in jax.tree.leaves(grads["lora"]) + [grads["image_codebook"], grads["t"]])


def test_words_of_a_caption_are_those_between_the_ends_of_the_prompt():
    """The decoder's logits back from the vectors would lose their sum, so this has them from the codebook."""
    params, _ = start()
    eye = {**params, "text_codebook": np.eye(lexvla.ROWS, 16, dtype=np.float32)}
    method = build(prefix=(), entries=16, words=tuple(range(5, 21)), activation="relu")
    s, got = (lambda e: (e["text"], e["words"]))(jax.device_get(jax.jit(lambda p, b: method.encode(p, b, None))(eye, batch())))
    # The ends of the prompt are of words here.
    for i, row in enumerate(batch()["tokens"]):
        words = [j for j in row[3 : np.sum(row > 0) - 2] if j < 21]
        assert (got[i] > 0) == bool(words)
    assert s.shape == (B, lexvla.ROWS)


def test_cheaper_ways_to_the_same():
    want = stepped()
    same(stepped(fused=False), want)
    same(stepped(shared_prefix=False), want)
    same(stepped(4), want)
    same(stepped(2, frozen_image=False), stepped(frozen_image=False))
    params, memory = start()
    anew = build()._replace(features=None)  # in both passes over the rows
    same(jax.device_get(jax.jit(value_and_grad(anew, 4))(params, memory, batch(), KEY)), want)


def test_frozen_features_are_computed_once_and_not_differentiated():
    params, _ = start()
    method = build()
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("8 8 3")
    features = jax.jit(method.features)(params, batch())["features"]
    assert features.shape == (B, 5, 16)  # class token and patches, no register
    given = jax.jit(lambda p, b: method.encode(p, b, None))(params, {**batch(), "features": features})
    jax.tree.map(lambda a, b: close(a, b, atol=1e-6), given, embedded()[2])
    assert count(lambda p, b: method.encode(p, b, None), params, {"tokens": batch()["tokens"], "features": features, "image": None}) == 0


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2)])
def test_the_same_on_meshes(shape):
    """Penalties of the global batch; with the words split over `tensor` and the codebook over fsdp and tensor."""
    params, memory = start()
    method, mesh = build(), meshes.make_mesh(meshes.MeshOptions(*shape), jax.devices()[: np.prod(shape)])
    place = meshes.shardings({"params": params, "memory": memory}, (*STATE_RULES, *method.rules), mesh)
    with jax.set_mesh(mesh):
        args = jax.device_put({"params": params, "memory": memory}, place), jax.device_put(batch(), jax.NamedSharding(mesh, meshes.BATCH))
        same(
            jax.device_get(jax.jit(lambda state, b: value_and_grad(method, 1)(state["params"], state["memory"], b, KEY))(*args)), stepped()
        )


def test_memory_counts_steps_and_local_penalties_are_greater():
    params, memory = start()
    assert lexvla.build(IMAGE, TEXT, OPTIONS).update(memory, params, {})["step"] == 6
    encoded = embedded()[2]
    mesh = meshes.make_mesh(meshes.MeshOptions(2, 2, 1), jax.devices()[:4])
    values = {}
    with jax.set_mesh(mesh):
        for name, options in {
            "global": {},
            "local": dict(penalty_scope="local"),
            "flops": dict(penalty="flops"),
            "none": dict(penalty="none"),
        }.items():
            method = lexvla.build(IMAGE, TEXT, OPTIONS._replace(**options))
            values[name], _ = jax.jit(lambda e, m=method: m.objective(params, memory, e, {}, None))(encoded)
    assert values["local"] > values["global"] > values["none"]
    assert values["flops"] > values["none"]


def test_the_scale_is_bounded_either_way():
    params, memory = start()
    hot = {**params, "t": np.float32(6.0)}
    objective = lambda m, p: jax.value_and_grad(lambda p: m.objective(p, memory, embedded()[2], {}, None), has_aux=True)(p)
    (_, aux), grads = objective(lexvla.build(IMAGE, TEXT, OPTIONS), hot)
    close(aux["logit_scale"], 100, rtol=1e-6)
    assert grads["t"] == 0
    method = lexvla.build(IMAGE, TEXT, OPTIONS._replace(clip="param"))
    close(np.exp(method.constrain(hot)["t"]), 100, rtol=1e-5)
    assert method.constrain(params)["t"] == params["t"]


def test_codebooks_start_as_the_words_of_the_decoder():
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    params, memory = jax.jit(lambda: lexvla.build(IMAGE, TEXT, OPTIONS).init(KEY, spec))()
    rows = params["text"]["embed"][np.array(WORDS)]
    close(params["text_codebook"][:V], rows / np.linalg.norm(rows, axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(params["image_codebook"], params["text_codebook"])
    close(np.exp(params["t"]), 1 / 0.07, rtol=1e-6)
    assert memory == {"step": 0}


def test_a_codebook_of_a_decoder_that_has_not_read_is_trained_or_tied():
    """Trained it starts as the frozen one and has a gradient of its own; tied it is the decoder's rows at every step, whose gradient they get."""
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    made = {mode: lexvla.build(IMAGE, TEXT, OPTIONS._replace(text_codebook=mode)) for mode in ("frozen", "trained", "tied")}
    params = {mode: method.init(KEY, spec)[0] for mode, method in made.items()}
    jax.tree.map(np.testing.assert_array_equal, params["frozen"], params["trained"])
    assert "text_codebook" not in params["tied"]
    losses = {
        mode: jax.device_get(jax.jit(jax.value_and_grad(lambda p, m=method: m.loss(p, start()[1], batch(), None)[0]))(params[mode]))
        for mode, method in made.items()
    }
    for mode in ("trained", "tied"):
        close(losses[mode][0], losses["frozen"][0], rtol=1e-5)
    frozen, trained, tied = (losses[mode][1] for mode in made)
    assert not frozen["text_codebook"].any()
    assert np.abs(trained["text_codebook"][:V]).max(1).all() and not trained["text_codebook"][V:].any()
    same_rows = np.setdiff1d(np.arange(30), WORDS)
    close(tied["text"]["embed"][same_rows], frozen["text"]["embed"][same_rows], atol=1e-5)
    # d/dr of r / |r| takes what is along r out of the codebook's gradient.
    r = np.asarray(params["tied"]["text"]["embed"])[list(WORDS)]
    length, g = np.linalg.norm(r, axis=1, keepdims=True), np.asarray(trained["text_codebook"])[:V]
    want = (g - (g * r).sum(1, keepdims=True) * r / length**2) / length
    close(tied["text"]["embed"][list(WORDS)] - frozen["text"]["embed"][list(WORDS)], want, rtol=1e-3, atol=1e-5)
    columns = jnp.arange(3)
    close(made["tied"].embed_words(params["tied"], columns), made["frozen"].embed_words(params["frozen"], columns), rtol=1e-5)
    assert made["trained"].constant == made["tied"].constant == "^image/"


def test_the_run_tells_the_words():
    choice = METHODS["lexvla"]
    made = choice.complete(
        OPTIONS._replace(entries=0, words=(), prefix=(), tail=0, head=0), Run(words=WORDS, prefix=PREFIX, tail=2, head=3)
    )
    assert (made.entries, made.words, made.prefix, made.tail, made.head) == (V, WORDS, PREFIX, 2, 3)
    with pytest.raises(ValueError, match="config.method.entries is 17182, but the tokenizer keeps 12 words"):
        choice.complete(OPTIONS._replace(entries=17_182), Run(words=WORDS))


def test_what_the_method_takes_as_constant_must_be_frozen():
    params, method = start()[0], build()
    groups = ((r"^(adapter|image_codebook|t$)", 1.0),)
    check_constant(OptimOptions(groups=lora.groups(groups)), params, method.constant)
    with pytest.raises(
        ValueError, match=r"config.optim trains text_codebook, which config.method takes as a constant; freeze it with the group"
    ):
        check_constant(OptimOptions(groups=((r"^image/", 0.0),)), params, method.constant)


@pytest.mark.parametrize(("image", "text", "options", "message"), [
    ({}, {}, dict(entries=0), "the tokenizer keeps no words; set config.tokenizer.lexicon"),
    ({}, {}, dict(entries=13), "config.method.words are 12 ids up to 27, for 13 entries"),
    (dict(head=8), {}, {}, "config.image.head is 8"),
    ({}, dict(causal=False), {}, "config.method.shared_prefix is True"),
    ({}, {}, dict(words=()), "config.method.word_weight is 0.5, which needs the words"),
    ({}, {}, dict(words=(), word_weight=0.0, text_codebook="tied"), "config.method.text_codebook is 'tied', which needs the words"),
    ({}, {}, dict(penalty="l1"), "config.method.penalty is 'l1'; it must be one of overuse, flops, none"),
    ({}, {}, dict(image_weight=-1.0), "config.method.image_weight is -1.0"),
    ({}, {}, dict(adapter_heads=3), "config.method.adapter_heads is 3, which does not divide"),
    ({}, {}, dict(temperature=0.0), "must lie between 0 and max_scale"),
])  # fmt: skip
def test_refused(image, text, options, message):
    with pytest.raises(ValueError, match=message):
        lexvla.build(IMAGE._replace(**image), TEXT._replace(**text), OPTIONS._replace(**options))


def test_flops_count_each_frozen_pass_once():
    spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()}
    cost = lambda **options: lexvla.build(IMAGE, TEXT, OPTIONS._replace(**options)).flops(spec)
    assert cost() < cost(frozen_image=False)
    assert cost() < cost(shared_prefix=False)
    close(
        cost(entries=V, pool="all") - cost(pool="patches"),
        2.0 * V * 16 + 2.0 * (4 * 256 + 2 * 16 * (25 - 16) + 2 * 16 * 16 + 16 * 32),
        rtol=1e-6,
    )
    assert jnp.isfinite(cost())
