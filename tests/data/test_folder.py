"""A folder of images as a source: what it holds, in which order, and what is said of a folder that will not do."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards import options

from jaxvl.data.source import Want
from jaxvl.data.stream import eval_batches, open_data, read_samples


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    for level, name in enumerate(("a.png", "b/a.jpg", "c.PNG")):
        Image.new("RGB", (12, 9), (level * 60, 0, 0)).save(root / name)
    (root / "b" / "broken.png").write_bytes(b"\x89PNG no")
    (root / "notes.txt").write_text("no image")
    return root


def test_images_below_a_folder_in_the_order_of_their_paths(folder: Path, tmp_path: Path) -> None:
    dataset = open_data(options(f"folder://{folder}", tmp_path, captions="none"))
    assert len(dataset) == 4 and dataset.sources[0].shards == (str(folder),)
    keys = [record.key for record in read_samples(dataset, np.arange(4), Want(image=False, captions=False))]
    assert keys == ["a.png", "b/a.jpg", "b/broken.png", "c.PNG"]
    (batch,) = eval_batches(dataset, None, batch_size=4)
    np.testing.assert_array_equal(batch.arrays["valid"], [True, True, False, True])
    np.testing.assert_allclose(batch.arrays["image"][:, 4, 4, 0], [0, 60, 0, 120], atol=2)
    assert [bad.key for bad in batch.bad] == ["b/broken.png"]


def test_a_changed_file_is_another_version(folder: Path, tmp_path: Path) -> None:
    version = lambda: open_data(options(f"folder://{folder}", tmp_path, captions="none")).sources[0].version
    before = version()
    assert version() == before
    Image.new("RGB", (30, 9)).save(folder / "a.png")
    assert version() != before


def test_what_is_no_folder_of_images(folder: Path, tmp_path: Path) -> None:
    opened = lambda path, **changes: open_data(options(f"folder://{path}", tmp_path, **changes))
    with pytest.raises(ValueError, match="a folder of images without captions; `jaxvl data make`"):
        opened(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        opened(folder / "a.png", captions="none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image below"):
        opened(tmp_path / "empty", captions="none")


def test_a_file_that_went_is_a_bad_sample(folder: Path, tmp_path: Path) -> None:
    dataset = open_data(options(f"folder://{folder}", tmp_path, captions="none"))
    (folder / "a.png").unlink()
    (batch,) = eval_batches(dataset, None, batch_size=4)
    assert not batch.arrays["valid"][0] and batch.bad[0].reason == "unreadable"
