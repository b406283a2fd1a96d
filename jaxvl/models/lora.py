r"""LoRA: Hu et al., Low-Rank Adaptation of Large Language Models, ICLR 2022, https://arxiv.org/abs/2106.09685.

A linear map W_0 that is frozen and a trained low-rank change of it (section 4.1, equation 3, in our orientation):

.. math::
    h = x W_0 + s \, (x A) B, \qquad s = \alpha / r \quad \text{or, rank-stabilised,} \quad s = \alpha / \sqrt r

with A [in, r] random and B [r, out] zero at first (rank-stabilised: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
Adapters are a subtree "lora" of the parameters, {"a", "b"} below the path of the kernel they change; a kernel's leading layer
axis is theirs too. `wrap` adds them to any method whose maps are Linen `Dense` modules; nothing in a model knows of them.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxvl.patterns import check_pattern

Rules = tuple[tuple[str, P], ...]
FACES = ("encode", "objective", "loss", "embed_image", "embed_text", "embed_patches", "embed_words", "compose", "features")
PAIR_FACES = ("image_side", "text_side", "score")  # of `score_pair`
A, B = "lora_a", "lora_b"  # the adapters' names beside the kernel, where a module looks for them


class LoraOptions(NamedTuple):
    """rank: of the change, 0 turns adapters off. targets: pattern of the kernels that get one, searched in their paths.

    alpha, rslora: scale, alpha / rank or alpha / sqrt(rank). dropout: of the adapters' input, in training. apply: "separate" multiplies
    by A and B in turn; "merged" adds their product to the kernel once a step, which takes no dropout and is cheaper where a
    step's tokens are many times the width, for the memory of one more kernel. base_dtype: storage of the frozen matrices.
    """

    rank: int = 0
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    targets: str = r"blocks/attn/[qv]/kernel$"
    apply: Literal["separate", "merged"] = "separate"
    base_dtype: Literal["bfloat16", "float32"] = "bfloat16"


def check(options: LoraOptions) -> None:
    """Raises ValueError naming the key, its value and what would be right."""
    if options.rank < 0:
        raise ValueError(f"config.lora.rank is {options.rank}; it must be positive, or 0 for no adapters")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"config.lora.dropout is {options.dropout}; it must be in [0, 1)")
    if options.dropout and options.apply == "merged":
        raise ValueError(
            f"config.lora.dropout is {options.dropout}, which acts on the input of an adapter; config.lora.apply must be 'separate'"
        )
    check_pattern("lora.targets", options.targets)


def scale(options: LoraOptions) -> float:
    """s of the equation."""
    return options.alpha / (options.rank**0.5 if options.rslora else options.rank)


def groups(given: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Learning-rate groups that train the adapters and what `given` names, and freeze everything else."""
    return (*given, (r"^lora/", 1.0), (r"", 0.0))


def wrap(method: Any, options: LoraOptions, frozen: Callable[[Any], Any]) -> Any:
    """`method` with adapters; the method itself where the rank is 0.

    frozen: params -> whether each leaf stands still (True), as `optim.frozen` says; matrices that do are stored in `base_dtype`.
    A teacher or any other memory that a method makes of its parameters sees the merged ones. Raises ValueError for options that
    cannot be and, in `init`, for targets that match no kernel.
    """
    check(options)
    if not options.rank:
        return method

    def init(key: jax.Array, batch_spec: dict) -> tuple[dict, Any]:
        params, memory = method.init(key, batch_spec)
        whole = {**params, "lora": start(jax.random.fold_in(key, 1), params, options)}
        store = lambda path, p, still: p.astype(options.base_dtype) if still is True and path[-1].key in ("kernel", "embed") else p
        return jax.tree_util.tree_map_with_path(store, whole, frozen(whole)), memory

    def adapted(face: Callable) -> Callable:
        def with_adapters(params: dict, *args: Any) -> Any:
            if options.apply == "merged":
                return face(merge(params, options), *args)
            with nn.intercept_methods(_low_rank(options)):
                return face(_beside(params), *args)

        return with_adapters

    faces = {name: adapted(getattr(method, name)) for name in FACES if getattr(method, name) is not None}
    if method.score_pair is not None:
        faces["score_pair"] = method.score_pair._replace(**{name: adapted(getattr(method.score_pair, name)) for name in PAIR_FACES})
    update = lambda memory, params, aux: method.update(memory, merge(params, options), aux)
    return method._replace(init=init, update=update, rules=(*rules(method.rules), *method.rules), **faces)


def start(key: jax.Array, params: dict, options: LoraOptions) -> dict:
    """Adapters float32 of every kernel that is a target: A uniform in ±1/√in, B zero. Raises ValueError where none is."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    out = {}
    for path in [path for path in flat if path.endswith("kernel") and re.search(options.targets, path)]:
        *front, wide = flat[path].shape
        layers = front[:1] if "blocks/" in path else []
        bound = float(np.prod(front[len(layers) :])) ** -0.5
        key, one = jax.random.split(key)
        out[path + "/a"] = jax.random.uniform(one, (*front, options.rank), jnp.float32, -bound, bound)
        out[path + "/b"] = jnp.zeros((*layers, options.rank, wide), jnp.float32)
    if not out:
        kernels = ", ".join(path for path in flat if path.endswith("kernel"))
        raise ValueError(f"config.lora.targets: {options.targets!r} matches no kernel; there are {kernels}")
    return flax.traverse_util.unflatten_dict(out, sep="/")


def merge(params: dict, options: LoraOptions) -> dict:
    """Plain parameters, W_0 + s A B computed in float32, that need no adapters any more."""
    flat = flax.traverse_util.flatten_dict({k: v for k, v in params.items() if k != "lora"}, sep="/")
    for path, a, b in _pairs(params):
        flat[path] = flat[path].astype(jnp.float32) + scale(options) * jnp.matmul(a, b, precision="highest")
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def rules(base: Rules) -> Rules:
    """Where adapters live: A is split like the kernel's input, B like its output, the rank not at all."""
    out = []
    for pattern, spec in base:
        if pattern.endswith("kernel$") and len(spec) > 1:
            layers = (None,) * (len(spec) - 2 if len(spec) < 4 else 0)
            out += [(pattern[:-1] + "/a$", P(*spec[:-1], None)), (pattern[:-1] + "/b$", P(*layers, None, spec[-1]))]
    return tuple(out)


def _pairs(params: dict) -> list[tuple[str, jax.Array, jax.Array]]:
    flat = flax.traverse_util.flatten_dict(params["lora"], sep="/")
    return [(path.removesuffix("/a"), a, flat[path.removesuffix("a") + "b"]) for path, a in flat.items() if path.endswith("/a")]


def _beside(params: dict) -> dict:
    """The parameters with each adapter next to its kernel, where the scan over layers slices it with the rest."""
    flat = flax.traverse_util.flatten_dict({k: v for k, v in params.items() if k != "lora"}, sep="/")
    for path, a, b in _pairs(params):
        module = path.removesuffix("kernel")
        flat |= {module + A: a, module + B: b}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _low_rank(options: LoraOptions) -> Callable:
    """What `Dense` modules do besides their own product, where they have an adapter."""

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, y = context.module, call(*args, **kwargs)
        dense = isinstance(module, (nn.Dense, nn.DenseGeneral)) and context.method_name == "__call__"
        if not dense or not module.has_variable("params", A):
            return y
        a, b = (module.get_variable("params", name).astype(y.dtype) for name in (A, B))
        x = args[0].astype(y.dtype)
        if options.dropout and module.has_rng("dropout"):
            kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - options.dropout, x.shape)
            x = jnp.where(kept, x / (1 - options.dropout), 0)
        inputs = a.ndim - 1
        axes = getattr(module, "axis", -1)
        low = jnp.tensordot(x, a, (axes if isinstance(axes, tuple) else (axes,), tuple(range(inputs))))
        return y + scale(options) * low @ b

    return interceptor
