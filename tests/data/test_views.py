"""Two views of an image, ids, and cleaned captions: from shards to what the method is handed."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from shards import Letters, members, options, picture, tar_bytes, write_shards

from jaxvl.data import decode, pixels
from jaxvl.data.augment import AugmentOptions, check, preprocess, resize
from jaxvl.data.decode import DecodeOptions
from jaxvl.data.prepare import Train
from jaxvl.data.stream import open_data, train_batches
from jaxvl.data.text import Cleaning, Uncaptioned, clean_caption

HOW = DecodeOptions(size=32, crop_scale=(0.2, 1.0))


def photo(width: int, height: int) -> bytes:
    import io

    x = np.random.default_rng(0).random((9, 9, 3)) * 255
    out = io.BytesIO()
    Image.fromarray(x.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * np.log10(255) - 10 * np.log10(max(np.mean((np.asarray(a, float) - b) ** 2), 1e-9))


@pytest.mark.parametrize("size", [(40, 33), (301, 203), (900, 1100)])
def test_two_crops_of_one_decoding_are_those_of_two(size, monkeypatch):
    """At the scale of the smaller crop: with a margin that never enlarges, each is Pillow's crop to within JPEG scaling."""
    data, decoded, whole = photo(*size), [], pixels.decode
    uniforms = np.random.default_rng(size).random((2, decode.UNIFORMS))
    apart = [decode.decode_train(data, HOW, u) for u in uniforms]
    monkeypatch.setattr(pixels, "decode", lambda *args, **more: decoded.append(args[2]) or whole(*args, **more))
    views = decode.decode_views(data, HOW, uniforms)
    assert len(decoded) == 1 and not np.array_equal(*views)
    assert min(map(psnr, views, apart)) > 30
    canvases = decode.canvas_views(data, HOW, uniforms)
    assert len(decoded) == 2
    for (canvas, frame), view in zip(canvases, views, strict=True):
        assert psnr(np.asarray(resize(canvas[None], frame[None], 32))[0], view) > 38


@pytest.mark.parametrize("where", ["host", "device"])
def test_views_do_not_change_the_rest_of_the_batch(tmp_path, where):
    """The first view, the captions and the order are those of a run with one view; the second has a crop of its own."""
    folder = tmp_path / "shards"
    folder.mkdir()
    entries = [m for n in range(6) for m in [(f"{n:03d}.png", photo(40 + n, 60)), (f"{n:03d}.txt", b"left" if n % 2 else b"leftover")]]
    (folder / "0.tar").write_bytes(tar_bytes(entries))
    dataset = open_data(options(str(folder), tmp_path, image_size=32, crop_scale=(0.2, 1.0), resize=where))
    n = np.arange(5, 11)
    one, two = Train(dataset, Letters(), 3)(n), Train(dataset, Letters(), 3, views=2, sides=True)(n)
    for name, value in one.arrays.items():
        if name in ("image", "frame"):  # decoded once for both views, at the scale that the smaller needs
            assert value.shape == two.arrays[name].shape and value.shape == two.arrays[f"{name}_aug"].shape
        else:
            np.testing.assert_array_equal(value, two.arrays[name])
    np.testing.assert_array_equal(one.ids, two.ids)
    assert (two.arrays["sided"] == (two.ids % 2 == 1)).all() and "sided" not in one.arrays
    assert (two.arrays["image"] != two.arrays["image_aug"]).any((1, 2, 3)).all()
    batch = next(train_batches(dataset, Letters(), seed=3, start=5, batch_size=6, views=2, sides=True))
    assert batch.arrays.keys() == two.arrays.keys()
    for name, value in batch.arrays.items():  # in chunks and threads, the same
        np.testing.assert_array_equal(value, two.arrays[name])


def test_sided_rows_are_not_flipped():
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), np.uint8)
    sided = np.arange(8) % 2 == 0
    always = AugmentOptions(flip=1.0, hflip="unsided")
    got, plain = preprocess(images, jax.random.key(0), always, sided), preprocess(images, None, always)
    np.testing.assert_array_equal(got[sided], plain[sided])
    np.testing.assert_array_equal(got[~sided], plain[~sided][:, :, ::-1])


@pytest.mark.parametrize("change", [{"hflip": "some"}, {"autocontrast": "broken"}, {"views": 3}])
def test_wrong_view_options_are_named(change):
    with pytest.raises(ValueError, match=f"augment.{next(iter(change))}"):
        check(AugmentOptions(**change))


def test_ids_are_a_field_or_the_sample_itself(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    numbers = [70, 70, 5, 999_999_999]
    entries = [m for n, image in enumerate(numbers) for m in members(n, image_id=image, name=f"coco_{image}")]
    (folder / "0.tar").write_bytes(tar_bytes(entries))
    for field, wanted in (("image_id", numbers), ("name", [1, 1, 0, 2]), ("sample", range(4))):
        dataset = open_data(options(str(folder), tmp_path, id=field))
        batch = next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=8))
        assert batch.arrays["id"].dtype == np.int32
        np.testing.assert_array_equal(batch.arrays["id"], np.asarray(wanted)[batch.ids])
    with pytest.raises(ValueError, match=r"data\.id is 'nothing', a field that no sample"):
        open_data(options(str(folder), tmp_path, id="nothing"))


def test_a_sample_without_its_id_is_bad(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar_bytes([*members(0, image_id=3), *members(1)]))
    dataset = open_data(options(str(folder), tmp_path, id="image_id", max_bad_rate=1.0))
    batch = next(train_batches(dataset, Letters(), seed=0, start=0, batch_size=4))
    assert (batch.arrays["id"] == 3).all() and {b.reason for b in batch.bad} == {"unidentified"}


def test_every_source_is_cleaned_its_own_way(tmp_path):
    for name in ("web", "coco"):
        folder = tmp_path / name
        folder.mkdir()
        meta = {"captions": ["A half-pipe, 24/7!", "<PERSON>'s T-shirt", "!!!"]}
        entries = [("0.png", picture(0)), ("0.txt", b"A half-pipe, 24/7!"), ("0.json", json.dumps(meta).encode())]
        (folder / "0.tar").write_bytes(tar_bytes(entries))
    sources = (str(tmp_path / "web"), str(tmp_path / "coco"))
    dataset = open_data(options(sources, tmp_path, cleaning=("plain", "albef"), max_words=3, captions="random"))
    from jaxvl.data.dataset import read_samples

    plain, albef = (record.captions for record in read_samples(dataset, [0, 1]))
    assert plain == ("A half-pipe, 24/7!", "<PERSON>'s T-shirt", "!!!")
    assert albef == ("a half pipe", "persons t shirt")  # what is nothing but punctuation is no caption
    with pytest.raises(Uncaptioned, match="blank"):
        clean_caption(b"?!", Cleaning("albef"))
    with pytest.raises(ValueError, match=r"data\.cleaning has 1 entries for 2 sources"):
        open_data(options(sources, tmp_path, cleaning=("albef",)))
    with pytest.raises(ValueError, match=r"data\.cleaning has 'bert'"):
        open_data(options(sources, tmp_path, cleaning="bert"))


def test_an_evaluation_asks_which_cleaning_where_the_sources_differ(tmp_path):
    from jaxvl.evals.embed import open_for

    source = write_shards(tmp_path / "val", [2])
    data = options(("a", "b"), tmp_path, cleaning=("plain", "albef"))
    with pytest.raises(ValueError, match="differs between the sources"):
        open_for(data, source)
    assert open_for(data, source, cleaning="albef").options.cleaning == "albef"
    assert open_for(data._replace(cleaning=("albef", "albef")), source).options.cleaning == "albef"
