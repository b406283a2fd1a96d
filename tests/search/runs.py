"""Runs of two-layer towers with random parameters, saved as a training saves them, and pictures to index."""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from jaxvl import assembly, checkpoint, config as configs
from jaxvl.data import lexicon
from jaxvl.data.text import TokenizerOptions, train_tokenizer

WORDS = ["red", "green", "blue", "circle", "square", "dog", "cat", "tree", "over", "under"]
CAPTIONS = [f"a {x} {y}" for x in WORDS[:3] for y in WORDS[3:8]] + ["over the tree", "under a dog"]
SIZES = dict(variant="", width=16, depth=1, heads=2, mlp_dim=32, dtype="float32")
LEXVLA = dict(
    method=dict(name="lexvla", adapter_heads=2, mlp1=16, mlp2=16, frozen_image=False), image={**SIZES, "patch": 8}, text={**SIZES, "pool": "last"},
    tokenizer=dict(name="words", vocab_size=512, context_length=24, end=False, prompt='the focus of "{}" lies on', lexicon="ascii_lower_len2"),
    optim=dict(groups=(("^text_codebook$", 0.0),)),
)  # fmt: skip
CLIP = dict(
    method=dict(name="clip", width=8),
    image={**SIZES, "patch": 8},
    text=SIZES,
    tokenizer=dict(name="words", vocab_size=512, context_length=8),
)


def make_run(workdir: Path, sections: dict, seed: int = 0) -> Path:
    """A run at step 3."""
    config = configs.complete(
        ConfigDict(
            {
                **sections,
                "train": dict(batch_size=8, steps=3),
                "data": dict(source="glyphs://train?size=8", image_size=16, workers=0, threads=1),
            }
        )
    )
    recipe = configs.read(config)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2))
    tokenizer = train_tokenizer(CAPTIONS, TokenizerOptions(**recipe.tokenizer._asdict()))
    tokenizer.save(workdir / "tokenizer")
    parts = assembly.build(recipe, workdir, None)
    params, memory = jax.eval_shape(lambda: parts.method.init(jax.random.key(0), parts.spec))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda p: np.asarray(0.5 * rng.standard_normal(p.shape), p.dtype), params)
    memory = jax.tree.map(lambda m: np.zeros(m.shape, m.dtype), memory)
    with checkpoint.open_saver(workdir / "checkpoints", recipe.checkpoint) as saver:
        saver.save(3, {"params": params, "memory": memory}, lexicon.stamp(tokenizer), block=True)
    return workdir


def make_pictures(folder: Path, count: int) -> Path:
    """Noise as PNG files, one below another folder, one broken, and a file that is no image."""
    rng = np.random.default_rng(2)
    (folder / "deeper").mkdir(parents=True)
    for i in range(count):
        path = folder / ("deeper" if i == 1 else "") / f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(path)
    (folder / "99.png").write_bytes(b"\x89PNG not really")
    (folder / "notes.md").write_text("nothing to see")
    return folder


def answer(text: str) -> dict:
    """The JSON that `jaxvl search query --json` printed."""
    return json.loads(text)
