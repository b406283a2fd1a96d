"""Transformer blocks written out slowly in numpy: one sequence, one head, one row at a time."""

import functools
import math

import jax
import numpy as np

# Tests compile more than they compute: without LLVM's optimisations that takes half as long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

ACT = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def norm(o, p, x):
    if o.norm == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + o.eps) * p["scale"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + o.eps) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attention(o, p, x, context=None, allowed=None, angles=None):
    """x [query, width]; allowed(q, k) -> bool; angles [token, head_width / 2]."""
    source = x if context is None else context
    q, k, v = linear(p["q"], x), linear(p["k"], source), linear(p["v"], source)
    width, group = o.head_width, o.heads // o.key_heads
    out = np.zeros_like(q)
    for h in range(o.heads):
        mine, theirs = slice(h * width, (h + 1) * width), slice(h // group * width, (h // group + 1) * width)
        qh, kh, vh = q[:, mine], k[:, theirs], v[:, theirs]
        if angles is not None:
            qh, kh = turn(qh, angles), turn(kh, angles)
        for i in range(len(x)):
            seen = [j for j in range(len(source)) if allowed is None or allowed(i, j)]
            score = np.exp([qh[i] @ kh[j] / math.sqrt(width) for j in seen])
            out[i, mine] = sum(s * vh[j] for s, j in zip(score / score.sum(), seen, strict=True))
    return linear(p["out"], out)


def turn(x, angles):
    """Each pair (i, i + half) of channels as a complex number times e^(i angle)."""
    half = x.shape[-1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def mlp(o, p, x):
    y = ACT[o.act](linear(p["gate"], x)) * linear(p["up"], x) if o.gated else ACT[o.act](linear(p["up"], x))
    return linear(p["down"], y)


def block(o, p, x, context=None, allowed=None, angles=None):
    branches = {
        "attn": lambda y: attention(o, p["attn"], y, None, allowed, angles),
        "cross": lambda y: attention(o, p["cross"], y, context),
        "mlp": lambda y: mlp(o, p["mlp"], y),
    }
    for name, branch in branches.items():
        if name == "cross" and not o.cross:
            continue
        scale = p.get(f"{name}_scale", 1.0)
        if o.post_norm:
            x = norm(o, p[f"{name}_norm"], x + scale * branch(x))
        else:
            x = x + scale * branch(norm(o, p[f"{name}_norm"], x))
    return x


def draw(model, *inputs, seed=0):
    """Parameters of a module drawn in numpy, none of them 0 or 1, without compiling its initialisation."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape) + 0.1).astype(leaf.dtype), shapes)


def run(model, params, *inputs, rngs=None, **options):
    """model.apply under jit: one compilation instead of one per operation."""
    return jit(lambda p, r, *x: model.apply({"params": p}, *x, rngs=r, **options))(params, rngs or {}, *inputs)
