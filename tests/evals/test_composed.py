"""Composed retrieval against brute force: several targets, the reference left out, categories, protocols, text and image both ways."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvl import evals
from jaxvl.data import decode
from jaxvl.data.augment import AugmentOptions, preprocess
from jaxvl.data.dataset import DataOptions, decode_options, open_data, read_samples
from jaxvl.data.source import Want
from jaxvl.evals import composed
from jaxvl.evals.composed import ComposedOptions
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.method import unit

SOURCE = "glyphs://val?size=60"
DATA = DataOptions(source=SOURCE, image_size=16, threads=1, workers=0)


def encode(texts):
    out = np.zeros((len(texts), 8), np.int32)
    for row, text in zip(out, texts, strict=True):
        letters = [ord(c) for c in text][-8:]
        row[: len(letters)] = letters
    return out


MIX = 0.02 * jax.random.normal(jax.random.key(0), (16 * 16 * 3, 6))
WORDS = jax.random.normal(jax.random.key(1), (8, 6))
IMAGE = lambda params, images: unit(jnp.tanh(images.reshape(len(images), -1) @ MIX))
TEXT = lambda params, tokens: unit(tokens.astype(jnp.float32) @ WORDS)


class Faces(NamedTuple):
    """The part of a method that evaluations use."""

    embed_image: Any = IMAGE
    embed_text: Any = TEXT
    compose: Any = lambda params, images, tokens: unit(IMAGE(params, images) + 0.5 * TEXT(params, tokens))


METHOD = Faces()
TOKENS = SimpleNamespace(context_length=8, encode_batch=encode)


def run(**options):
    mesh = make_mesh(MeshOptions())
    with jax.set_mesh(mesh):
        return evals.run({"val": ComposedOptions(source=SOURCE, batch_size=24, **options)}, METHOD, {}, TOKENS, DATA, AugmentOptions())


@pytest.fixture(scope="module")
def world():
    """Keys, captions and embeddings of the gallery, and the listed triplets."""
    dataset = open_data(DATA)
    records = list(read_samples(dataset, np.arange(len(dataset)), Want()))
    pixels = np.stack([decode.decode_eval(r.image, decode_options(DATA)) for r in records])
    images = np.asarray(IMAGE({}, preprocess(jnp.asarray(pixels), None, AugmentOptions())))
    path = composed.files(ComposedOptions(source=SOURCE), dataset)[0]
    return (
        [r.key for r in records],
        [r.captions[0] for r in records],
        images,
        [json.loads(line) for line in Path(path).read_text().splitlines()],
    )


def brute(world, lines, gallery, ks, same_caption=False, exclude=True, merged=False):
    """R@K for each kind of query, one query at a time: each line's, or merged those of equal reference and text."""
    keys, captions, images, _ = world
    questions = {}
    for n, t in enumerate(lines):
        questions.setdefault((t["reference"], t["modification"], 0 if merged else n), set()).add(t["target"])
    hits = {what: [] for what in ("composed", "image", "text", "sum")}
    for (reference, text, _), targets in questions.items():
        v, s = images[keys.index(reference)], np.asarray(TEXT({}, encode([text])))[0]
        for what, q in {"composed": v + 0.5 * s, "image": v, "text": s, "sum": v + s}.items():
            items = [i for i in gallery if not exclude or keys[i] != reference]
            order = sorted(items, key=lambda i, q=q: -images[i] @ q)
            right = {captions[keys.index(t)] for t in targets}
            rank = next((n for n, i in enumerate(order) if keys[i] in targets or (same_caption and captions[i] in right)), None)
            if rank is not None:
                hits[what].append(rank)
    return {f"{what}/r@{k}": np.mean([r < k for r in ranks]) for what, ranks in hits.items() for k in ks}


def test_numbers_are_those_of_brute_force(world, tmp_path):
    keys, captions, images, lines = world
    several = [{**t, "target": keys[7 * i % 60]} for i, t in enumerate(lines[:30]) if keys[7 * i % 60] != t["reference"]]
    path = tmp_path / "val-triplets.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, *several])))
    values, shown = run(show=3, triplets=str(path))
    merged, _ = run(show=0, triplets=str(path), queries="merged")
    want = brute(world, [*lines, *several], range(60), (1, 5, 10))
    either = brute(world, [*lines, *several], range(60), (1, 5, 10), merged=True)
    assert want != either
    for name, value in want.items():
        assert values[f"val/{name}"] == pytest.approx(value, abs=1e-6), name
        assert merged[f"val/original,joined,merged/{name}"] == pytest.approx(either[name], abs=1e-6), name
    assert (values["val/queries"], values["val/gallery"]) == (len(lines) + len(several), 60) and merged["val/queries"] == len(lines)
    scores = np.asarray(TEXT({}, encode(list(dict.fromkeys(captions))))) @ images.T
    right = np.array([[a == b for b in captions] for a in dict.fromkeys(captions)])
    first = [min(list(np.argsort(-row)).index(j) for j in np.flatnonzero(r)) for row, r in zip(scores, right, strict=True)]
    assert values["val/t2i/r@5"] == pytest.approx(np.mean(np.array(first) < 5))
    (gallery,) = shown
    assert len(gallery.queries) == 3 and all(isinstance(h.item, bytes) for q in gallery.queries for h in q.hits)
    with_reference = run(show=0, exclude_reference=False)[0]
    assert with_reference["val/image/r@1"] == 0, "with the reference in the gallery an image finds itself first"


def test_protocols_and_categories(world, tmp_path):
    keys, _, _, lines = world
    half = [{**t, "category": "one" if i % 2 else "two", "modification": [t["modification"], "and more"]} for i, t in enumerate(lines[:20])]
    path = tmp_path / "val-triplets.jsonl"
    path.write_text("\n".join(map(json.dumps, [*half, {"reference": "gone", "target": keys[0], "modification": "x"}])))
    values, _ = run(show=0, triplets=str(path), gallery="val", texts="single", ks=(1, 10))
    for category in ("one", "two"):
        mine = [t for t in half if t["category"] == category]
        used = sorted({keys.index(t[k]) for t in mine for k in ("reference", "target")})
        single = [{**t, "modification": m} for t in mine for m in t["modification"]]
        for name, value in brute(world, single, used, (1, 10)).items():
            assert values[f"val/val,single/{category}/{name}"] == pytest.approx(value, abs=1e-6), (category, name)
    assert values["val/val,single/composed/r@10"] == pytest.approx(
        np.mean([values[f"val/val,single/{c}/composed/r@10"] for c in ("one", "two")])
    )
    assert values["val/missing"] == 1
    assert values["val/val,single/one/queries"] == 2 * len([t for t in half if t["category"] == "one"])
    joined = [{**t, "modification": " <and> ".join(t["modification"])} for t in half]
    values, _ = run(show=0, triplets=str(path), gallery="val", ks=(1,))
    mine = [t for t in joined if t["category"] == "one"]
    used = sorted({keys.index(t[k]) for t in mine for k in ("reference", "target")})
    assert values["val/val,joined/one/composed/r@1"] == pytest.approx(brute(world, mine, used, (1,))["composed/r@1"])


def test_equal_captions_are_equally_right(world):
    values, _ = run(show=0, right="caption", ks=(2,))
    for name, value in brute(world, world[3], range(60), (2,), same_caption=True).items():
        assert values[f"val/{name}"] == pytest.approx(value, abs=1e-6), name


def test_what_cannot_be_is_said_before_training():
    for options, message in (
        (dict(triplets="siblings"), "queries are fixed"), (dict(texts="joined_random"), "is for training"), (dict(queries="all"), "queries is 'all'"), (dict(ks=()), "ks is"),
        (dict(triplets="/nowhere.jsonl"), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evals.check({"val": ComposedOptions(source=SOURCE, **options)}, DATA)
    with pytest.raises(ValueError, match="needs a method with compose; clip has none"):
        evals.suits({"val": ComposedOptions()}, "clip", SimpleNamespace(compose=None))
