"""Evaluations from shards to numbers and galleries, with a model whose right and wrong answers are known beforehand."""

import io
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from PIL import Image

from jaxvl import evals
from jaxvl.data.augment import AugmentOptions
from jaxvl.data.stream import DataOptions
from jaxvl.evals.retrieval import RetrievalOptions
from jaxvl.evals.zeroshot import ZeroshotOptions, per_class
from jaxvl.mesh import MeshOptions, make_mesh
from jaxvl.methods.method import Method

pytestmark = pytest.mark.filterwarnings("ignore:1 of 21 samples")
SAMPLES, BROKEN, SWAPPED = 21, 4, {2: 3, 3: 2}  # image 4 cannot be decoded; images 2 and 3 look like each other's caption
CLASSES = ("red", "green", "blue")


class Numbers:
    """Captions are lists of numbers."""

    context_length = 4

    def encode_batch(self, captions: list[str]) -> np.ndarray:
        rows = [[int(word) + 1 for word in caption.split() if word.isdigit()][:4] for caption in captions]
        return np.array([row + [0] * (4 - len(row)) for row in rows], np.int32)


def onehot_method() -> Method:
    """Image: one-hot of the brightness level of the red channel; text: one-hot of the first number."""
    nothing = lambda *_: None
    level = lambda images: jnp.round(images.mean((1, 2))[:, 0] * 255 / 8).astype(jnp.int32)
    embed_image = lambda params, images: jax.nn.one_hot(level(images), 32) * params
    embed_text = lambda params, tokens: jax.nn.one_hot(tokens[:, 0] - 1, 32) * params
    return Method(nothing, nothing, nothing, nothing, nothing, embed_image, embed_text, nothing, ((".*", P()),))


def png(level: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (level * 8, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards") / "val-0000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(SAMPLES):
            captions = [f"{i}"] + [f"{i} again"] * (i % 2)
            meta = {"captions": captions, "class": CLASSES[i % 3], "number": i % 3}
            picture = png(SWAPPED.get(i, i)) if i != BROKEN else png(i)[:50]
            for suffix, data in ("png", picture), ("txt", captions[0].encode()), ("json", json.dumps(meta).encode()):
                member = tarfile.TarInfo(f"{i:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def run(entries: dict, tmp_path: Path, mesh: MeshOptions = MeshOptions(), params: float = 1.0, **data: object) -> tuple[dict, list]:
    options = DataOptions(image_size=8, cache=str(tmp_path), threads=1, workers=0, **data)
    augment = AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3)
    with jax.set_mesh(make_mesh(mesh)):
        return evals.run(entries, onehot_method(), jnp.float32(params), Numbers(), options, augment)


@pytest.mark.parametrize("mesh", [MeshOptions(), MeshOptions(data=2, fsdp=2, tensor=2)], ids=str)
def test_retrieval_from_shards(shard: str, tmp_path: Path, mesh: MeshOptions) -> None:
    entry = RetrievalOptions(source=shard, captions=2, ks=(1, 2), batch_size=3, show=SAMPLES)
    with pytest.warns(UserWarning, match="equal scores"), pytest.warns(UserWarning, match=r"1 of 21 samples .* \(here 1 truncated\)"):
        values, galleries = run({"val": entry}, tmp_path, mesh)  # of one-hot vectors, most products are zero
    images = [i for i in range(SAMPLES) if i != BROKEN]
    texts = [i for i in images for _ in range(1 + i % 2)]
    assert values["val/i2t/r@1"] == pytest.approx(1 - 2 / len(images))
    assert values["val/t2i/r@1"] == pytest.approx(1 - 3 / len(texts))  # 2, 3 and "3 again"
    assert values["val/i2t/median_rank"] == values["val/t2i/median_rank"] == 1
    assert set(values) == {f"val/{way}/{n}" for way in ("i2t", "t2i") for n in ("r@1", "r@2", "median_rank")} | {"val/rsum"}

    to_text, to_image = galleries
    assert (to_text.title, to_image.title) == ("val: image to text", "val: text to image")
    assert len(to_text.queries) == len(to_image.queries) == len(images)
    query = to_text.queries[images.index(7)]
    assert query.item == png(7) and query.rank == 0 and query.answer == "7"
    assert [h.item for h in query.hits[:2]] == ["7", "7 again"] and [h.right for h in query.hits] == [True, True, False, False, False]
    wrong = to_image.queries[images.index(2)]
    assert wrong.item == "2" and wrong.hits[0].item == png(2) and wrong.hits[0].score == 1  # the picture of sample 3
    assert not wrong.hits[0].right and wrong.rank > 0 and wrong.answer == png(3)


def test_folds_and_first_captions(shard: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="equal scores"):
        values, galleries = run(
            {"a": RetrievalOptions(source=shard, folds=4, show=0), "b": RetrievalOptions(source=shard, show=3)}, tmp_path
        )
    assert values["a/t2i/r@1"] == values["b/t2i/r@1"] == pytest.approx(0.9)
    assert [len(g.queries) for g in galleries] == [3, 3]


@pytest.mark.parametrize("label", ["class", "number"])
def test_zeroshot_from_shards(shard: str, tmp_path: Path, label: str) -> None:
    """Prompts name samples 0, 1 (and 0 for the second template), so just those have a class that looks like them."""
    classes = tuple(f"{CLASSES.index(name)} {name}" for name in (sorted(CLASSES) if label == "class" else CLASSES))
    entry = ZeroshotOptions(source=shard, label=label, classes=classes, templates=("{}", "0 or {}"), ks=(1, 2), batch_size=4, show=2)
    values, (gallery,) = run({"zs": entry}, tmp_path)
    images = [i for i in range(SAMPLES) if i != BROKEN]
    order = sorted(CLASSES) if label == "class" else list(CLASSES)
    weights = np.zeros((3, 32))
    for c, name in enumerate(order):
        weights[c, CLASSES.index(name)] += 0.5
        weights[c, 0] += 0.5
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    scores = weights[:, [SWAPPED.get(i, i) for i in images]].T
    ranking = np.argsort(-scores.astype(np.float32), axis=1, kind="stable")
    truth = np.array([order.index(CLASSES[i % 3]) for i in images])
    right = ranking == truth[:, None]
    assert values["zs/acc@1"] == pytest.approx(right[:, 0].mean()) and values["zs/acc@2"] == pytest.approx(right[:, :2].any(1).mean())
    assert values["zs/class_acc@1"] == pytest.approx(np.mean([right[truth == c, 0].mean() for c in range(3)]))
    assert gallery.title == "zs: image to class" and gallery.queries[0].item == png(0) and gallery.queries[0].answer.endswith("red")
    assert gallery.queries[0].hits[0].score == pytest.approx(1) and gallery.queries[0].hits[0].right and gallery.queries[0].rank == 0


def test_prompts_are_cleaned_as_captions_are(shard: str, tmp_path: Path) -> None:
    numbers = []
    for classes, cleaning in ((("2 c", "1 b", "0 a"), "plain"), (("\ufeff2 c", "1\xa0b", " 0\ta"), ""), (("2, C", "1-b", "0?"), "albef")):
        entry = ZeroshotOptions(source=shard, classes=classes, cleaning=cleaning, templates=("{}",), ks=(1,), batch_size=4, show=0)
        numbers.append(run({"zs": entry}, tmp_path)[0]["zs/class_acc@1"])
    assert numbers[0] > 0 and len(set(numbers)) == 1


def test_per_class_leaves_out_classes_without_images() -> None:
    shares = per_class(np.array([True, False, True]), np.array([0, 0, 2]), 4)
    np.testing.assert_array_equal(shares, [0.5, np.nan, 1, np.nan])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (RetrievalOptions(), r"evals.val: source is empty; it must name shards"),
        (RetrievalOptions(source="SHARD", ks=()), r"evals.val: ks is \(\)"),
        (RetrievalOptions(source="SHARD", captions=0), r"evals.val: captions is 0"),
        (RetrievalOptions(source="SHARD", folds=3), r"evals.val: folds=3 does not divide 20 images"),
        (RetrievalOptions(source="SHARD", batch_size=0), r"evals.val: batch_size is 0"),
        (ZeroshotOptions(source="SHARD", templates=("a photo",)), r"evals.val: the prompt template 'a photo' must have one {}"),
        (
            ZeroshotOptions(source="SHARD", classes=("!", "1", "2"), templates=("{}",), cleaning="albef"),
            r"evals.val: the text '!' cannot be emb",
        ),
        (ZeroshotOptions(source="SHARD", label="number"), r"evals.val: the labels in 'number' are numbers; set classes"),
        (
            ZeroshotOptions(source="SHARD", classes=("1", "2")),
            r"evals.val: classes has 2 names, but 'class' has 3 values: blue, green, red",
        ),
        (
            ZeroshotOptions(source="SHARD", label="number", classes=("1", "2")),
            r"evals.val: 'number' holds the label 2, but classes has only 2",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_named(shard: str, tmp_path: Path, entry: object, message: str) -> None:
    entry = entry._replace(source=entry.source and shard)
    with pytest.raises(ValueError, match=message):
        run({"val": entry}, tmp_path)


def test_a_diverged_model_is_not_a_perfect_one(shard: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evals.val: 20 of 20 query embeddings are not finite"):
        run({"val": RetrievalOptions(source=shard)}, tmp_path, params=float("nan"))


def test_a_second_evaluation_compiles_nothing(shard: str, tmp_path: Path) -> None:
    from jaxvl.evals.embed import _embed

    entry, method = {"val": RetrievalOptions(source=shard, show=0)}, onehot_method()
    options = DataOptions(image_size=8, cache=str(tmp_path), threads=1, workers=0)
    sizes = []
    with jax.set_mesh(make_mesh(MeshOptions())), pytest.warns(UserWarning, match="equal scores"):
        for _ in range(2):
            evals.run(entry, method, jnp.float32(1), Numbers(), options, AugmentOptions(mean=(0.0,) * 3, std=(1.0,) * 3))
            sizes.append(_embed._cache_size())
    assert sizes[0] == sizes[1]
