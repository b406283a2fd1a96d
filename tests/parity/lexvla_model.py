"""The towers of LexVLA from the files' own names, through the method itself: prompts with and without what they share, and a whole step of training."""

import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxvl.interop import load, published, tensors
from jaxvl.losses import lexical as losses
from jaxvl.mesh import BATCH, MeshOptions, ShardingError, make_mesh, shardings
from jaxvl.methods import lexvla
from jaxvl.methods.lexvla import LexvlaOptions
from jaxvl.methods.method import Method
from jaxvl.models import lexical, lora
from jaxvl.models.lora import LoraOptions
from jaxvl.models.text import Text, TextOptions
from jaxvl.models.vit import VitOptions
from jaxvl.optim import OptimOptions, make_optimizer
from tests.parity.case import Case, Check, has
from tests.parity.lexvla import adapter_options, adapter_params, near

TARGETS = r"^text/blocks/(attn/(q|k|v|out)|mlp/(up|gate|down))/kernel$"
NAMES = {
    **{f"self_attn.{k}_proj": f"attn/{ours}" for k, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))},
    **{f"mlp.{k}_proj": f"mlp/{k}" for k in ("up", "gate", "down")},
}
NO_IMAGE = VitOptions(variant="", patch=4, width=8, depth=1, heads=1, mlp_dim=8)


def imported(case: Case, start: str, config: dict) -> load.Imported:
    """The model of the arrays whose names begin with `start`, by way of a file and the import."""
    values = {name.removeprefix(start): np.ascontiguousarray(case[name]) for name in case if name.startswith(start)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        tensors.write(file, {name: (x.shape, x.dtype) for name, x in values.items()}, iter(values.items()))
        return load.load(file, published.describe(config, tensors.find(file)))


def layers(case: Case, start: str) -> int:
    return 1 + max(int(name.split(".")[2]) for name in case if name.startswith(start) and ".layers." in name)


def decoder(case: Case) -> tuple[TextOptions, dict]:
    """The text tower and its parameters, lm_head among them."""
    embed, width = case["base:model.embed_tokens.weight"].shape
    config = {
        "model_type": "llama", "vocab_size": embed, "hidden_size": width, "num_hidden_layers": layers(case, "base:model.layers."), "pad_token_id": 0,
        "num_attention_heads": int(case["num_heads"]), "num_key_value_heads": int(case["num_kv_heads"]), "rms_norm_eps": float(case["rms_eps"]),
        "intermediate_size": len(case["base:model.layers.0.mlp.up_proj.weight"]), "rope_theta": float(case["rope_theta"]), "tie_word_embeddings": False,
    }  # fmt: skip
    found = imported(case, "base:", config)
    return found.model.text._replace(dtype="float32", attention="xla"), found.params


def stacked(case: Case, start: str, module: str, depth: int) -> np.ndarray:
    return np.stack([case[f"{start}:model.layers.{i}.{module}"].T for i in range(depth)])


def adapters(case: Case, depth: int, start: str = "") -> dict:
    """Their A [r, in] and B [out, r] of each layer as our tree."""
    out: dict = {}
    for module, path in NAMES.items():
        part, name = path.split("/")
        pair = {ours: stacked(case, f"{start}lora{theirs}", module, depth) for ours, theirs in (("a", "A"), ("b", "B"))}
        out.setdefault(part, {})[name] = {"kernel": pair}
    return {"text": {"blocks": out}}


def codebook(case: Case, rows: int = 128) -> np.ndarray:
    """Z_txt, the rows of lm_head that are kept, filled up to a multiple of `rows` with rows that would show if they took part."""
    kept = case["base:lm_head.weight"][case["keep_ids"]]
    return np.concatenate([kept, np.full((-len(kept) % rows, kept.shape[1]), 9.0, np.float32)])


def lora_of(case: Case) -> LoraOptions:
    return LoraOptions(rank=int(case["rank"]), alpha=float(case["alpha"]), targets=TARGETS, base_dtype="float32")


def text_tower(case: Case) -> None:
    text, base = decoder(case)
    ids, mask, last, V = case["input_ids"].astype(np.int32), case["attention_mask"], case["last_index"], len(case["keep_ids"])
    np.testing.assert_array_equal(mask.sum(1) - 1, last)
    prefix, suffix = case["prefix_ids"].astype(np.int32), case["suffix_ids"]
    assert (ids[:, : len(prefix)] == prefix).all()
    assert all((row[: end + 1][-len(suffix) :] == suffix).all() for row, end in zip(ids, last, strict=True))
    options, tower = lora_of(case), Text(text)
    params = {"text": base["text"], "text_codebook": codebook(case), "lora": adapters(case, text.depth)}
    merged = jax.jit(lambda p: lora.merge(p, options))(params)["text"]
    for module, path in NAMES.items():
        part, name = path.split("/")
        near(merged["blocks"][part][name]["kernel"], stacked(case, "merged", module, text.depth), module, atol=1e-6)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, *x: tower.apply({"params": p}, *x))
        left, left_mask = case["input_ids_left"].astype(np.int32), case["attention_mask_left"]
        for name, tree in (("base", base["text"]), ("lora", merged)):
            out = run(tree, ids, mask)
            if f"hidden_{name}" in case:
                near(np.asarray(out.tokens)[mask == 1], case[f"hidden_{name}"][mask == 1], f"hidden_{name}", atol=5e-5)
            near(out.pooled, case.get(f"z_txt_{name}"), f"z_txt_{name}", atol=5e-5)
            near(run(tree, left, left_mask).pooled, case.get(f"z_txt_{name}"), f"left-padded {name}", atol=5e-5)
        near(run(base["text"], prefix[None]).tokens[0], case.get("prefix_hidden_base"), "prefix", atol=5e-5)
        for shared in ((), tuple(prefix.tolist())):
            method = lexvla.build(NO_IMAGE, text, LexvlaOptions(entries=V, adapter_heads=1, prefix=shared))
            s_base = jax.jit(method.embed_text)(params, ids)
            s_lora = jax.jit(lora.wrap(method, options, lambda p: p).embed_text)(params, ids)
            near(s_base, case.get("s_txt_base"), f"s_txt_base, {len(shared)} shared", atol=1e-5)
            near(s_lora, case.get("s_txt_lora"), f"s_txt_lora, {len(shared)} shared", atol=1e-5)


def sibling(case: Case) -> Case:
    """The text tower that a step was computed with: in the same folder, of the name that belongs to it or else the only one."""
    named = case.path.with_name(case.path.name.replace("train_step", "text_tower"))
    if named != case.path and named.is_file():
        return Case(named)
    fits = [other for other in map(Case, sorted(case.path.parent.glob("*.npz"))) if "keep_ids" in other]
    assert len(fits) == 1, f"{case.path} needs the text tower of its folder, of which there are {len(fits)}"
    return fits[0]


class Step:
    """The method, its parameters and a batch of one file."""

    def __init__(self, case: Case):
        towers = sibling(case)
        text, base = decoder(towers)
        pixels = case["pixel_values"].transpose(0, 2, 3, 1)
        conv = case["dino:embeddings.patch_embeddings.projection.weight"]
        registers, depth = (
            int(case["num_register_tokens"]),
            1 + max(int(n.split(".")[2]) for n in case if n.startswith("dino:encoder.layer.")),
        )
        config = {"model_type": "dinov2_with_registers" if registers else "dinov2", "hidden_size": len(conv), "num_hidden_layers": depth, "num_attention_heads": 4,
                  "patch_size": conv.shape[2], "image_size": math.isqrt(case["dino:embeddings.position_embeddings"].shape[1] - 1) * conv.shape[2], "mlp_ratio": len(case["dino:encoder.layer.0.mlp.fc1.bias"]) // len(conv)}  # fmt: skip
        config |= {"num_register_tokens": registers} if registers else {}
        vit = imported(case, "dino:", config)
        vit = vit._replace(params=load.at_resolution(vit.model, vit.params, *pixels.shape[1:3]))
        image = vit.model.image._replace(dtype="float32", attention="xla")
        adapter, Z = adapter_params(case, "init:adapter:"), codebook(towers)
        made, V = adapter_options(adapter, 4), len(towers["keep_ids"])
        near(case["init:Z_img"], Z[:V], "Z_img starts as a copy")
        self.options = LexvlaOptions(entries=V, adapter=made.layout, adapter_heads=4, mlp1=made.mlp1, mlp2=made.mlp2, penalty_warmup=0,
                                     image_weight=float(case["lambda_I"]), text_weight=float(case["lambda_T"]))  # fmt: skip
        self.case, self.image, self.text, self.lora, self.V = case, image, text, lora_of(towers), V
        self.params = {"image": vit.params["image"], "adapter": adapter, "text": base["text"], "image_codebook": Z, "text_codebook": Z,
                       "t": case["init:log_scale"], "lora": adapters(towers, text.depth)}  # fmt: skip
        self.batch = {"image": pixels, "tokens": towers["input_ids"].astype(np.int32)}
        self.prefix = tuple(towers["prefix_ids"].tolist())

    def method(self, **options: Any) -> Method:
        return lora.wrap(lexvla.build(self.image, self.text, self.options._replace(**options)), self.lora, lambda p: p)


def train_step(case: Case) -> None:
    step = Step(case)
    method, memory = step.method(), {"step": np.int32(0)}
    lexical_vit = jax.jit(lambda p, b: method.features(p, b)["features"])
    with jax.default_matmul_precision("highest"):
        every, registers = case["dino_last_hidden"], int(case["num_register_tokens"])
        x = lexical_vit(step.params, step.batch)
        near(x, np.delete(every, np.s_[1 : 1 + registers], 1), "tokens", atol=2e-4, rtol=1e-4)
        near(
            jax.jit(lambda p, x: lexical.Adapter(adapter_options(p, 4)).apply({"params": p}, x))(step.params["adapter"], x),
            case["z_img"],
            "z_img",
            2e-4,
            2e-5,
        )

        for options in ({}, {"prefix": step.prefix}):
            f = jax.value_and_grad(step.method(**options).loss, has_aux=True)
            compare_step(
                case,
                step,
                jax.jit(lambda p, b, f=f: (f(p, memory, b, None), method.encode(p, b, None)))(step.params, step.batch),
                f"{options}",
            )
        for sizes in ((2, 1, 1), (4, 1, 1), (2, 2, 2)):
            if len(step.batch["image"]) % (sizes[0] * sizes[1]):
                continue
            mesh = make_mesh(MeshOptions(*sizes), jax.devices()[: np.prod(sizes)])
            try:
                place = shardings(step.params, method.rules, mesh)
            except ShardingError:  # sizes drawn at random need not divide
                whole = jax.NamedSharding(mesh, jax.P())
                place = jax.tree.map(lambda _, whole=whole: whole, step.params)
            with jax.set_mesh(mesh):
                f = jax.value_and_grad(method.loss, has_aux=True)
                args = jax.device_put(step.params, place), jax.device_put(step.batch, jax.NamedSharding(mesh, BATCH))
                compare_step(case, step, jax.jit(lambda p, b: (f(p, memory, b, None), method.encode(p, b, None)))(*args), f"mesh {sizes}")  # noqa: B023
        trajectory(case, step, method, memory)


def compare_step(case: Case, step: Step, got: Any, where: str) -> None:
    ((total, aux), grads), s = jax.tree.map(np.asarray, got)
    close = lambda value, name, rtol=5e-5, atol=5e-5: near(value, case.get(name), f"{name}, {where}", rtol, atol)
    V, case_scale = step.V, min(float(np.exp(case["init:log_scale"])), step.options.max_scale)
    close(total, "total")
    for side, short in (("image", "img"), ("text", "txt")):
        close(s[side][:, :V], f"s_{short}", 0, 1e-5)
        assert not s[side][:, V:].any()
        close(aux[f"{side}_overuse"], f"overuse_{short}", 1e-4)
        close(aux[f"{side}_flops"], f"flops_{short}", 1e-4)
    close(case_scale * s["image"] @ s["text"].T, "logits_per_image", 1e-4, 1e-4)
    for term, name in zip(losses.cross_entropies(s["image"], s["text"], case_scale), ("loss_i2t", "loss_t2i"), strict=True):
        close(term, name)
    if {"loss_i2t", "loss_t2i"} <= set(case):
        near(aux["loss_contrastive"], case["loss_i2t"] + case["loss_t2i"], where, 5e-5, 5e-5)

    keys = np.abs(case["grad:adapter:attn.k.kernel"]).max()

    def same(got: Any, want: Any, name: str) -> None:
        # A bias of the keys shifts all logits of a query alike: its gradient is what rounding leaves of those of the keys.
        most = keys if name.endswith("['k']['bias']") else 1e-3
        near(got, want, f"gradient of {name}, {where}", atol=1e-4 * max(np.abs(want).max(), most))

    for (path, want), leaf in zip(
        jax.tree_util.tree_leaves_with_path(adapter_params(case, "grad:adapter:")), jax.tree.leaves(grads["adapter"]), strict=True
    ):
        same(leaf, want, jax.tree_util.keystr(path))
    same(grads["image_codebook"][:V], case["grad:Z_img"], "Z_img")
    assert not grads["image_codebook"][V:].any()
    same(grads["t"], case["grad:log_scale"], "t")
    for (path, want), leaf in zip(
        jax.tree_util.tree_leaves_with_path(adapters(case, step.text.depth, "grad:")), jax.tree.leaves(grads["lora"]), strict=True
    ):
        same(leaf, want, jax.tree_util.keystr(path))
    assert not np.any(grads["text_codebook"])
    assert not any(map(np.any, jax.tree.leaves(grads["image"])))


def trajectory(case: Case, step: Step, method: Method, memory: dict) -> None:
    """`losses`, each before the step that follows it, under the optimiser that the recipe of the paper names."""
    groups = lora.groups(((r"^(adapter|image_codebook|t$)", 1.0),))
    tx = make_optimizer(
        OptimOptions(learning_rate=5e-4, schedule="constant", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=0.0, groups=groups),
        step.params,
        10,
    )

    def one(carry: tuple, _: None) -> tuple:
        params, state = carry
        (total, _), grads = jax.value_and_grad(method.loss, has_aux=True)(params, memory, step.batch, None)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), total

    run = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), None, length=len(case["losses"]))[1])
    near(run(jax.tree.map(jnp.asarray, step.params)), case.get("losses"), "losses", atol=2e-4)


CHECKS = {
    "text_tower": Check(has("input_ids", "attention_mask_left", "keep_ids", "z_txt_lora"), text_tower),
    "train_step": Check(has("pixel_values", "init:Z_img", "losses", "z_img"), train_step),
}
