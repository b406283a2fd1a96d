"""What surrounds the method in ALBEF and TCL: captions, RandAugment, position tables, ranks of re-scored candidates."""
import jax
import jax.numpy as jnp
import numpy as np

from jaxvl.data import randaugment as augment, text
from jaxvl.evals import ranking
from jaxvl.interop.positions import resize_table
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


CHECKS = {
    "text_preprocess": Check(lambda case: bool(case) and set(case) <= {"caption", "question"}, captions),
    "randaugment": Check(has("image", "Identity", "AutoContrast"), randaugment),
    "pos_embed_interp": Check(has("n_cases", "c0/pos_embed", "c0/pos_embed_new"), positions),
    "recall": Check(has("scores_i2t", "scores_t2i", "txt2img"), recall),
}
