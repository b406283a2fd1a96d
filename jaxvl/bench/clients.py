"""`jaxvl bench clients`: what the programs that open an exported folder make of files and strings, against what jaxvl makes of them.

Models of every shape that transformers has a class for, small and with random weights, are exported; each client then reads the
same files from disk and the same strings. The tables hold 1 - cos between its embedding and ours.
"""

import contextlib
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from jaxvl import assembly, config as configs
from jaxvl.bench.client_inputs import STRINGS, write_files
from jaxvl.checkpoint import Restored
from jaxvl.data.augment import preprocess
from jaxvl.data.dataset import decode_options
from jaxvl.data.decode import decode_eval
from jaxvl.data.text import TokenizerOptions, train_tokenizer
from jaxvl.interop import cards, export
from jaxvl.interop.cleaning import cleaned
from jaxvl.mesh import path_str
from jaxvl.terminal import tell

SIZE, LENGTH, WIDTH = 64, 64, 64  # pixels a side, tokens of a caption (what the zero-shot pipeline pads SigLIP's to), width of the towers
TOWER = dict(variant="", width=WIDTH, depth=2, heads=4, mlp_dim=2 * WIDTH, dtype="float32")
_BERT = dict(causal=False, pool="first", embed_norm=True, final_norm=False, post_norm=True, pooler=WIDTH, token_types=2, eps=1e-12)
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": dict(image=dict(patch=8, pre_norm=True, act="quick_gelu"), text=dict(act="quick_gelu")),
    "siglip": dict(
        method=dict(name="siglip"), image=dict(patch=8, pool="map", class_tokens=0), text=dict(causal=False, mask_padding=False, pool="end")
    ),
    "vit + bert": dict(image=dict(patch=8, pooler=WIDTH, eps=1e-12), text=_BERT),
    "dinov2 + bert": dict(image=dict(patch=8, registers=2, layer_scale=0.1), text=_BERT),
    "dinov2 (SwiGLU) + clip": dict(image=dict(patch=8, gated=True, act="silu", mlp_dim=176), text={}),
}
# (kind, client) by part of their names: where a client differs for reasons that no file can mend, each of them a line of the model card.
NAMED = (
    ("orientation", r"^Image\.open"),
    ("RGBA|alpha|transparent", "^path|pipeline"),
    ("BMP|TIFF|WebP, EXIF", "^path, torchvision"),
    ("16 bits", ""),
    ("special token", ""),
    ("longer than the context", "AutoTokenizer, padding=True|pipeline"),
)
Measured = dict[str, dict[tuple[str, str], float]]  # "image" and "text": 1 - cos of each (kind, client)
BACKENDS = ("pil", "torchvision")
UPRIGHT, OPENED, PATH = "exif_transpose(Image.open(path))", "Image.open(path)", "path"
READERS: dict[str, Callable[[Path], Any]] = {UPRIGHT: lambda path: ImageOps.exif_transpose(Image.open(path)), OPENED: Image.open, PATH: str}


class Exported(NamedTuple):
    """A run and the folder it was exported to. image, text: of the run, a file's path or a string to float64 [d] of unit norm."""

    parts: Any
    found: Restored
    folder: Path
    image: Callable[[Path], np.ndarray]
    text: Callable[[str], np.ndarray]


def main(config: str | None, overrides: Sequence[str], *, rounds: int) -> int:
    """Print Markdown tables; one round. Raises ValueError for a config, which nothing would read, and where torch is missing."""
    del rounds
    if config or overrides:
        raise ValueError("bench clients measures models of its own: it takes neither --config nor overrides")
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):  # exports print their folders
        files = write_files(Path(scratch), SIZE)
        found = {name: measure(exported(name, Path(scratch) / str(i)), files, STRINGS) for i, name in enumerate(FAMILIES)}
    tell(tables(found))
    return 0


def exported(family: str, folder: Path, **sections: Any) -> Exported:
    """A model of a family, see `made`, exported into `folder`."""
    parts, found = made(family, **sections)
    export.run(parts, found, "hf", folder)
    return Exported(parts, found, folder, *own_faces(parts, found.state))


def made(family: str, **sections: Any) -> tuple[assembly.Parts, Restored]:
    """A run of a family with random weights; sections: of its config, over what the family has."""
    captions = [text for text in STRINGS.values() if text.strip()]
    own = FAMILIES[family]
    plain = dict(method=own.get("method", dict(name="clip", width=32)), image={**TOWER, **own["image"]}, text={**TOWER, **own["text"]},
                 train=dict(batch_size=8, steps=2), tokenizer=dict(context_length=LENGTH), data=dict(source="glyphs://train?size=8", image_size=SIZE))  # fmt: skip
    plain = {key: {**plain.get(key, {}), **sections.get(key, {})} for key in plain.keys() | sections.keys()}
    recipe = configs.read(configs.complete(ConfigDict(plain)))
    tokenizer = train_tokenizer(captions, TokenizerOptions(vocab_size=512, context_length=recipe.tokenizer.context_length))
    parts = assembly.assemble(recipe, tokenizer)
    shapes, _ = jax.eval_shape(lambda: parts.method.init(jax.random.key(0), parts.spec))
    rng = np.random.default_rng(1)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _drawn(rng, path_str(path), leaf), shapes)
    return parts, Restored(7, params, {})


def _drawn(rng: np.random.Generator, path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Weights under which different inputs give different embeddings: kernels that keep the variance, scales about one, the rest about zero."""
    gain = WIDTH**-0.5 if path.endswith("kernel") else 0.1
    return np.asarray(path.endswith("scale") + gain * rng.standard_normal(leaf.shape), leaf.dtype)


def own_faces(parts: Any, params: Any) -> tuple[Callable[[Path], np.ndarray], Callable[[str], np.ndarray]]:
    """What jaxvl makes of a file and of a string, as its evaluation and its search do."""
    recipe, how = parts.recipe, cards.cleaning(parts.recipe)
    embed_image, embed_text = (jax.jit(functools.partial(face, params)) for face in (parts.method.embed_image, parts.method.embed_text))

    def image(path: Path) -> np.ndarray:
        pixels = decode_eval(path.read_bytes(), decode_options(recipe.data))
        return unit(embed_image(preprocess(jnp.asarray(pixels[None]), None, recipe.augment)))[0]

    return image, lambda text: unit(embed_text(parts.tokenizer.encode_batch(cleaned([text], how))))[0]


def measure(run: Exported, files: dict[str, Path], strings: dict[str, str]) -> Measured:
    """Every client on every file and string; NaN where it refuses one."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError("torch is not installed, without which transformers opens no model: pip install '.[torch-tests]'") from None
    torch.set_num_threads(1)  # more of them wait for one another longer than these models take
    folder = str(run.folder)
    classify = transformers.pipeline("zero-shot-image-classification", model=folder)
    model: Any = classify.model
    seen: dict[str, Any] = {}
    model.register_forward_hook(lambda module, inputs, out: seen.update(image=out.image_embeds, text=out.text_embeds))

    def embedding(what: str, inputs: Any) -> np.ndarray:
        with torch.no_grad():
            return unit(getattr(model, f"get_{what}_features")(**inputs).pooler_output)[0]

    def classified(what: str, image: Any, label: str) -> np.ndarray:
        classify(image, candidate_labels=[label], hypothesis_template="{}")
        return unit(seen[what])[0]

    processors = {
        backend: transformers.AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=False) for backend in BACKENDS
    }
    processor, tokenizer = (
        auto.from_pretrained(folder, trust_remote_code=False) for auto in (transformers.AutoProcessor, transformers.AutoTokenizer)
    )
    siglip = type(model).__name__ == "SiglipModel"
    whole = dict(padding="max_length" if siglip else True, truncation=True, max_length=run.parts.tokenizer.context_length)
    image_clients = {
        f"{how}, {backend}": lambda path, how=how, own=own: embedding("image", own(READERS[how](path), return_tensors="pt"))
        for how in READERS
        for backend, own in processors.items()
    } | {f"{how}, pipeline": lambda path, how=how: classified("image", READERS[how](path), "a label") for how in (UPRIGHT, PATH)}
    some = str(next(iter(files.values())))
    text_clients = {
        "AutoProcessor": lambda text: embedding("text", processor(text=[text], return_tensors="pt")),
        "AutoProcessor, padding=True": lambda text: embedding("text", processor(text=[text], padding=True, return_tensors="pt")),
        "AutoTokenizer as in the card": lambda text: embedding("text", tokenizer([text], return_tensors="pt", **whole)),
        "AutoTokenizer, padding=True": lambda text: embedding("text", tokenizer([text], padding=True, return_tensors="pt")),
        "pipeline": lambda text: classified("text", some, text),
    }
    return {
        "image": {(kind, name): attempt(client, path, ours) for kind, path, ours in ((k, p, run.image(p)) for k, p in files.items()) for name, client in image_clients.items()},
        "text": {(kind, name): attempt(client, text, ours) for kind, text, ours in ((k, t, run.text(t)) for k, t in strings.items()) for name, client in text_clients.items()},
    }  # fmt: skip


def named(kind: str, client: str, family: str) -> bool:
    """Whether the model card says that this client differs."""
    return any(re.search(a, kind) and re.search(b, client) for a, b in NAMED) or (family == "siglip" and "padding=True" in client)


def attempt(client: Callable[[Any], np.ndarray], given: Any, ours: np.ndarray) -> float:
    """1 - cos of the client's and our vector of unit norm, NaN where the client refuses what it is given."""
    try:
        return float(0.5 * np.sum((client(given) - ours) ** 2))  # which keeps what 1 - cos would round away
    except (OSError, ValueError, RuntimeError, IndexError):
        return float("nan")


def unit(vectors: Any) -> np.ndarray:
    """float64 [n, d] of unit norm."""
    out = np.asarray(vectors, np.float64)
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def tables(found: dict[str, Measured]) -> str:
    """Markdown, for files and for strings: a row a kind, by client over the families, and by family over the clients that are not NAMED."""
    out = []
    for what, title in (("image", "Files"), ("text", "Strings")):
        by_family = {family: parts[what] for family, parts in found.items()}
        kinds, clients = (list(dict.fromkeys(key[i] for key in next(iter(by_family.values())))) for i in (0, 1))
        by_client = {(k, c): {f: by_family[f][k, c] for f in by_family} for k in kinds for c in clients}
        agreeing = {
            (k, f): {c: by_family[f][k, c] for c in clients if not named(k, c, f)} for k in kinds for f in by_family
        }  # fmt: skip
        out += [f"## {title}, by client", "", *table(by_client), f"## {title}, by family, without what is named", "", *table(agreeing)]
    return "\n".join(out)


def table(values: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """The lines of a table whose cells are by (row, column)."""
    rows, columns = (list(dict.fromkeys(key[i] for key in values)) for i in (0, 1))
    lines = [f"| {row} | " + " | ".join(cell(values[row, column]) for column in columns) + " |" for row in rows]
    return ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|", *lines, ""]


def cell(by_name: dict[str, float]) -> str:
    """The largest value, with the smallest and whose the largest is where they are far apart; NaN is what is refused."""
    values = {name: value for name, value in by_name.items() if not np.isnan(value)}
    if not values:
        return "refused" if by_name else "named"
    low, high, whose = min(values.values()), max(values.values()), max(values, key=lambda name: values[name])
    shown = f"{high:.0e}" if high < max(1e-6, 1e3 * low) else f"{low:.0e} to {high:.0e} ({whose})"
    return shown if len(values) == len(by_name) else f"{shown}, else refused"
