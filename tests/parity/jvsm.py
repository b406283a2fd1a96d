"""Composition, matching losses, the objective, text encoder, query texts and composed ranking of JVSM.

Losses and composition run in float64 on 1, 2, 4 and 8 devices and in float32 on 1 and 8; a batch that does not divide is filled up with rows
of large numbers that are marked invalid, so a mask that leaks is seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxvl.data import siblings, words
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.evals.ranking import exact_ranks, recall_at
from jaxvl.evals.streamed import streamed_ranks
from jaxvl.losses import compose as losses
from jaxvl.losses.compose import Ids
from jaxvl.mesh import BATCH, MeshOptions, make_mesh
from jaxvl.models.compose import GatedResidual
from jaxvl.models.lstm import Lstm, LstmOptions
from tests.parity.case import Case, Check, has

TOLERANCE = {jnp.float64: dict(rtol=1e-9, atol=1e-10), jnp.float32: dict(rtol=1e-4, atol=1e-5)}
DEVICES = {jnp.float64: (1, 2, 4, 8), jnp.float32: (1, 8)}


class PerRow(NamedTuple):
    """An output, or a tree of them, with a leading batch axis."""

    value: Any


def everywhere(f: Callable, rows: dict[str, np.ndarray], others: Any, compare: Callable) -> None:
    """compare(f(rows, others, valid), tolerance) for both precisions and the devices of each, rows split over them.

    What `f` returns as PerRow is cut to the real rows.
    """
    cut = lambda node: jax.tree.map(lambda x: np.asarray(x)[:count], node.value) if isinstance(node, PerRow) else np.asarray(node)
    count = len(next(iter(rows.values())))
    compiled = jax.jit(f)
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == jnp.float64):
            for devices in DEVICES[dtype]:
                mesh = make_mesh(MeshOptions(), jax.devices()[:devices])
                size = -(-count // devices) * devices
                filled = {
                    k: np.pad(v, [(0, size - count), *[(0, 0)] * (v.ndim - 1)], constant_values=1e3 if v.dtype.kind == "f" else -1)
                    for k, v in rows.items()
                }
                cast = lambda x, dtype=dtype: np.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else None)
                split, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, jax.P())
                placed = jax.device_put(({k: cast(v) for k, v in filled.items()}, np.arange(size) < count), split)
                with jax.set_mesh(mesh):
                    out = compiled(placed[0], jax.device_put(jax.tree.map(cast, others), whole), placed[1])
                compare(jax.tree.map(cut, out, is_leaf=lambda node: isinstance(node, PerRow)), tolerance)


def close(actual: Any, wanted: Any, name: str, tolerance: dict) -> None:
    """wanted: None for an array that the file does not have."""
    if wanted is not None:
        np.testing.assert_allclose(actual, wanted, err_msg=name, **tolerance)


RULES = {"hard": "hard_{}_ref", "semi_hard_val": "semi_{}_ref", "semi_hard": "semirow_{}"}


def bidirectional_match(case: Case) -> None:
    def f(rows: dict, margin: jax.Array, valid: jax.Array) -> dict:
        one = lambda mining: jax.value_and_grad(lambda x, y: losses.match(x, y, margin=margin, mining=mining, valid=valid), (0, 1))
        out = {mining: one(mining)(rows["images"], rows["texts"]) for mining in RULES}
        return {mining: (loss, PerRow(grads)) for mining, (loss, grads) in out.items()}

    def compare(out: dict, tolerance: dict) -> None:
        for mining, names in RULES.items():
            loss, (images, texts) = out[mining]
            for what, value in ("loss", loss), ("grad_images", images), ("grad_texts", texts):
                close(value, case.get(names.format(what)), f"{mining} {what}", tolerance)

    everywhere(f, {k: case[k] for k in ("images", "texts")}, case["margin"], compare)


def gated(case: Case, bn: bool) -> tuple[dict, dict]:
    """Our parameters and running statistics of a composition in the files' names."""
    dense = lambda w, b: {"kernel": case[w].T, "bias": case[b]}
    params: dict[str, Any] = {
        "a": case["a"][:2],
        "gate": dense("gate_w", "gate_b"),
        "res_in": dense("res_w1", "res_b1"),
        "res_out": dense("res_w2", "res_b2"),
    }
    stats = {}
    if bn:
        params |= {f"{name}_norm": {"scale": case[f"{name}_bn_scale"], "bias": case[f"{name}_bn_bias"]} for name in ("gate", "res")}
        stats = {f"{name}_norm": {"mean": case[f"{name}_bn_mean"], "var": case[f"{name}_bn_var"]} for name in ("gate", "res")}
    return params, stats


def tirg_compose(case: Case) -> None:
    train = (
        "train" in case.path.name
        if "train" in case.path.name or "eval" in case.path.name
        else bool((case["gate_bn_mean_after"] != case["gate_bn_mean"]).any())
    )
    module = GatedResidual()
    params, stats = gated(case, True)
    unused = (0, len(case["a"]) - 2)  # the published module carries more scalars than it reads

    def f(rows: dict, others: tuple, valid: jax.Array) -> tuple:
        params, stats = others

        def value(params: dict, image: jax.Array, text: jax.Array) -> tuple:
            out, after = module.apply({"params": params, "batch_stats": stats}, image, text, valid, train=train, mutable=["batch_stats"])
            return jnp.sum(jnp.where(valid[:, None], out * rows["cotangent"], 0)), (out, after["batch_stats"])

        (_, (out, after)), (d, *inputs) = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(params, rows["image"], rows["text"])
        return PerRow((out, *inputs)), after, d

    def compare(got: tuple, tolerance: dict) -> None:
        (out, image, text), after, d = got
        loose = tolerance if tolerance["rtol"] < 1e-6 or not train else dict(rtol=2e-3, atol=2e-5)
        close(out, case.get("out_ref"), "out", tolerance)
        for name, value in (
            ("image", image), ("text", text), ("a", np.pad(d["a"], unused)), ("gate_w", d["gate"]["kernel"].T), ("res_w1", d["res_in"]["kernel"].T),
            ("res_w2", d["res_out"]["kernel"].T), ("gate_bn_scale", d["gate_norm"]["scale"]), ("res_bn_bias", d["res_norm"]["bias"]),
        ):  # fmt: skip
            close(value, case.get(f"grad_{name}"), f"grad_{name}", loose)
        for name in ("gate", "res"):
            for what in ("mean", "var"):
                if (after_name := f"{name}_bn_{what}_after") in case:
                    close(after[f"{name}_norm"][what], case[after_name], after_name, tolerance)

    everywhere(f, {k: case[k] for k in ("image", "text", "cotangent")}, (params, stats), compare)


def tirg_losses(case: Case) -> None:
    def f(rows: dict, others: tuple, valid: jax.Array) -> tuple:
        scale, features, triplets = others
        bbc = jax.value_and_grad(lambda q, t, s: losses.in_batch_softmax(q, t, s, valid), (0, 1, 2))(rows["query"], rows["target"], scale)
        normal = [scale * losses.normalise(rows[k]) for k in ("query", "target")]
        return bbc[0], bbc[1][2], PerRow(bbc[1][:2]), jax.value_and_grad(losses.soft_triplet)(features, triplets), PerRow(normal)

    def compare(out: tuple, tolerance: dict) -> None:
        bbc, scale, (query, target), (triplet, features), normal = out
        close(bbc, case.get("loss_bbc"), "loss_bbc", tolerance)
        for value, name in (query, "query"), (target, "target"), (np.ravel(scale), "scale"):
            close(value, case.get(f"grad_{name}"), name, tolerance)
        close(np.concatenate(normal), case.get("features"), "features", tolerance)
        close(triplet, case.get("loss_triplet"), "loss_triplet", tolerance)
        close(triplet, case.get("loss_triplet_ref_f32"), "loss_triplet_ref_f32", dict(rtol=1e-5, atol=1e-6))
        close(features, case.get("grad_features"), "grad_features", tolerance)
        close(features / 2, case.get("grad_features_ref_half"), "grad_features_ref_half", dict(rtol=1e-4, atol=1e-6))

    everywhere(f, {k: case[k] for k in ("query", "target")}, (case["norm_scale"], case["features"], case["triplets"]), compare)


def jvsm_objective(case: Case) -> None:
    module = GatedResidual(use_bn=False)
    params, _ = gated(case, False)
    inputs = ("x_source", "x_target", "t_mod", "t_target", "t_source")
    joint = {k: case[k] for k in ("wv", "bv", "wt", "bt")}

    def f(rows: dict, others: tuple, valid: jax.Array) -> tuple:
        params, joint, weights, margin = others

        def value(rows: dict, params: dict, joint: dict) -> tuple:
            v = [rows[k] @ joint["wv"].T + joint["bv"] for k in ("x_source", "x_target")]
            s = [rows[k] @ joint["wt"].T + joint["bt"] for k in ("t_mod", "t_target", "t_source")]
            q = module.apply({"params": params}, v[0], s[0])
            terms = losses.jvsm(
                q, v[1], v[0], s[1], s[2], Ids(*[jnp.where(valid, jnp.arange(len(q)), -1)] * 5), weights=weights, margin=margin
            )
            return terms.total, (terms, PerRow([*v, *s, q]))

        (_, aux), (rows, *rest) = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(rows, params, joint)
        return aux, PerRow(rows), *rest

    def compare(out: tuple, tolerance: dict) -> None:
        (terms, embeddings), rows, params, joint = out
        for name, value in zip(("v_source", "v_target", "s_mod", "s_target", "s_source", "composed"), embeddings, strict=True):
            close(value, case.get(name), name, tolerance)
        for name, value in terms._asdict().items():
            close(value, case.get(f"loss_{name}"), name, tolerance)
        ours = {**rows, **joint, "a": params["a"]}
        for theirs, name in ("gate_", "gate"), ("res_{}1", "res_in"), ("res_{}2", "res_out"):
            w, b = (theirs.format(x) if "{}" in theirs else theirs + x for x in "wb")
            ours |= {w: params[name]["kernel"].T, b: params[name]["bias"]}
        for name, value in ours.items():
            close(value, case.get(f"grad_{name}"), f"grad_{name}", tolerance)

    weights = tuple(case["loss_weights"])
    everywhere(f, {k: case[k] for k in inputs}, (params, joint, weights, case["margin"]), compare)


def text_lstm(case: Case) -> None:
    texts, vocab = case["texts"].tolist(), case["vocab"].tolist()
    assert [vocab[0], *words.vocabulary(texts)] == vocab or set(words.vocabulary(texts)) <= set(vocab)
    tokenizer = train_tokenizer(vocab[1:], TokenizerOptions("words", case["token_ids"].shape[1] + 1, vocab_size=1 << 14))
    first = tokenizer.vocab_size - len(vocab)  # the id of the unknown word, after the special ones
    ids = tokenizer.encode_batch(texts)
    ids[ids == tokenizer.eos] = 0
    np.testing.assert_array_equal(np.maximum(ids - first, 0)[:, :-1], case["token_ids"], err_msg="token_ids")
    # The files' id 0 is padding and the unknown word at once, so the lengths tell what counts.
    mask = np.arange(case["token_ids"].shape[1]) < case["lengths"][:, None]
    np.testing.assert_array_equal((ids > 0).sum(1), case["lengths"], err_msg="lengths")

    params = {
        "embed": case["embedding"],
        "lstm_in": case["w_ih"].T,
        "lstm_hidden": case["w_hh"].T,
        "lstm_bias": case["b_ih"] + case["b_hh"],
    }
    params |= {"start_hidden": case["h0"], "start_cell": np.zeros_like(case["h0"])}
    head = {"head": {"kernel": case["fc_w"].T, "bias": case["fc_b"]}}
    base = LstmOptions(vocab_size=len(vocab), word_dim=case["embedding"].shape[1], width=len(case["h0"]))
    pools = {
        "out_ref": base._replace(pool="last", head=len(case["fc_b"])),
        "pooled_max_masked": base,
        "pooled_max_zero_padded": base._replace(pool_padding="zero"),
    }

    def f(rows: dict, params: dict, valid: jax.Array) -> dict:
        out = {
            name: Lstm(o).apply(
                {"params": params if o.head else {k: v for k, v in params.items() if k != "head"}}, rows["tokens"], rows["mask"]
            )
            for name, o in pools.items()
        }
        return PerRow({name: tower.pooled for name, tower in out.items()} | {"hidden_sequence": out["out_ref"].tokens})

    def compare(out: dict, tolerance: dict) -> None:
        for name, value in out.items():
            real = mask if name == "hidden_sequence" else ...
            close(value[real], case.get(name)[real] if name in case else None, name, tolerance)

    everywhere(f, {"tokens": case["token_ids"], "mask": mask.astype(np.int64)}, {**params, **head}, compare)


def composed_retrieval(case: Case) -> None:
    scores, reference, target, caption, ks = (case[k] for k in ("scores", "reference_index", "target_index", "gallery_caption", "ks"))
    items, mesh = np.arange(scores.shape[1]), make_mesh(MeshOptions())
    small = scores.astype(np.float32)
    fair = np.array([len(np.unique(a)) == len(np.unique(b)) for a, b in zip(small, scores, strict=True)])
    for right_name, right in ("single", items == target[:, None]), ("caption", caption == caption[target][:, None]):
        for kept, without in ("excl", reference), ("incl", np.full_like(reference, -1)):
            exact = exact_ranks(scores, right, items != without[:, None])
            groups = (np.full(len(target), -2), np.zeros(len(items), int)) if right_name == "single" else (caption[target], caption)
            answers = target[:, None] if right_name == "single" else None
            streamed = streamed_ranks(small, np.eye(len(items)), *groups, mesh, without=without, answers=answers, block=16)
            for rule in exact._fields:
                prefix = f"{right_name}_{kept}"
                close(getattr(exact, rule), case.get(f"{prefix}_rank_{rule}"), f"{prefix} {rule}", dict(rtol=0, atol=0))
                np.testing.assert_array_equal(
                    getattr(streamed, rule)[fair], getattr(exact, rule)[fair], err_msg=f"streamed {prefix} {rule}"
                )
                close(recall_at(getattr(exact, rule), ks), case.get(f"{prefix}_recall_{rule}"), prefix, dict(rtol=0, atol=1e-12))


def fashion200k_text(case: Case) -> None:
    captions = case["captions"].tolist()
    found = [(*siblings.replacement(captions[a], captions[b]), siblings.modification(captions[a], captions[b])) for a, b in case["pairs"]]
    for name, ours in zip(("source_word", "target_word", "modification"), zip(*found, strict=True), strict=True):
        np.testing.assert_array_equal(ours, case[name], err_msg=name)
    np.testing.assert_array_equal(siblings.modifiable(captions), case["modifiable"], err_msg="modifiable")
    theirs = dict(zip(case["parent_keys"].tolist(), case["parent_children"].tolist(), strict=True))
    assert {parent: "|".join(children) for parent, children in siblings.families(captions).items()} == theirs
    assert [siblings.clean(c) for c in captions] == captions


CHECKS = {
    "bidirectional_match": Check(has("images", "texts", "margin", "semirow_loss"), bidirectional_match),
    "tirg_compose": Check(has("image", "text", "gate_bn_mean", "out_ref"), tirg_compose),
    "tirg_losses": Check(has("query", "target", "norm_scale", "triplets"), tirg_losses),
    "jvsm_objective": Check(has("x_source", "t_mod", "loss_im", "loss_total"), jvsm_objective),
    "text_lstm": Check(has("token_ids", "w_ih", "w_hh"), text_lstm),
    "composed_retrieval": Check(has("scores", "reference_index", "gallery_caption"), composed_retrieval),
    "fashion200k_text": Check(has("captions", "pairs", "modification"), fashion200k_text),
}
