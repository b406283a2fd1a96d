"""Prepared TFDS data, written and read here without TensorFlow."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxvl.data import tools
from jaxvl.data.stream import eval_batches, open_data, read_samples, train_batches
from tests.data.shards import Letters, number_of, options, picture


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures in two files, as tfds prepares them."""
    import tensorflow_datasets as tfds

    features = tfds.features

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there is no module of this builder to look for checksums in

        def _info(self) -> tfds.core.DatasetInfo:
            texts = features.Sequence({"text": features.Text(), "id": np.int64})
            label = features.ClassLabel(names=["cat", "dog"])
            kinds = {
                "image": features.Image(encoding_format="png"),
                "caption": features.Text(),
                "captions": texts,
                "label": label,
            }
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

        def _split_generators(self, _: object) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(10):
                captions = [{"text": f"one {n}", "id": n}, {"text": f"two {n}", "id": n + 1}]
                yield (
                    n,
                    {
                        "image": io.BytesIO(picture(n)),
                        "caption": "" if n == 3 else f"number {n}",
                        "captions": captions,
                        "label": n % 2,
                    },
                )

    folder = tmp_path_factory.mktemp("tfds")
    settings = tfds.download.DownloadConfig(num_shards=2)
    Toy(data_dir=str(folder)).download_and_prepare(file_format="array_record", download_config=settings)
    return folder / "toy" / "1.0.0"


def test_every_sample_with_its_label(prepared: Path, tmp_path: Path) -> None:
    dataset = open_data(options(f"tfds://{prepared}/train", tmp_path, label="label"))
    assert len(dataset) == 10 and dataset.counts.shape == (2,) and dataset.classes == ("cat", "dog")
    batches = list(eval_batches(dataset, Letters(), batch_size=10))
    numbers = [number_of(p) for p, v in zip(batches[0].arrays["image"], batches[0].arrays["valid"], strict=True) if v]
    assert sorted(numbers) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [b.reason for b in batches[0].bad] == ["blank"]
    assert [n % 2 for n in numbers] == batches[0].arrays["label"][batches[0].arrays["valid"]].tolist()
    texts = Letters().encode_batch([f"number {n}" for n in numbers])
    np.testing.assert_array_equal(batches[0].arrays["tokens"][batches[0].arrays["valid"], 0], texts)
    ids = np.concatenate([b.ids for b, _ in zip(train_batches(dataset, Letters(), seed=0, start=0, batch_size=5), range(2), strict=False)])
    assert len(set(ids.tolist())) >= 9
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("caption", "first"), [("captions.text", "one"), ("label", ("cat", "dog")), ("caption", "number")])
def test_captions_from_any_feature(prepared: Path, tmp_path: Path, caption: str, first: str | tuple[str, ...]) -> None:
    pattern = f"tfds://toy/train[:50%]?dir={prepared.parent.parent}&caption={caption}"
    records = [r for r in read_samples(open_data(options(pattern, tmp_path)), range(5)) if hasattr(r, "captions")]
    assert len(records) >= 4 and all(r.captions[0].startswith(first) for r in records)
    assert {len(r.captions) for r in records} == {2 if "." in caption else 1}


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("toy/nothing?dir={dir}", "nothing"),
        ("nosuchset/train?dir={dir}", "nosuchset"),
        ("toy/train?dir={dir}&caption=words", r"\?caption= must be one of"),
        ("toy/train?dir={dir}&image=label", r"\?image= must be one of its images: image"),
        ("toy/train?folder=x", "write tfds://"),
        ("toy", "write tfds://"),
    ],
)
def test_what_cannot_be_opened(prepared: Path, tmp_path: Path, rest: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.source 'tfds://.*{message}"):
        open_data(options("tfds://" + rest.format(dir=prepared.parent.parent), tmp_path))


def metric_learning_set(called: str, folder: Path) -> Path:
    """Eight pictures with the features of a prepared metric-learning set."""
    import tensorflow_datasets as tfds

    f = tfds.features
    picture_of = f.Image(encoding_format="png")
    kinds = {
        "cars196": {"label": f.ClassLabel(names=["Audi Sedan 2012", "BMW SUV 2012", "Acura Sedan 2008", "Dodge SUV 2009"]), "bbox": f.BBoxFeature(), "image": picture_of},
        "caltech_birds2011": {
            "image": picture_of, "image/filename": f.Text(), "bbox": f.BBoxFeature(), "segmentation_mask": f.Image(shape=(None, None, 1), encoding_format="png"),
            "label": f.ClassLabel(num_classes=4), "label_name": f.Text(),
        },
        "stanford_online_products": {"class_id": np.int64, "super_class_id": np.int64, "super_class_id/num": f.ClassLabel(num_classes=12), "image": picture_of},
    }[called]  # fmt: skip
    mask = io.BytesIO()
    Image.new("L", (12, 9)).save(mask, "PNG")

    def example(n: int) -> dict:
        values = {
            "label": n % 4,
            "class_id": 9 + n % 4,
            "super_class_id": 1 + n % 4 // 2,
            "super_class_id/num": n % 4 // 2,
            "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        }
        values |= {
            "image": io.BytesIO(picture(n)),
            "image/filename": f"{n}.jpg",
            "label_name": ("black_gull", "gull", "barn_owl", "gray_owl")[n % 4],  # TFDS's label itself is a number
            "segmentation_mask": io.BytesIO(mask.getvalue()),
        }
        return {k: values[k] for k in kinds}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = called
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(kinds))

        def _split_generators(self, _: object) -> dict:
            return {"train": self._generate_examples(range(5)), "test": self._generate_examples(range(5, 8))}

        def _generate_examples(self, numbers):
            yield from ((n, example(n)) for n in numbers)

    Made(data_dir=str(folder)).download_and_prepare(file_format="array_record")
    return folder / called / "1.0.0"


@pytest.mark.parametrize(
    ("name", "query", "label", "hierarchy", "groups"),
    [
        ("cars196", "", "label", r"re:(\w+) \d{4}$", ("Sedan",)),
        ("caltech_birds2011", "?image=image", "label", r"label_name:re:([^_]+)$", ("gull",)),
        ("stanford_online_products", "", "class_id", "super_class_id", ("1",)),
    ],
)
def test_prepared_metric_learning_sets(
    name: str, query: str, label: str, hierarchy: str, groups: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = metric_learning_set(name, tmp_path / "tfds")
    both = tuple(f"tfds://{root}/{split}{query}" for split in ("train", "test"))
    how = {"captions": "none", "label": label, "classes": "first", "hierarchy": hierarchy, "levels": (0,)}
    dataset = open_data(options(both, tmp_path, **how))
    assert len(dataset.classes) == 2 and dataset.table.groups == (groups,)
    batch = next(iter(eval_batches(dataset, None, batch_size=len(dataset))))
    assert batch.arrays["valid"].all() and len(dataset) == 4
    other = open_data(options(both, tmp_path, **{**how, "classes": "second"}))
    assert not set(other.classes) & set(dataset.classes) and len(other) == 4
    for verb in (tools.check, tools.stats):
        capsys.readouterr()
        assert verb(both, cache=str(tmp_path / "cache"), json=True) == 0
        report = json.loads(capsys.readouterr().out)
        assert report.get("good", report.get("samples")) == 8 and report["bad"] == 0 and len(report["contents"]) == 2
    assert report["labels"] == 4 and "tensorflow" not in sys.modules
