"""Masks of COCO's layout against the slow and obvious: a point in a polygon, runs one pixel at a time."""

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from jaxvl.data import instances
from jaxvl.data.decode import DecodeOptions, decode_full
from jaxvl.data.instances import VOID, Picture, Segment
from jaxvl.evals import patches

SQUARE = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]


def inside(points, x, y):
    """Even-odd: how many edges a ray to the left crosses."""
    odd = False
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
            odd = not odd
    return odd


@given(st.lists(st.tuples(*[st.integers(-4, 40).map(lambda n: n / 3)] * 2), min_size=3, max_size=8))
def test_a_polygon_holds_the_pixels_whose_centres_it_holds(points):
    points = np.array(points)
    want = [[inside(points, x + 0.5, y + 0.5) for x in range(9)] for y in range(7)]
    np.testing.assert_array_equal(instances.polygon(points, 7, 9), want)


def packed(counts):
    """COCO's string, as its documentation has it written."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr(48 + bits + 32 * more)
    return text


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_run_lengths_in_a_string(counts):
    assert instances.unpacked(packed(counts)) == counts


def test_runs_go_down_the_columns():
    want = np.array([[0, 1, 1], [0, 1, 0]], bool)
    for counts in ([2, 3, 1], packed([2, 3, 1])):
        np.testing.assert_array_equal(instances.mask({"size": [2, 3], "counts": counts}, 2, 3), want)
    assert packed([2, 3, 1]) == "231"


@pytest.mark.parametrize(("shape", "message"), [
    ({"size": [3, 2], "counts": [6]}, r"size \[3, 2\] for an image of height 2 and width 3"),
    ({"size": [2, 3], "counts": [5]}, "come to 5 pixels for an image of 2 x 3"),
    ({"size": [2, 3], "counts": "2\x20"}, "hold the character ' '"),
    ({"size": [2, 3], "counts": "2P"}, "end within a number"),
    ([[0, 0, 1, 1]], "at least three points"),
])  # fmt: skip
def test_what_is_no_mask_is_named(shape, message):
    with pytest.raises(ValueError, match=message):
        instances.mask(shape, 2, 3)


def test_the_smaller_one_lies_in_front(tmp_path):
    picture = Picture(tmp_path / "x.png", 4, 5, (Segment(1, 2.0, [[3, 1, 4, 1, 4, 3, 3, 3]]), Segment(0, 6.0, [SQUARE])))
    v = VOID
    np.testing.assert_array_equal(instances.labels(picture), [[v] * 5, [v, 0, 0, 1, v], [v, 0, 0, 1, v], [v] * 5])


def test_resized_takes_the_nearest_centre():
    labels = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(instances.resized(labels, 3, 4), labels)
    np.testing.assert_array_equal(instances.resized(labels, 6, 8), labels.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(instances.resized(labels, 1, 2), [[5, 7]])  # centres at 1.5 rows, and at 1 and 3 columns


def test_read(tmp_path):
    body = {
        "images": [{"id": 7, "file_name": "b.png", "height": 4, "width": 5}, {"id": 3, "file_name": "a.png", "height": 2, "width": 2}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 18, "area": 6.0, "segmentation": [SQUARE]}],
    }
    file = tmp_path / "instances.json"
    write = lambda **change: file.write_text(json.dumps({**body, **change}))
    write()
    found = instances.read(file, tmp_path / "images")
    assert found.classes == ("cat", "dog")
    assert found.pictures == (Picture(tmp_path / "images" / "b.png", 4, 5, (Segment(1, 6.0, [SQUARE]),)),)
    for change, message in (
        ({"annotations": []}, "annotates none of its 2 images"),
        ({"annotations": [{**body["annotations"][0], "category_id": 1}]}, "annotation 1 is of image 7 and category 1"),
        ({"categories": [{"id": 1}]}, r"no file of instances in COCO's layout \(KeyError: 'name'\)"),
    ):
        write(**change)
        with pytest.raises(ValueError, match=message):
            instances.read(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_are_turned_with_a_picture_that_they_were_drawn_on_as_stored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((20, 30), np.uint8)
    stored[2:6, 3:13] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    how = DecodeOptions()
    want = decode_full((tmp_path / "a.png").read_bytes(), how)[..., 0] > 0
    on_stored = Segment(0, 1, [[3, 2, 13, 2, 13, 6, 3, 6]])
    rows, columns = np.nonzero(want)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    on_shown = Segment(0, 1, [[left, top, right, top, right, bottom, left, bottom]])
    for segment, size in ((on_stored, (20, 30)), (on_shown, want.shape)):
        if segment is on_stored and 1 < orientation < 5:
            continue  # mirrored or turned by half, of which sizes tell nothing
        labels = patches.shown(Picture(tmp_path / "a.png", *size, (segment,)), how)
        assert ((labels == 0) == want).all()
