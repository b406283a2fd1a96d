"""`jaxvl bench rerank`: FLOPs of one re-ranked pair, with an image's keys and values kept and without.

By count of matrix products, and by XLA's own count of the same programs with their layers unrolled, since it takes a loop's body once.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxvl import config as configs
from jaxvl.bench.sizes import tokenizer
from jaxvl.evals.rerank import RerankOptions, pair_costs
from jaxvl.parts import assemble
from jaxvl.terminal import tell

PAIRS = 4  # in the programs that XLA counts
TEXTS = 5  # captions of an image in COCO and Flickr30K, each of which asks for k_test images


def main(path: str | None, overrides: list[str], rounds: int) -> int:
    """Prints the JSON. Raises ValueError for a config without an evaluation of kind rerank."""
    del rounds  # nothing is timed
    if not path:
        raise ValueError("bench rerank measures a recipe's own evaluation: give --config, such as configs/retrieval_coco_ft.py")
    recipe = configs.read(configs.load(path, overrides))
    chosen = next(((name, o) for name, o in recipe.evals.items() if isinstance(o, RerankOptions)), None)
    if chosen is None:
        raise ValueError(f"--config={path} has no evaluation of kind rerank")
    tell(json.dumps({"config": path, "eval": chosen[0], **measure(recipe, chosen[1])}, indent=2))
    return 0


def measure(recipe: configs.Recipe, options: RerankOptions) -> dict[str, Any]:
    """GFLOPs a pair of the recipe's method at its image size and caption length: counted, by XLA, and their ratios."""
    unrolled = recipe._replace(
        image=recipe.image._replace(scan=False, attention="xla"), text=recipe.text._replace(scan=False, attention="xla")
    )
    parts = assemble(unrolled, tokenizer(recipe))
    face, side, length = parts.method.score_pair, recipe.data.image_size, recipe.tokenizer.context_length
    assert face is not None  # `assemble` has seen to it
    params, _ = jax.eval_shape(lambda: parts.method.init(jax.random.key(0), parts.spec))
    images = jax.ShapeDtypeStruct((PAIRS, side, side, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((PAIRS, length), jnp.int32)
    kept = jax.eval_shape(face.image_side, params, images)
    words = jax.eval_shape(face.text_side, params, tokens)
    source = jax.ShapeDtypeStruct((1, PAIRS), jnp.int32)

    pair = _count(face.score, params, kept, words, source)
    image, text = _count(face.image_side, params, images), _count(face.text_side, params, tokens)
    counted = face.flops(side, side, length)
    asked = options.k_test * (1 + TEXTS)
    ours, keys_values, both = pair_costs(counted, asked)
    tower = _count(parts.method.embed_image, params, images)
    xla = {"pair": pair, "keys_values": image - tower, "image_tower": tower, "text_tower": text}
    by_xla = pair_costs(xla, asked)
    giga = lambda x: round(x / 1e9, 4)
    return {
        "image_size": side, "tokens": length, "k_test": options.k_test, "pairs_an_image": asked,
        "gflops_a_pair": {"kept": giga(ours), "keys_values_again": giga(keys_values), "towers_again": giga(both)},
        "gflops_a_pair_by_xla": dict(zip(("kept", "keys_values_again", "towers_again"), map(giga, by_xla), strict=True)),
        "keys_values_again_over_kept": {"counted": round(keys_values / ours, 2), "by_xla": round(by_xla[1] / by_xla[0], 2)},
        "towers_again_over_kept": {"counted": round(both / ours, 2), "by_xla": round(by_xla[2] / by_xla[0], 2)},
        "parts_gflops": {k: giga(v) for k, v in counted.items()},
    }  # fmt: skip


def _count(f: Callable, *args: Any) -> float:
    """XLA's FLOPs of a program for one pair; not compiled."""
    analysis: Any = jax.jit(f).lower(*args).cost_analysis()
    return analysis["flops"] / PAIRS
