"""The files and strings of `jaxvl bench clients`: one of each kind in which programs disagree."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxvl.bench.photos import scene

ORIENTATION = 0x0112  # the EXIF tag

# In the strings that name an invisible character it is there, written out.
STRINGS = {
    "plain": "a red square over a green circle",
    "capitals": "A Red SQUARE",
    "double spaces": "a  red   square",
    "spaces at the ends": "  a red square ",
    "tabs and line ends": "\ta red\tsquare\r\n",
    "no-break and wide spaces": "a\u00a0red\u2003square\u3000here",
    "zero width, byte order mark": "\ufeffa red\u200bsquare",
    "control characters": "a\x1cred\x00square\x85",
    "composed (NFC)": "caf\u00e9 \u00c5ngstr\u00f6m",
    "decomposed (NFD)": "cafe\u0301 A\u030angstro\u0308m",
    "compatibility (NFKC)": "\ufb01ne \u2460 \uff21\uff22 \u212b",
    "final sigma, sharp s": "\u039f\u0394\u039f\u03a3 STRASSE \u1e9e \u0130",
    "punctuation": "it's a half-open/shut door: 'so', \"no\"! (#1)",
    "other scripts": "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "emoji": "\U0001f600 \U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7",
    "one word": "square",
    "longer than the context": "a red square over a green circle and " * 20,
    "empty": "",
    "only blanks": " \t\n",
    "a special token's text": "a red <eos> square",
}


def write_files(folder: Path, size: int) -> dict[str, Path]:
    """Image files of every kind, by what is special about them; size: pixels a side of the model's images."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = Image.fromarray(scene(np.random.default_rng(0), 1000))
    cut = functools.partial(picture, whole)
    clear = alpha(cut(150, 120))
    jpeg: dict[str, Any] = {"quality": 90}
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "JPEG, as large as the model's": (cut(size, size), "jpg", jpeg),
        "JPEG, slightly larger": (cut(size + 7, size + 4), "jpg", jpeg),
        "JPEG, 640 x 480": (cut(640, 480), "jpg", jpeg),
        "JPEG, 427 x 640": (cut(427, 640), "jpg", jpeg),
        "JPEG, 2000 x 1500": (cut(2000, 1500), "jpg", jpeg),
        "JPEG, tall": (cut(150, 900), "jpg", jpeg),
        "JPEG, wide": (cut(901, 150), "jpg", jpeg),
        "JPEG, smaller than the model's": (cut(40, 33), "jpg", jpeg),
        "JPEG, progressive": (cut(300, 200), "jpg", {**jpeg, "progressive": True}),
        "JPEG, full chroma": (cut(300, 200), "jpg", {**jpeg, "subsampling": 0}),
        "JPEG, grey": (cut(150, 120).convert("L"), "jpg", jpeg),
        "JPEG, CMYK": (cut(150, 120).convert("CMYK"), "jpg", jpeg),
        **{f"JPEG, EXIF orientation {i}": (cut(150, 121), "jpg", {**jpeg, "exif": turned(i)}) for i in (2, 3, 6, 7)},
        "PNG": (cut(150, 120), "png", {}),
        "PNG, EXIF orientation 8": (cut(150, 121), "png", {"exif": turned(8)}),
        "PNG, RGBA": (clear, "png", {}),
        "PNG, grey and alpha": (clear.convert("LA"), "png", {}),
        "PNG, palette": (cut(150, 120).quantize(64), "png", {}),
        "PNG, palette with a transparent colour": (cut(150, 120).quantize(64), "png", {"transparency": 3}),
        "PNG, palette with alpha": (cut(150, 120).quantize(64), "png", {"transparency": bytes(range(0, 256, 4))}),
        "PNG, RGB with a transparent colour": (marked(cut(150, 120)), "png", {"transparency": (255, 0, 255)}),
        "PNG, 1 bit": (cut(150, 120).convert("1"), "png", {}),
        "PNG, 16 bits": (deep(cut(150, 120)), "png", {}),
        "WebP": (cut(150, 120), "webp", {"quality": 90}),
        "WebP, EXIF orientation 6": (cut(150, 121), "webp", {"quality": 90, "exif": turned(6)}),
        "WebP, RGBA": (clear, "webp", {"lossless": True}),
        "GIF, animated": (cut(150, 120).quantize(64), "gif", {"save_all": True, "append_images": [whole.resize((150, 120)).quantize(64)]}),
        "BMP": (cut(150, 120), "bmp", {}),
        "TIFF": (cut(150, 120), "tif", {}),
        "TIFF, orientation 6": (cut(150, 121), "tif", {"exif": turned(6)}),
    }
    paths = {}
    for number, (kind, (image, suffix, options)) in enumerate(made.items()):
        paths[kind] = folder / f"{number:02d}.{suffix}"
        image.save(paths[kind], **options)
    return paths


def picture(whole: Image.Image, width: int, height: int) -> Image.Image:
    """Another part of the scene for each shape, at its own scale."""
    side = min(whole.size)
    scale = min(side / width, side / height)
    return whole.resize((width, height), Image.Resampling.BICUBIC, (0, 0, int(width * scale), int(height * scale)))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def alpha(image: Image.Image) -> Image.Image:
    """The same with a half transparent disc around a transparent one."""
    y, x = np.mgrid[: image.height, : image.width]
    far = np.hypot(y / image.height - 0.5, x / image.width - 0.5)
    image = image.copy()
    image.putalpha(Image.fromarray(np.select([far < 0.15, far < 0.3], [0, 128], 255).astype(np.uint8)))
    return image


def marked(image: Image.Image) -> Image.Image:
    """The same with a square of magenta, which the file calls transparent."""
    image = image.copy()
    image.paste((255, 0, 255), (20, 20, 60, 60))
    return image


def deep(image: Image.Image) -> Image.Image:
    """Its luma in 16 bits a pixel."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
