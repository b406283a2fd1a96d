"""Pixels against Pillow, and refusals against every kind of broken image."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from jaxvl.data import augment, decode, pixels
from jaxvl.data.decode import DecodeOptions, Undecodable, decode_eval, decode_full, decode_train, probe, random_box

OPTIONS = DecodeOptions(size=32)
FULL = OPTIONS._replace(dct_margin=float("inf"))
resize_on_device = jax.jit(augment.resize, static_argnums=2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with one hard edge, no two corners alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    coarse.paste((250, 10, 40), (0, 0, width // 4, height // 5))
    return coarse


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 92} if kind == "JPEG" else {}), **options)
    return data.getvalue()


def draws(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(decode.UNIFORMS)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 20 * np.log10(255) - 10 * np.log10(max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def refused(data: bytes, options: DecodeOptions = OPTIONS) -> str:
    with pytest.raises(Undecodable) as error:
        decode_train(data, options, draws(0))
    return error.value.reason


@pytest.mark.parametrize("size", [(500, 375), (90, 301), (33, 20), (1500, 1100)])
def test_train_crop_is_pillows_bicubic_of_the_same_box(size):
    data = encode(picture(*size))
    for seed in range(3):
        box = random_box(*size, OPTIONS, draws(seed))
        want = np.asarray(Image.open(io.BytesIO(data)).crop(box).resize((32, 32), Image.Resampling.BICUBIC))
        assert psnr(decode_train(data, FULL, draws(seed)), want) > 48
        assert psnr(decode_train(data, OPTIONS, draws(seed)), want) > 38  # decoded at a half or a quarter


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_eval_takes_the_centre_or_the_whole(fit):
    image = picture(300, 200)
    side = image.crop((50, 0, 250, 200)) if fit == "crop" else image
    got = decode_eval(encode(image, "PNG"), OPTIONS._replace(fit=fit))
    assert psnr(got, np.asarray(side.resize((32, 32), Image.Resampling.BICUBIC))) > 50


@pytest.mark.parametrize("size", [(39, 36), (50, 45), (66, 70), (75, 100), (130, 300), (480, 320), (1100, 900)])
def test_eval_of_a_jpeg_is_that_of_its_whole_decoding(size):
    """As image processors elsewhere see it: neither a scaled decoding nor rough colour may show."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    data = encode(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    side, whole = min(size), Image.open(io.BytesIO(data))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    want = whole.crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BICUBIC)
    assert psnr(decode_eval(data, OPTIONS), np.asarray(want)) > 48


@pytest.mark.parametrize("size, left, top", [((67, 40), 13, 0), ((41, 60), 0, 9)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_eval_takes_whole_pixels_where_the_margin_is_odd(size, left, top, orientation):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    turn = {1: lambda x: x, 3: lambda x: x.rotate(180), 6: lambda x: x.transpose(Image.Transpose.ROTATE_90)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    side = min(size)
    got = decode_eval(encode(turn(noise), "PNG", exif=exif), OPTIONS._replace(size=side))
    np.testing.assert_array_equal(got, np.asarray(noise.crop((left, top, left + side, top + side))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6])
@pytest.mark.parametrize("size", [(41, 47), (75, 51), (301, 203), (900, 1100)])
def test_a_canvas_resized_on_the_device_is_the_hosts_crop(size, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(*size), kind, exif=exif)
    for seed in range(2):
        canvas, frame = decode.decode_canvas(data, OPTIONS, draws(seed))
        assert canvas.shape == (decode.canvas_side(OPTIONS),) * 2 + (3,) and canvas.dtype == np.uint8 and frame.dtype == np.float32
        x0, y0, x1, y1, width, height = frame
        assert 0 <= x0 < 1 and 0 <= y0 < 1 and width - 1 < x1 <= width and height - 1 < y1 <= height
        got = resize_on_device(canvas[None], frame[None], 32)[0]
        assert psnr(got, decode_train(data, OPTIONS, draws(seed))) > (
            50 if max(size) < (80 if kind == "JPEG" else 60) else 38
        )  # a larger one comes averaged


def test_dct_scaling_is_chosen_by_what_is_left(monkeypatch):
    chosen = []
    whole = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda *args, **more: chosen.append(args[2]) or whole(*args, **more))
    plain = OPTIONS._replace(crop_scale=(1, 1), crop_ratio=(1, 1), dct_margin=1.0)
    for side in (63, 64, 127, 128, 600):
        decode_train(encode(picture(side, side)), plain, draws(0))
    decode_train(encode(picture(48, 48)), plain._replace(dct_margin=0.75), draws(0))
    decode_train(encode(picture(600, 600), "PNG"), plain, draws(0))
    decode_train(encode(picture(600, 600)), plain._replace(dct_margin=float("inf")), draws(0))
    assert chosen == [1, 2, 2, 4, 4, 2, 1, 1]


def test_random_box_follows_the_ten_tries():
    def reference(width, height, u):
        for i in range(10):
            area = (0.2 + 0.8 * u[2 * i]) * width * height
            ratio = np.exp(np.log(0.5) + u[2 * i + 1] * (np.log(2.0) - np.log(0.5)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(u[20] * (width - w + 1)), int(u[21] * (height - h + 1))
                return left, top, left + w, top + h
        return None

    options = OPTIONS._replace(crop_scale=(0.2, 1.0), crop_ratio=(0.5, 2.0))
    shares, sides = [], []
    for seed in range(400):
        box = random_box(320, 240, options, draws(seed))
        assert box == reference(320, 240, draws(seed))
        shares.append((box[2] - box[0]) * (box[3] - box[1]) / (320 * 240))
        sides.append((box[0] / max(320 - box[2] + box[0], 1), box[1] / max(240 - box[3] + box[1], 1)))
    assert 0.19 < min(shares) < 0.25 and 0.9 < max(shares) <= 1
    assert np.allclose(np.mean(sides, 0), 0.5, atol=0.06)  # as often left and above as right and below
    assert random_box(1000, 10, DecodeOptions(), draws(0)) == (493, 0, 506, 10)  # nothing fits: the widest allowed, centred
    assert random_box(10, 1000, DecodeOptions(), draws(0)) == (0, 493, 10, 506)
    assert random_box(1, 1, DecodeOptions(), draws(0)) == (0, 0, 1, 1)


def test_squares_of_the_shorter_side_lie_anywhere():
    options = OPTIONS._replace(crop="side", crop_scale=(0.8, 1.0))
    boxes = np.array([random_box(320, 240, options, draws(seed)) for seed in range(400)])
    sides = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_array_equal(sides, boxes[:, 3] - boxes[:, 1])
    assert sides.min() in range(192, 195) and sides.max() in range(238, 241)
    assert boxes.min() == 0 and boxes[:, 2].max() == 320 and boxes[:, 3].max() == 240
    assert np.allclose(boxes[:, :2].mean(0) / (np.array([320, 240]) - sides.mean()), 0.5, atol=0.1)
    whole = options._replace(crop_scale=(1.0, 1.0))
    assert len({random_box(320, 240, whole, draws(seed)) for seed in range(200)}) > 60  # of 81
    assert {random_box(30, 30, whole, draws(seed)) for seed in range(9)} == {(0, 0, 30, 30)}
    assert random_box(1, 9, whole, draws(0))[2] == 1
    flat = encode(picture(60, 40, 0), "PNG")
    np.testing.assert_array_equal(
        decode_train(flat, whole._replace(dct_margin=1.0), np.full(decode.UNIFORMS, 0.5)), decode_eval(flat, OPTIONS)
    )
    assert decode.canvas_side(options) == 2 + int(np.ceil(2 * 0.7 * 32)) < decode.canvas_side(OPTIONS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(301, 203), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert probe(data, OPTIONS) == turned.size
    assert psnr(decode_full(data, OPTIONS), np.asarray(turned)) > 40
    box = random_box(*turned.size, OPTIONS, draws(orientation))
    want = np.asarray(turned.crop(box).resize((32, 32), Image.Resampling.BICUBIC))
    assert psnr(decode_train(data, OPTIONS, draws(orientation)), want) > 35


def test_orientation_nonsense_is_no_orientation():
    exif = Image.Exif()
    exif[0x0112] = 77
    image = picture(40, 30)
    assert probe(encode(image, exif=exif), OPTIONS) == (40, 30)
    broken = encode(image, exif=exif).replace(b"Exif\0\0MM", b"Exif\0\0ZZ").replace(b"Exif\0\0II", b"Exif\0\0ZZ")
    assert decode_full(broken, OPTIONS).shape == (30, 40, 3)


def test_transparency_is_composed_on_white():
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[..., 0], rgba[:10, :, 3], rgba[10:, :, 3] = 200, 255, 51  # opaque above, one fifth below
    above, below = (200, 0, 0), (244, 204, 204)
    image = Image.fromarray(rgba)
    palette = image.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    gray = Image.fromarray(rgba[..., [0, 3]])
    for data, top, bottom in (
        (encode(image, "PNG"), above, below),
        (encode(image, "WEBP", lossless=True), above, below),
        (encode(palette, "PNG", transparency=palette.getpixel((0, 0))), (255,) * 3, (255,) * 3),
        (encode(palette, "GIF", transparency=palette.getpixel((0, 0))), (255,) * 3, (255,) * 3),
        (encode(Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255,) * 3, (255,) * 3),
        (encode(gray, "PNG"), (200,) * 3, (244,) * 3),
    ):
        got = decode_full(data, OPTIONS).astype(int)
        assert np.abs(got[2, 2] - top).max() <= 1 and np.abs(got[-2, -2] - bottom).max() <= 1


def test_gray_bilevel_palette_and_deep_images_keep_their_levels():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(16, 0)
    gray = ramp[..., None].repeat(3, 2)
    assert psnr(decode_full(encode(Image.fromarray(ramp)), OPTIONS), gray) > 45
    assert (decode_full(encode(Image.fromarray(ramp), "PNG"), OPTIONS) == gray).all()
    assert (decode_full(encode(Image.fromarray(ramp).convert("P"), "PNG"), OPTIONS) == gray).all()
    assert set(decode_full(encode(Image.fromarray(ramp).convert("1"), "PNG"), OPTIONS).ravel()) == {0, 255}
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        assert (decode_full(encode(deep, kind), OPTIONS) == gray).all()
    for odd in (Image.fromarray(ramp.astype(np.float32)), Image.fromarray(ramp.astype(np.int32) * 99999)):
        assert refused(encode(odd, "TIFF")) == "corrupt"


def test_cmyk_jpeg_is_inverted_and_converted():
    data = encode(picture(60, 40).convert("CMYK"))
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.abs(decode_full(data, OPTIONS).astype(int) - want).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (24, 24), color) for color in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(decode_full(data, OPTIONS).astype(int) - (200, 30, 30)).max() <= 6


def test_a_layout_unknown_to_libjpeg_turbo_falls_to_pillow(monkeypatch):
    def unknown(*_, **__):
        raise KeyError(6)

    data = encode(picture(64, 48))
    want = decode_full(data, OPTIONS)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", unknown)
    assert np.abs(decode_full(data, OPTIONS).astype(int) - want).max() <= 2
    assert refused(data[:-99]) == "truncated"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "notimage"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg"),
        (b"\0" * 4096, "notimage"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 40, "truncated"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 99, "corrupt"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "corrupt"),
    ],
)
def test_what_is_no_image_is_refused(data, reason):
    assert refused(data) == reason


def test_tiny_images_are_refused():
    assert refused(encode(Image.new("RGB", (1, 1)), "GIF")) == refused(encode(Image.new("RGB", (300, 1)))) == "tiny"
    assert refused(encode(picture(30, 9)), OPTIONS._replace(min_side=10)) == "tiny"
    assert decode_train(encode(picture(2, 2)), OPTIONS, draws(0)).shape == (32, 32, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_from_the_header(monkeypatch):
    def explode(*_, **__):
        raise AssertionError("the pixels were decoded")

    small, jpeg, png = (encode(picture(64, 48), kind) for kind in ("PNG", "JPEG", "PNG"))
    at = jpeg.find(b"\xff\xc0") + 5
    bombs = [jpeg[:at] + struct.pack(">HH", 60000, 60000) + jpeg[at + 4 :]]
    for side in (9000, 10000, 60000):  # around Pillow's own limits
        header = png[12:16] + struct.pack(">II", side, side) + png[24:29]
        bombs.append(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    monkeypatch.setattr(simplejpeg, "decode_jpeg", explode)
    monkeypatch.setattr(Image.Image, "load", explode)
    assert [refused(bomb) for bomb in bombs] == ["bomb"] * 4
    assert refused(small, OPTIONS._replace(max_pixels=64 * 48 - 1)) == "bomb"


@settings(deadline=None, max_examples=60)
@given(cut=st.floats(0.02, 0.999), progressive=st.booleans(), inks=st.booleans())
def test_a_cut_jpeg_never_passes(cut, progressive, inks):
    data = encode(picture(96, 64).convert("CMYK" if inks else "RGB"), progressive=progressive)
    end = min(int(cut * len(data)), len(data) - 3)  # what lacks only its end mark is whole
    assert refused(data[:end]) in ("truncated", "corrupt")


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["PNG", "WEBP", "GIF", "BMP", "TIFF"]), cut=st.floats(0.0, 0.999))
def test_any_other_cut_image_is_whole_or_refused(kind, cut):
    data = encode(picture(96, 64), kind)
    try:
        got = decode_full(data[: int(cut * len(data))], OPTIONS)
    except Undecodable as error:
        assert error.reason in ("truncated", "corrupt", "notimage", "empty")
    else:
        assert (got == decode_full(data, OPTIONS)).all()


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 20))
def test_damage_gives_pixels_or_a_reason_and_nothing_else(kind, seed, count):
    rng = np.random.default_rng(seed)
    data = np.frombuffer(encode(picture(48, 40), kind), np.uint8).copy()
    data[rng.integers(0, len(data), count)] = rng.integers(0, 256, count)
    try:
        assert decode_train(data.tobytes(), OPTIONS._replace(max_pixels=1 << 20), draws(0)).shape == (32, 32, 3)
    except Undecodable as error:
        assert error.reason in ("truncated", "corrupt", "notimage", "bomb", "tiny", "trailing")


def test_threads_and_later_calls_leave_a_result_alone():
    data = [encode(picture(200 + 7 * i, 150 + 5 * i, i), kind) for i, kind in enumerate(["JPEG", "PNG"] * 8)]
    alone = [decode_train(d, OPTIONS, draws(i)) for i, d in enumerate(data)]
    again = [decode_train(d, OPTIONS, draws(i)) for i, d in enumerate(data)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: decode_train(data[i % 16], OPTIONS, draws(i % 16)), range(64)))
    for i, result in enumerate([*again, *together]):
        assert (result == alone[i % 16]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0, 1)},
        {"crop_scale": (0.5, 1.1)},
        {"crop_ratio": (2, 1)},
        {"fit": "pad"},
        {"fit": "squash", "crop": "side"},
        {"crop": "centre"},
        {"dct_margin": 0},
        {"size": 0},
        {"min_side": 0},
    ],
)
def test_senseless_options_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        decode.check(OPTIONS._replace(**change))
