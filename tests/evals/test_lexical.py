"""Sparse retrieval, the use of words and PatchDis, with a model whose vectors are known, against loops that count."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxvl import evals
from jaxvl.data.augment import AugmentOptions
from jaxvl.data.lexicon import Lexicon, Prompt
from jaxvl.data.stream import DataOptions
from jaxvl.evals import patchdis, patches, words
from jaxvl.evals.embed import Model
from jaxvl.evals.explain import explain
from jaxvl.evals.lexical import LexicalOptions
from jaxvl.evals.patches import PatchdisOptions
from jaxvl.gallery import Table
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.method import Method
from jaxvl.report.words import heat, write_words

V, SIDE = 6, 8
NAMES = ("red", "green", "blue", "dark", "light", "never")
PREFIX, TAIL = (9, 1), 1  # a prompt in which the word "red" stands, which is no shared id


class Words:
    """Captions of NAMES between the ends of a prompt."""

    context_length, vocab_size = 8, 12
    lexicon = Lexicon(np.arange(1, V + 1, dtype=np.int32), NAMES, {})
    prompt = Prompt("", PREFIX[:1], TAIL, len(PREFIX))

    def encode_batch(self, captions):
        rows = [[*PREFIX, *(NAMES.index(w) + 1 if w in NAMES else 11 for w in caption.split()), 10] for caption in captions]
        return np.array([row + [0] * (8 - len(row)) for row in rows], np.int32)


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def method():
    """Image, patch and text: their colours as weights of the first three words, and a little of "dark" everywhere."""
    nothing = lambda *_: None
    base = jnp.array([0, 0, 0, 0.1, 0.01, 0.0])
    lift = lambda colours: unit(jnp.pad(colours, [(0, 0)] * (colours.ndim - 1) + [(0, V - 3)]) + base)
    embed_text = lambda params, tokens: unit((tokens[:, len(PREFIX) :, None] == jnp.arange(1, V + 1)).sum(1) + base) * params
    blocks = lambda images: images.reshape(len(images), 2, SIDE // 2, 2, SIDE // 2, 3).mean((2, 4))
    return Method(
        nothing, nothing, nothing, nothing, nothing, lambda params, images: lift(images.mean((1, 2))) * params, embed_text, nothing, ((".*", P()),),
        embed_patches=lambda params, images: lift(blocks(images)) * params, embed_words=lambda params, columns: unit(jax.nn.one_hot(columns, V) + base),
    )  # fmt: skip


def run(entries, mesh=MeshOptions(), tokenizer=None, **data):
    augment = AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: np.prod(mesh)])):
        return evals.run(
            entries, method(), jnp.float32(1), tokenizer or Words(), DataOptions(image_size=SIDE, threads=1, workers=0, **data), augment
        )


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "red green": (255, 200, 0), "never blue": (40, 0, 255)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tar of one picture a caption; and a picture with annotations of its four corners."""
    import io
    import tarfile

    at = tmp_path_factory.mktemp("lexical")
    with tarfile.open(at / "val-0.tar", "w") as tar:
        for i, (caption, colour) in enumerate(COLOURS.items()):
            out = io.BytesIO()
            Image.new("RGB", (SIDE, SIDE), colour).save(out, "PNG")
            for suffix, body in ("png", out.getvalue()), ("txt", caption.encode()):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    big = np.zeros((16, 32, 3), np.uint8)
    big[:8, :16], big[:8, 16:], big[8:, :16] = (255, 0, 0), (0, 255, 0), (255, 0, 0)
    big[8:, 16:] = (0, 0, 255)
    Image.fromarray(big).save(at / "corners.png")
    box = lambda x, y, w, h: [[x, y, x + w, y, x + w, y + h, x, y + h]]
    marks = [
        (1, box(0, 0, 16, 8)),
        (2, box(16, 0, 16, 8)),
        (3, box(0, 8, 16, 8)),
        (3, box(16, 8, 16, 4)),
    ]  # the third is red, and half of the last void
    body = {
        "images": [{"id": 1, "file_name": "corners.png", "height": 16, "width": 32}], "categories": [{"id": i + 1, "name": NAMES[i]} for i in range(3)] + [{"id": 9, "name": "dark"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": c, "area": 9 - i, "segmentation": s} for i, (c, s) in enumerate(marks)],
    }  # fmt: skip
    (at / "instances.json").write_text(json.dumps(body))
    return at


@pytest.mark.parametrize("mesh", [MeshOptions(), MeshOptions(2, 2, 1)], ids=str)
def test_lexical(folder, mesh):
    entry = LexicalOptions(source=str(folder / "val-0.tar"), ks=(1, 2), top=(1, 3, 99), words=2, batch_size=3, show=2)
    numbers, shown = run({"val": entry}, mesh)
    colours = np.array([[c / 255 for c in rgb] + [0.1, 0.01, 0] for rgb in COLOURS.values()])
    texts = np.array([[name in caption.split() for name in NAMES] for caption in COLOURS]) + np.array([0, 0, 0, 0.1, 0.01, 0])
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (colours, texts))

    def recall(images, captions, k):
        order = np.argsort(-np.round(images @ captions.T, 6), axis=1, kind="stable")
        return np.mean([i in row[:k] for i, row in enumerate(order)])

    threshold = V**-0.5
    kept = [np.where(x > threshold, x, 0) for x in (s, t)]
    first = lambda x, k: np.where(np.argsort(np.argsort(-x, axis=1, kind="stable"), axis=1) < k, x, 0)
    for k in (1, 2):
        for name, (a, b) in {
            "i2t/r@": kept,
            "dense/i2t_r@": (s, t),
            "top1/i2t_r@": (first(s, 1), first(t, 1)),
            "top3/i2t_r@": (first(s, 3), first(t, 3)),
        }.items():
            assert numbers[f"val/{name}{k}"] == pytest.approx(recall(a, b, k)), name
            assert numbers[f"val/{name}{k}".replace("i2t", "t2i")] == pytest.approx(recall(b, a, k)), name
    assert not any("top99" in name for name in numbers)
    for side, x in ("image", s), ("text", t):
        on, m = x > threshold, x.mean(0)
        want = {
            "active": on.sum(1).mean(),
            "density": on.mean(),
            "sparsity": 1 - on.mean(),
            "ever_active": on.any(0).mean(),
            "most_used": on.mean(0).max(),
            "use_of_20": 1,
        }
        assert {key: numbers[f"val/{side}_{key}"] for key in want} == pytest.approx(want)
        table = next(g for g in shown if g.title == f"val: most used words, {side}")
        assert [row[0] for row in table.rows] == [NAMES[j] for j in np.argsort(-m, kind="stable")]
    listed = [set(np.argsort(-x, kind="stable")[:2]) for x in s]
    captions = [{NAMES.index(w) for w in caption.split()} for caption in COLOURS]
    for start, wanted in ("", captions), ("other_", np.roll(captions, 2)):
        hits = [[j in mine for j in words] for mine, words in zip(listed, wanted, strict=True)]
        for key, value in (
            ("any", np.mean([any(h) for h in hits])),
            ("all", np.mean([all(h) for h in hits])),
            ("words", np.mean([np.mean(h) for h in hits])),
        ):
            assert numbers[f"val/words@2/{start}{key}"] == pytest.approx(value)
    assert len([g for g in shown if not isinstance(g, Table)]) == 2


def test_images_are_explained_and_shown(folder, tmp_path):
    entry = LexicalOptions(source=str(folder / "val-0.tar"), words=2, batch_size=3)
    data, augment = DataOptions(image_size=SIDE, threads=1, workers=0), AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3)
    with jax.set_mesh(make_mesh(MeshOptions(2, 1, 1), jax.devices()[:2])):
        model = Model(method(), jnp.float32(1), Words(), data, augment, jax.sharding.get_mesh())
        found = explain(entry, model, images=4, searched=2, each=2)
        with pytest.raises(ValueError, match="the run's method has no words"):
            explain(entry, model._replace(method=method()._replace(embed_words=None)), images=1, searched=1, each=1)
    assert [seen.caption for seen in found.images] == ["red", "green", "red green", "never blue"] and found.size == 5
    red, both = found.images[0], found.images[2]
    assert [w for w, _ in red.words] == ["red", "dark"] and red.spoken == ("red",) and red.rank == 0
    norm = np.sqrt(1 + 0.01 + 0.0001)
    assert red.score == pytest.approx(1 / norm**2) and [w for w, _ in red.shared] == ["red"]
    np.testing.assert_allclose(red.maps["red"], np.full((2, 2), 1 / norm), rtol=1e-5)
    assert [w for w, _ in both.shared] == ["red", "green"] and sum(x for _, x in both.shared) == pytest.approx(both.score)
    assert {s.word: len(s.images) for s in found.words} == {"red": 2, "green": 2} and found.words[0].images[0][1] == pytest.approx(1 / norm)

    text = write_words(tmp_path, "<run>", 7, found).read_text()
    assert "&lt;run&gt; in words" in text and "http" not in text and "<script" not in text
    assert text.count('class="card"') == 4 and text.count('class="word"') == 2 and "caption ranks 1 of 5" in text
    told = json.loads((tmp_path / "words.json").read_text())
    assert told["images"][2]["maps"]["red"] == [[pytest.approx(v, abs=1e-5) for v in row] for row in both.maps["red"].tolist()]
    assert told["numbers"] == found.numbers and told["most_used"]["text"][0][0] == "red" and told["step"] == 7


def test_a_map_is_clear_where_a_word_is_not():
    import io

    alpha = np.asarray(Image.open(io.BytesIO(heat(np.array([[0.1, 0.2], [0.3, 0.9]]), 0.2, 0.3))))[..., 3]
    np.testing.assert_array_equal(alpha, [[0, 0], [215, 215]])


def test_words_of_captions_are_those_inside_the_prompt():
    tokens = Words().encode_batch(["blue red blue", "something", "dark"])
    np.testing.assert_equal([row.tolist() for row in words.of_captions(Words(), tokens)], [[0, 2], [], [3]])
    assert words.found([np.array([0, 2]), np.array([], int)], np.array([[2, 3], [0, 1]])) == (1.0, 0.0, 0.5)
    assert np.isnan(words.found([np.array([], int)], np.array([[1]]))).all()


def test_order_in_blocks(monkeypatch):
    s = np.random.default_rng(0).integers(0, 3, (11, 7)).astype(np.float32)
    monkeypatch.setattr(words, "ROWS", 4)
    np.testing.assert_array_equal(words.order(s, 3), np.argsort(-s, axis=1, kind="stable")[:, :3])


def corners(options):
    """What the picture comes to, counted: its corners are seen as red, green, red, blue."""
    predicted = np.array([[0, 1], [0, 2]])
    truth = np.full((SIDE, SIDE), -1)
    truth[:4, :4], truth[:4, 4:], truth[4:, :4], truth[4:6, 4:] = 0, 1, 2, 2
    if options.resolution == "patch":
        truth = np.array([[0, 1], [2, -1]])  # void and blue are equally many in the last one, and void is the lower label
    else:
        predicted = predicted.repeat(4, 0).repeat(4, 1)
    known = truth >= 0
    ratios = [np.sum(known & (predicted == c) & (truth == c)) / np.sum(known & ((predicted == c) | (truth == c))) for c in range(3)]
    return np.mean(ratios), np.mean(predicted[known] == truth[known])


@pytest.mark.parametrize("options", [{}, {"resolution": "patch"}, {"class_text": "word", "aggregate": "image"}], ids=str)
def test_patchdis(folder, options):
    entry = PatchdisOptions(source=str(folder / "instances.json"), batch_size=2, **options)
    numbers, (table,) = run({"seg": entry}, MeshOptions(2, 1, 1))
    miou, accuracy = corners(entry)
    assert numbers["seg/miou"] == pytest.approx(miou) and numbers["seg/accuracy"] == pytest.approx(accuracy)
    assert numbers["seg/images"] == 1 and 0 <= numbers["seg/miou_chance"] < 1
    assert [row[0] for row in table.rows] == list(NAMES[:3])


def test_choose_takes_present_classes_alone():
    scores = np.array([[[[1.0, 3.0, 2.0]]]])
    assert patchdis.choose(scores) == 1 and patchdis.choose(scores, np.array([True, False, True])) == 2


@pytest.mark.parametrize(("entry", "message"), [
    (LexicalOptions(source="val", top=(0,)), "evals.x: threshold is 0.0, words 10, top"),
    (LexicalOptions(), "evals.x: source is empty"),
    (PatchdisOptions(), "evals.x: source is empty; it must name a file of instances"),
    (PatchdisOptions(source="instances.json", classes="some"), "evals.x: classes is 'some'; it must be one of present, all"),
    (PatchdisOptions(source="instances.json", images="/nowhere"), "evals.x: there is no /nowhere/corners.png"),
])  # fmt: skip
def test_refused(folder, entry, message):
    entry = entry._replace(source=entry.source and str(folder / entry.source))
    with pytest.raises(ValueError, match=message):
        evals.check({"x": entry}, DataOptions())


def test_a_class_without_words_cannot_be_a_word(folder):
    names = Words()
    names.lexicon = Lexicon(np.array([1, 2], np.int32), NAMES[:2], {})
    with pytest.raises(ValueError, match="the class 'blue' has none of the model's words"):
        run({"x": PatchdisOptions(source=str(folder / "instances.json"), class_text="word")}, tokenizer=names)
    assert patches.labelled([patchdis.Overlap(np.array([3, 1]), np.array([5, 3]))]) == 6
