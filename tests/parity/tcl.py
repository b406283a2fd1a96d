"""TCL against the numbers of its published code: whole models, forwards and backwards, over steps, fine-tuned and re-ranked.

In float32; all of it but the trajectory also with the batch split over as many of 2, 4 and 8 devices as it divides over. Its terms
alone are in `tcl_terms.py`.
"""

import contextlib
import itertools
import json
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxvl.losses import matching, mlm
from jaxvl.mesh import MeshOptions, ShardingError, make_mesh, path_str, shardings
from jaxvl.methods import tcl
from jaxvl.methods.fused import Draws, trunk
from jaxvl.methods.fused_options import of_method
from jaxvl.models.text import TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, make_optimizer
from tests.parity import albef_state, tcl_terms
from tests.parity.case import Case, Check, has
from tests.parity.tcl_terms import alignment, close

# E7: the published optimiser decays every parameter that is no vector, embeddings and the temperature among them.
DECAYED = r"(kernel|embed|types|pos|cls|temperature)$"


class Tiny:
    """The model of an end-to-end file: its options, its state as params and memory, and the meshes it is run on."""

    def __init__(self, case: Case, retrieval: bool = False):
        self.case, self.config = case, json.loads(str(case["config"]))
        c = self.config
        self.state = {name.removeprefix("sd/"): case[name] for name in case if name.startswith("sd/")}
        sizes = dict(variant="", heads=c["heads"], dtype="float32")
        image = VitOptions(**sizes, patch=c["P"], width=c["W"], depth=c["VD"], mlp_dim=4 * c["W"])
        text = TextOptions(
            **sizes, vocab_size=c["V"], mask_id=2, width=c["H"], depth=c["FL"], mlp_dim=c["I"], positions=c["maxpos"], token_types=2, causal=False, pool="first",
            post_norm=True, embed_norm=True, final_norm=False, eps=1e-12,
        )  # fmt: skip
        grid = c["img"] // c["P"]
        # Any share of the teacher can be told in millionths of `alpha_steps`, which the step count of the memory sets.
        self.options = tcl.resolve(tcl.TclOptions(
            width=c["D"], queue=c["Q"], fusion_depth=c["NL"] - c["FL"], momentum=float(c["mom"]), alpha=1.0, alpha_steps=1_000_000, scope="global",
            pool_grid=4 if retrieval else math.isqrt(grid), ids=retrieval, mlm=not retrieval,
        ))  # fmt: skip
        self.trunk = trunk(image, text, of_method(self.options))
        self.depth = c["FL"]
        spec = {"image": np.zeros((1, c["img"], c["img"], 3)), "tokens": np.zeros((1, c["L"]), np.int32)}
        self.shapes = jax.eval_shape(lambda: self.trunk.init(jax.random.key(0), spec))
        self.params, self.memory = self.read(self.state)
        # The files keep views of integer buffers, so that in `sd` the pointer and the ids are as the call left them.
        self.memory["pointer"] = np.int32(c["ptr0"])
        if retrieval:  # its files keep the parts of pre-training that the loss has no use for
            left = list(
                albef_state.unknown(self.state, {**self.shapes[0], **self.rest()}, self.shapes[1]["teacher"], text_layers=self.depth)
            )
            assert all(re.match(r"(text_encoder_m|text_encoder)\.", name) for name in left), left
        else:
            assert not albef_state.unknown(self.state, {**self.shapes[0], **self.rest()}, self.shapes[1]["teacher"], text_layers=self.depth)

    def rest(self):
        return {name: leaf for name, leaf in self.shapes[1].items() if name not in ("teacher", "step")}

    def read(self, state):
        params = albef_state.tree(state, self.shapes[0], text_layers=self.depth)
        teacher = albef_state.tree(state, self.shapes[1]["teacher"], text_layers=self.depth, teacher=True)
        return params, {**albef_state.tree(state, self.rest(), text_layers=self.depth), "teacher": teacher, "step": np.int32(0)}

    def everywhere(self, f, *rows):
        """f(params, memory, *rows) on one device, and on eight of which as many split the batch as it divides over."""
        run = jax.jit(f)
        yield run(self.params, self.memory, *rows)
        state = (self.params, self.memory)
        mesh, place = next(self.meshes(state))
        with jax.set_mesh(mesh):
            split = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
            yield run(*jax.device_put(state, place), *jax.tree.map(split, rows))

    def meshes(self, state):
        """Meshes over which the batch and every leaf divide, eight devices first."""
        for ways in (8, 4, 2, 1):
            for sizes in ((ways // 2, 2, 8 // ways), (ways, 1, 8 // ways), (ways, 1, 1)):
                if self.config["B"] % ways == 0 and min(sizes) > 0:
                    mesh = make_mesh(MeshOptions(*sizes), jax.devices()[: math.prod(sizes)])
                    with contextlib.suppress(ShardingError):
                        yield mesh, shardings(state, self.trunk.rules, mesh)


def batch_of(case, at=lambda name: name):
    pixels = lambda name: np.float32(case[at(name)]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(case[at("attention_mask")] == 1, case[at("input_ids")] != 0)
    return {"image": pixels("image"), "image_aug": pixels("image_aug"), "tokens": np.int32(case[at("input_ids")])}


def at_alpha(memory, alpha):
    return {**memory, "step": np.int32(np.round(1e6 * np.float64(alpha)))}


def draws_of(case, at=lambda name: name):
    masked = mlm.masked_as(jnp.int32(case[at("mlm_input_ids")]), jnp.int32(case[at("mlm_labels")])) if at("mlm_labels") in case else None
    return Draws(jnp.int32(case[at("neg_image_idx")]), jnp.int32(case[at("neg_text_idx")]), masked)


def in_order(logits):
    """[B, 3, 2] as published: all matches, then all with another image, then all with another text."""
    return np.asarray(logits).swapaxes(0, 1).reshape(-1, 2)


LOSSES = {"loss_i2t": "", "loss_t2i": "", "loss_i2i": "", "loss_t2t": "", "loss_ita": "", "loss_itm": "", "loss_mlm": "", "loss_lmi_text": "", "loss_lmi_image": "",
          "loss_mlm_ce": "loss_mlm_hard", "loss_mlm_distill": "loss_mlm_soft"}  # fmt: skip


def whole_step(tiny, batch, draws):
    """(params, memory, batch, draws) -> loss, aux, what was on the way, gradients."""

    def f(params, memory, batch, draws):
        def loss(params):
            encoded = tiny.trunk.encode(params, batch, None)
            value, aux, way = tcl.terms(tiny.trunk, tiny.options, params, memory, encoded, batch, None, draws)
            return value, (aux, way, encoded)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return tiny.everywhere(f, batch, draws)


def compare_gradients(tiny, grads, want):
    """Leaf by leaf and layer by layer, by the distance relative to the length."""
    flat = lambda tree: {path_str(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    got, want = flat(grads), flat(want)
    for name in want:
        # A bias of the keys shifts all logits of a query alike: its gradient is what rounding leaves of those of the keys.
        keys = 1e-5 * np.linalg.norm(want[name.replace("/bias", "/kernel")]) if name.endswith(("attn/k/bias", "cross/k/bias")) else 0.0
        for a, b in zip(got[name], want[name], strict=True) if "/blocks/" in name else [(got[name], want[name])]:
            assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b) + 2e-6 + keys, name


def e2e_pretrain(case: Case) -> None:
    tiny = Tiny(case)
    tiny.memory = at_alpha(tiny.memory, case["alpha"])
    c, batch, draws = tiny.config, batch_of(case), draws_of(case)
    assert math.isclose(tiny.options.momentum, case["momentum"], rel_tol=1e-6)
    want = albef_state.tree(
        {n.removeprefix("grad/"): case[n] for n in case if n.startswith("grad/")}, tiny.shapes[0], text_layers=tiny.depth
    )
    for (loss, (aux, way, encoded)), grads in whole_step(tiny, batch, draws):
        now = way["views"]
        for name, ours in LOSSES.items():
            close(aux[ours or name], case.get(name), name, rtol=1e-4)
        close(loss, case.get("loss_total"), "total", rtol=1e-4)
        state = partial(close, rtol=1e-5, atol=2e-5)
        for name, got in (
            ("image_embeds", encoded["image"]), ("text_embeds", encoded["text"]), ("image_embeds_m", now.image_m), ("text_embeds_m", now.text_m),
            ("image_feat", now.v), ("text_feat", now.t), ("image_feat_m", now.v_m), ("text_feat_m", now.t_m),
            ("image_local_pooled_m", way["image_local"]), ("text_local_m", way["text_local"]),
        ):  # fmt: skip
            state(got, case.get(name), name)
        for name, a, b in (("itm_weights_i2t", now.v, now.t_m), ("itm_weights_t2i", now.t, now.v_m)):
            state(matching.weights((np.asarray(a) @ np.asarray(b).T / aux["temperature"])[None])[0], case[name], name)
        state(in_order(way["itm_logits"]), case.get("itm_logits"), "itm_logits", atol=1e-4)
        close(aux["temperature"], case.get("temp_after_clamp"))
        after = aux["memory"]
        assert int(after["pointer"]) == int(case["queue_ptr_after"][0])
        for kind in ("image", "text"):
            state(after[f"{kind}_queue"].T, case.get(f"{kind}_queue_after"), kind)
        some = {name.removeprefix("ema_after/"): case[name] for name in case if name.startswith("ema_after/")}
        flat = {path_str(path): x for path, x in jax.tree_util.tree_leaves_with_path(after["teacher"])}
        ours = {
            albef_state.theirs(n, text_layers=tiny.depth, teacher=True): n
            for n in albef_state.NAMES
            if "{i}" not in n.theirs and "{u}" not in n.theirs
        }
        for name, value in some.items():
            state(flat[ours[name].ours], ours[name].transform.ours(value), name, atol=1e-6)
        compare_gradients(tiny, grads, want)
    words_of_both(case, tiny, encoded, now)
    groups(case, tiny)
    assert c["lens"] == case["attention_mask"].sum(1).tolist()


def words_of_both(case, tiny, encoded, now):
    """Vocabulary logits of every position, the student's from its view and the teacher's from its own."""

    @jax.jit
    def logits(params, tokens, mask, images):
        t = tiny.trunk
        return t.words(params, t.fuse(params, t.text_states(params, tokens, mask), mask, t.keys_values(params, images)))

    tokens, mask = np.int32(case["mlm_input_ids"]), case["attention_mask"] == 1
    one_device = lambda tree: jax.tree.map(np.asarray, tree)
    for name, params, images in (("mlm_logits", tiny.params, encoded["image"]), ("mlm_logits_teacher", now.teacher, now.image_m)):
        close(np.asarray(logits(*one_device((params, tokens, mask, images))))[mask], case[name][mask], name, rtol=1e-4, atol=1e-4)


def groups(case, tiny):
    """The optimiser's two groups: our pattern says the same of every parameter."""
    flat = {path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tiny.shapes[0])}
    for name in albef_state.NAMES:
        if name.ours in flat:
            group = "params_decay" if re.search(DECAYED, name.ours) else "params_no_decay"
            assert albef_state.theirs(name, text_layers=tiny.depth) in case[group], name.ours


def trajectory(case: Case) -> None:
    """AdamW with the published groups; float32 throughout."""
    tiny = Tiny(case)
    optim = OptimOptions(
        learning_rate=float(case["lr"]),
        schedule="constant",
        weight_decay=float(case["weight_decay"]),
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip_norm=0.0,
        decay=DECAYED,
    )
    steps = len(case["steps/alpha"])
    tx = make_optimizer(optim, tiny.shapes[0], steps)

    @jax.jit
    def step(params, opt_state, memory, batch, draws):
        def loss(params):
            value, aux, _ = tcl.terms(tiny.trunk, tiny.options, params, memory, tiny.trunk.encode(params, batch, None), batch, None, draws)
            return value, aux

        params = tiny.trunk.constrain(params)
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, aux

    params, memory, opt_state = tiny.params, tiny.memory, tx.init(tiny.params)
    everything = {name: case[name] for name in case if name.startswith("steps/")}
    for i in range(steps):
        mine = {name.removeprefix("steps/"): value[i] for name, value in everything.items()}
        params, opt_state, aux = step(params, opt_state, at_alpha(memory, mine["alpha"]), batch_of(mine), draws_of(mine))
        memory = aux["memory"]
        for name in ("loss_mlm", "loss_ita", "loss_itm"):
            close(aux[name], mine[name], f"step {i}, {name}", rtol=1e-3)
        assert int(memory["pointer"]) == int(mine["queue_ptr"])
        close(params["temperature"], mine["temp"], f"temperature after step {i}", rtol=1e-4)
    want = tiny.read({name.removeprefix("sd_final/"): case[name] for name in case if name.startswith("sd_final/")})
    flat = lambda tree: {path_str(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    got, want = flat((params, memory)), flat(want)
    for name, value in want.items():
        if name.endswith(("attn/k/bias", "cross/k/bias")):
            # It shifts all logits of a query alike, so its gradient is rounding noise, which Adam turns into steps of any size up to the rate.
            close(got[name], value, name, rtol=0, atol=1.1 * steps * optim.learning_rate)
        elif not name.endswith("/step"):
            assert np.linalg.norm(got[name] - value) <= 5e-3 * np.linalg.norm(value) + 1e-6, name


def e2e_retrieval(case: Case) -> None:
    tiny = Tiny(case, retrieval=True)
    tiny.memory = at_alpha(tiny.memory, case["alpha"])
    batch, draws = {**batch_of(case), "id": np.int32(case["idx"])}, draws_of(case)
    np.testing.assert_array_equal(case["idx"], tiny.config["idx"])
    tiny.memory["id_queue"] = ids_before(case, tiny, batch)
    for (_, (aux, way, _)), grads in whole_step(tiny, batch, draws):
        for name in ("loss_ita", "loss_itm", "loss_lmi_text", "loss_lmi_image"):
            close(aux[name], case.get(name), name, rtol=1e-4)
        close(in_order(way["itm_logits"]), case.get("itm_logits"), "itm_logits", rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(aux["memory"]["id_queue"][None], case["idx_queue_after"])
        assert int(aux["memory"]["pointer"]) == int(case["queue_ptr_after"][0])
        want = {
            "temperature": case["grad_temp"],
            "image_proj": {"kernel": case["grad_vision_proj"].T},
            "text_proj": {"kernel": case["grad_text_proj"].T},
        }
        compare_gradients(
            tiny, {"temperature": grads["temperature"], **{k: {"kernel": grads[k]["kernel"]} for k in ("image_proj", "text_proj")}}, want
        )
    re_ranked(case, tiny, batch)


def ids_before(case, tiny, batch):
    """The id queue before the call, of which the file has the state after it: the ids that the call has overwritten are known by the loss alone.

    Of an overwritten entry it matters only which image of the batch it is, if any; all choices are tried.
    """
    queue, ids, start = np.array(tiny.memory["id_queue"]), batch["id"], tiny.config["ptr0"]
    slots = (start + np.arange(len(ids))) % len(queue)
    if int(case["sd/queue_ptr"][0]) == start:
        return queue
    np.testing.assert_array_equal(queue[slots], ids)

    @jax.jit
    def losses(params, memory, queues):
        now = tiny.trunk.views(params, memory, tiny.trunk.encode(params, batch, None), batch, None)
        args = now.v, now.t, now.v_m, now.t_m, ids, memory["image_queue"], memory["text_queue"]
        return jax.lax.map(lambda queue: alignment(*args, queue, now.temperature, now.alpha)[0], queues, batch_size=512)

    choices = np.array(list(itertools.product([*np.unique(ids), -100], repeat=len(slots))), np.int32)
    queues = np.repeat(queue[None], len(choices), 0)
    queues[:, slots] = choices
    locals_ = float(case["loss_lmi_text"]) + float(case["loss_lmi_image"])
    return queues[np.argmin(np.abs(losses(tiny.params, tiny.memory, queues) + locals_ - 6 * float(case["loss_ita"])))]


def re_ranked(case, tiny, batch):
    """Cosines of all pairs, then match logits of the k_test best of each query, -100 for the rest."""
    t, p, k = tiny.trunk, tiny.params, tiny.config["k_test"]

    @jax.jit
    def pairs(params, image, tokens):
        v, w, n = t.embed_image(params, image), t.embed_text(params, tokens), len(image)
        side = jax.tree.map(lambda x: jnp.repeat(x, n, 0), t.score_pair.text_side(params, tokens))
        logits = t.score_pair.score(params, t.score_pair.image_side(params, image), side, jnp.tile(jnp.arange(n), n)[None])
        return v @ w.T, logits.reshape(n, n).T

    sims, logits = map(np.asarray, pairs(p, batch["image"], batch["tokens"]))
    close(sims, case.get("eval_sims"), "eval_sims", rtol=1e-4, atol=2e-5)
    for way, s, score in (("i2t", sims, logits), ("t2i", sims.T, logits.T)):
        best = np.argsort(-s, 1, kind="stable")[:, :k]
        want = np.full(s.shape, -100.0)
        np.put_along_axis(want, best, np.take_along_axis(score, best, 1), 1)
        close(want, case.get(f"eval_score_{way}"), way, rtol=1e-4, atol=1e-4)


def downstream(case: Case) -> None:
    pytest.skip("answer decoder, NLVR2 and VE heads are not built yet")


CHECKS = {
    **tcl_terms.CHECKS,
    "e2e_pretrain": Check(has("sd/temp", "mlm_labels", "loss_total"), e2e_pretrain),
    "trajectory": Check(has("sd/temp", "steps/image", "sd_final/temp"), trajectory),
    "e2e_retrieval": Check(has("sd/temp", "idx", "eval_sims"), e2e_retrieval),
    "downstream": Check(has("vqa/loss_distill"), downstream),
}
