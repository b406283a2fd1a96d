"""The match of an image and a text with the image's keys and values kept: the same as without, for less."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import config as configs
from jaxvl.bench import rerank as bench
from jaxvl.data.augment import AugmentOptions
from jaxvl.evals import rerank
from jaxvl.interop import albef, load
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods import tcl
from jaxvl.methods.tcl import TclOptions
from jaxvl.models import lora
from jaxvl.models.fusion import Fusion
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from tests.parity import tcl_eval
from tests.parity.case import Case

FIXTURE = Path(__file__).parent.parent / "fixtures" / "parity" / "tcl" / "e2e_retrieval.npz"
IMAGE = VitOptions(variant="", patch=8, width=24, depth=1, heads=2, mlp_dim=32, dtype="float32")
TEXT = TextOptions(variant="", width=16, depth=1, heads=2, mlp_dim=32, vocab_size=31, positions=6, token_types=2, embed_norm=True, final_norm=False,
                   post_norm=True, causal=False, pool="first", mask_id=3, dtype="float32")  # fmt: skip

RECIPE = """
def get_config():
    return dict(
        method=dict(name="tcl", fusion_depth=2), image=dict(variant="B/16", depth=2, dtype="float32"),
        text=dict(variant="B", depth=2, vocab_size=99, embed_norm=True, final_norm=False, post_norm=True, causal=False, pool="first", dtype="float32"),
        tokenizer=dict(context_length=30), data=dict(source="x", image_size=160), train=dict(steps=1), evals=dict(val=dict(kind="rerank", source="x")),
    )
"""


@pytest.fixture(scope="module")
def model():
    method = tcl.build(IMAGE, TEXT, TclOptions(width=8, fusion_depth=2, queue=8, scope="global"))
    spec = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32), "tokens": jax.ShapeDtypeStruct((4, 6), jnp.int32)}
    params, _ = jax.jit(lambda key: method.init(key, spec))(jax.random.key(0))
    return method, params


def test_a_kept_image_scores_as_one_that_is_read_anew(model):
    """Any pairs, in groups that reach their own images only; a text's padding is read by nobody."""
    method, params = model
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((6, 16, 16, 3)), jnp.float32)
    tokens = np.where(np.arange(6) < rng.integers(1, 7, (10, 1)), rng.integers(4, 31, (10, 6)), 0)
    source = rng.integers(0, 3, (2, 5))  # groups of three images and five pairs
    face = method.score_pair
    got = jax.jit(lambda p, i, t: face.score(p, face.image_side(p, i), face.text_side(p, t), source))(params, images, tokens)

    def plainly(params, images, tokens):
        from jaxvl.models.text import Text
        from jaxvl.models.vit import Vit

        seen = Vit(IMAGE).apply({"params": params["image"]}, images).tokens
        states = Text(TEXT).apply({"params": params["text"]}, tokens).tokens
        fused, _ = Fusion(TEXT._replace(depth=2)).apply(
            {"params": params["fusion"]}, states, tokens != 0, seen[(source + [[0], [3]]).ravel()]
        )
        return (fused[:, 0] @ params["itm"]["kernel"] + params["itm"]["bias"])[:, 1]

    np.testing.assert_allclose(got, jax.jit(plainly)(params, images, tokens), rtol=1e-5, atol=1e-5)
    assert got.dtype == jnp.float32 and len(set(np.asarray(got).round(5))) > 5
    assert face.temperature(params) == np.float32(0.07) and face.temperature({"temperature": jnp.float32(9)}) == 0.5  # τ within bounds


def test_adapters_that_do_nothing_change_no_score(model):
    """A method with fresh adapters, whose B is zero, scores as the one without; moved adapters are seen by every part of the face."""
    method, params = model
    images, tokens = jnp.ones((2, 16, 16, 3)), jnp.asarray([[5, 6, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0]])
    scores = lambda face, p: face.score(p, face.image_side(p, images), face.text_side(p, tokens), jnp.asarray([[1, 0]]))
    want = jax.jit(lambda p: scores(method.score_pair, p))(params)
    options = LoraOptions(rank=2, targets="fusion/.*kernel$")
    adapters = lora.start(jax.random.key(1), params, options)
    for apply in ("merged", "separate"):
        wrapped = lora.wrap(method, options._replace(apply=apply), lambda p: p).score_pair
        run = jax.jit(lambda a, face=wrapped: scores(face, {**params, "lora": a}))
        np.testing.assert_allclose(run(adapters), want, rtol=1e-5, atol=1e-5)
        assert np.abs(run(jax.tree.map(lambda x: x + 0.3, adapters)) - want).min() > 1e-4


def test_the_published_two_stages():
    case = Case(FIXTURE)
    sizes = json.loads(str(case["config"]))
    stored = {name[3:]: case[name] for name in case if name.startswith("sd/")}
    found = albef.describe(stored, sizes["heads"])
    import tempfile

    from jaxvl.interop import tensors

    with tempfile.TemporaryDirectory() as folder:
        tensors.write(Path(folder) / "x.safetensors", {k: (v.shape, v.dtype) for k, v in stored.items()}, stored.items())
        params, _ = albef.split(load.load(Path(folder) / "x.safetensors", found).params)
    options = TclOptions(width=sizes["D"], fusion_depth=sizes["NL"] - sizes["FL"], queue=sizes["Q"], mlm=False, scope="global")
    exact = {"dtype": "float32"}
    method = tcl.build(found.image._replace(**exact), found.text._replace(**exact), options)
    tcl_eval.two_stage(case, method, params, sizes["k_test"])


def test_an_evaluation_over_a_mesh_scores_as_one_device(model, tmp_path):
    """The real method through the whole evaluation, dense against sharded, on pictures of the embedded set."""
    method, params = model
    from jaxvl.data.stream import DataOptions
    from jaxvl.evals.embed import Model, embed_samples
    from tests.data.shards import Letters

    class Few(Letters):
        context_length = 6

        def encode_batch(self, captions):
            return np.where(super().encode_batch(captions) > 0, super().encode_batch(captions) % 27 + 4, 0)

    data = DataOptions(image_size=16, threads=1, workers=0)
    options = rerank.RerankOptions(source="glyphs://val-seen?size=12", k_test=3, batch_size=8, pairs=2)
    dataset = rerank.open_checked(options, data)
    found = []
    for mesh in (make_mesh(MeshOptions(data=1), jax.devices()[:1]), make_mesh(MeshOptions(data=2, fsdp=4))):
        with jax.set_mesh(mesh):
            model = Model(method, jax.device_put(params, jax.NamedSharding(mesh, jax.P())), Few(), data, AugmentOptions(), mesh)
            found.append(rerank.rerank(options, model, dataset, embed_samples(model, dataset, 8)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one.items, other.items)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5, atol=1e-5)


def test_flops_are_xlas_and_a_third_at_most(tmp_path):
    """The count of the published sizes is XLA's own to within what is no matrix product, and what is kept saves two thirds."""
    method = tcl.build(VitOptions(), TEXT._replace(variant="B", width=0, depth=6, heads=0, mlp_dim=0, positions=512), TclOptions())
    flops = method.score_pair.flops(384, 384, 30)
    ours, again, _ = rerank.pair_costs(flops, 256 * 6)
    assert again / ours > 3.3 and flops["image_tower"] > 20 * ours
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    small = configs.read(configs.load(str(recipe)))
    found = bench.measure(small, small.evals["val"])
    for kind in ("kept", "keys_values_again", "towers_again"):
        assert found["gflops_a_pair_by_xla"][kind] == pytest.approx(found["gflops_a_pair"][kind], rel=0.05), kind
