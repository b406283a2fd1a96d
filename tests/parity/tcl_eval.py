"""What surrounds the method in ALBEF and TCL: captions, RandAugment, position tables, ranks of re-scored candidates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.data import randaugment as augment, text
from jaxvl.evals import ranking
from jaxvl.evals.rerank import OUTSIDE
from jaxvl.evals.topk import nearest
from jaxvl.interop.positions import resize_table
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.method import Method
from tests.parity.case import Case, Check, has

EXACT = ("Identity", "AutoContrast", "Equalize", "Brightness")  # table operations; the others interpolate, to within a level
apply = jax.jit(augment.apply, static_argnums=(3, 4))


def captions(case: Case) -> None:
    clean = {"caption": text.albef_caption, "question": text.albef_question}
    for kind in case:
        for example in case[kind]:
            assert clean[kind](example["in"], example["max_words"]) == example["out"], example
            if kind == "caption":
                assert text.clean_caption(example["in"], text.Cleaning("albef", example["max_words"])) == example["out"]


def randaugment(case: Case) -> None:
    """Every recorded operation at level 7, the overflowing AutoContrast as well as the one that was meant."""
    names = sorted(set(case) - {"image"})
    operations = [name.removesuffix("_fixed").removesuffix("_neg") for name in names]
    images = jnp.asarray(np.broadcast_to(case["image"], (len(names), *case["image"].shape)), jnp.float32)
    kinds = jnp.asarray([augment.OPERATIONS.index(operation) for operation in operations])
    signs = jnp.asarray([-1.0 if name.endswith("_neg") else 1.0 for name in names])
    got = {contrast: np.asarray(apply(images, kinds, signs, 7.0, contrast)) for contrast in ("fixed", "ref_bug")}
    for i, (name, operation) in enumerate(zip(names, operations, strict=True)):
        ours = got["ref_bug" if name == "AutoContrast" else "fixed"][i]
        off = np.abs(ours - case[name].astype(np.float64)).max()
        assert off <= (0 if operation in EXACT else 1), f"{name}: {off} levels"


def positions(case: Case) -> None:
    for i in range(int(case["n_cases"])):
        old, new = int(case[f"c{i}/old_grid"]), int(case[f"c{i}/new_grid"])
        table = case[f"c{i}/pos_embed"][0]
        assert len(table) == 1 + old * old
        got = resize_table(table.astype(np.float64), 1, (new, new), "bicubic")
        np.testing.assert_allclose(got, case[f"c{i}/pos_embed_new"][0], rtol=2e-5, atol=1e-6)


def recall(case: Case) -> None:
    """Percentages, to the last bit that dividing by 100 leaves; `r_mean` averages both ways."""
    owner = case["txt2img"]
    right = np.arange(len(case["scores_i2t"]))[:, None] == owner
    ranks = {"txt": ranking.exact_ranks(case["scores_i2t"], right), "img": ranking.exact_ranks(case["scores_t2i"], right.T)}
    means = {}
    for way, rank in ranks.items():
        recalls = 100 * ranking.recall_at(rank.stable, (1, 5, 10))
        np.testing.assert_allclose(recalls, [case[f"{way}_r{k}"] for k in (1, 5, 10)], rtol=1e-12, err_msg=way)
        means[way] = recalls.mean()
        np.testing.assert_allclose(means[way], case[f"{way}_r_mean"], rtol=1e-12, err_msg=way)
    np.testing.assert_allclose((means["txt"] + means["img"]) / 2, case["r_mean"], rtol=1e-12)


def two_stage(case: Case, method: Method, params: Any, k: int) -> None:
    """`eval_sims`, the cosines of all pairs, and the match logits of each query's k nearest, -100 elsewhere, through the code of the evaluation."""
    tokens = case["input_ids"].astype(np.int32)
    np.testing.assert_array_equal(tokens != 0, case["attention_mask"] == 1)
    images, count = jnp.asarray(case["image"].transpose(0, 2, 3, 1)), len(tokens)
    with jax.default_matmul_precision("highest"):
        v, t = np.asarray(jax.jit(method.embed_image)(params, images)), np.asarray(jax.jit(method.embed_text)(params, tokens))
        np.testing.assert_allclose(v @ t.T, case["eval_sims"], atol=2e-5)
        face = method.score_pair
        kept, words = jax.jit(face.image_side)(params, images), jax.jit(face.text_side)(params, tokens)
        mesh = make_mesh(MeshOptions())
        for way, (a, b) in (("i2t", (v, t)), ("t2i", (t, v))):
            items, _ = nearest(a, b, k, mesh)
            queries = np.repeat(np.arange(count), k)
            image, text = (queries, items.ravel()) if way == "i2t" else (items.ravel(), queries)
            logits = jax.jit(face.score)(params, kept, jax.tree.map(lambda x: x[text], words), jnp.asarray(image)[None])  # noqa: B023
            scores = np.full((count, count), OUTSIDE)
            np.put_along_axis(scores, items, np.asarray(logits).reshape(count, k), 1)
            np.testing.assert_allclose(scores, case[f"eval_score_{way}"], atol=2e-4, rtol=1e-4, err_msg=way)


CHECKS = {
    "text_preprocess": Check(lambda case: bool(case) and set(case) <= {"caption", "question"}, captions),
    "randaugment": Check(has("image", "Identity", "AutoContrast"), randaugment),
    "pos_embed_interp": Check(has("n_cases", "c0/pos_embed", "c0/pos_embed_new"), positions),
    "recall": Check(has("scores_i2t", "scores_t2i", "txt2img"), recall),
}
