"""Hostile images by seed, and a process that decodes them in a gigabyte: python hostile_images.py FIRST LAST.

It prints a line of JSON for each seed: what came of it, the seconds and the bytes that it took, and how far its pixels are from
those that Pillow makes of the same file. A signal ends it where one image takes longer than LIMIT.
"""

import io
import json
import random
import resource
import signal
import struct
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from odd_images import chunk, encode, exif, ico, photo, png, samsung, scans, segment, tiff, with_chunks, xmp
from PIL import Image, ImageOps, features

from jaxvl.data import decode

LIMIT, SPACE = 20, 1 << 30  # seconds of an image, bytes of address space while it is decoded
HOW = decode.DecodeOptions(size=48)
MODES = {
    "JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "WEBP": ("RGB", "RGBA"), "GIF": ("P", "L", "1"),
    "BMP": ("RGB", "L", "P", "1"), "TIFF": ("RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"), "PPM": ("RGB", "L", "1"), "ICO": ("RGBA", "RGB"),
    "JPEG2000": ("RGB", "RGBA", "L"), "AVIF": ("RGB", "RGBA"), "MPO": ("RGB",),
}  # fmt: skip


def sound(rng: random.Random) -> bytes:
    """An image of a random format, kind and size, with an orientation at a random place."""
    kind = rng.choice([kind for kind in MODES if kind != "AVIF" or features.check("avif")])
    mode, turn, more = rng.choice(MODES[kind]), rng.randrange(10), {}
    image = photo(rng.choice((2, 17, 64, 150)), rng.choice((2, 31, 64, 99)), rng.randrange(99))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode in ("RGBA", "LA"):
        image.putalpha(image.convert("L"))
        image = image.convert(mode)
    else:
        image = image.convert(mode)
    if kind in ("JPEG", "PNG", "WEBP", "MPO", "AVIF") and turn:
        more["exif"] = b"Exif\0\0" + exif(turn)
    if kind == "JPEG":
        more |= {"progressive": rng.random() < 0.4, "restart_marker_blocks": rng.choice((0, 0, 3))}
    if kind == "TIFF":
        more["compression"] = "raw" if mode in ("P", "I;16") else rng.choice(("raw", "tiff_lzw", "tiff_deflate", "packbits"))
        more["tiffinfo"] = {274: min(turn, 8)} if turn else {700: xmp(3)}
    if kind in ("GIF", "WEBP", "TIFF", "PNG") and mode != "I;16" and rng.random() < 0.3:
        more |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    return encode(image, kind, **more)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` flipped, cut, filled, or with a stretch of it doubled, moved or overwritten by a number that is too large."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(8):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 3, 20))):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            return cut(rng, data)
        case 3:
            out[at:] = bytes(len(out) - at + rng.choice((0, 4000)))
        case 4:
            out[at:at] = out[at : at + rng.randrange(1, 200)] * rng.choice((1, 1, 400))
        case 5:  # in the headers
            at = rng.randrange(min(200, len(out)))
            out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\x20\0", b"\0\x20\0\0", b"\x7f\xff\xff\xff", bytes(4)))
        case 6:
            del out[at : at + rng.randrange(1, 60)]
        case 7:
            out += rng.choice((samsung(), bytes(5000), data, rng.randbytes(300)))
    return bytes(out)


def cut(rng: random.Random, data: bytes) -> bytes:
    """`data` without its end, mostly a few bytes."""
    return data[: -rng.choice((1, 2, 5, rng.randrange(1, 40), rng.randrange(1, len(data))))]


def large(rng: random.Random) -> bytes:
    """An image that takes far more than its bytes, or says so."""
    side = rng.choice((3000, 6000, 8192, 13_000, 60_000))
    size = rng.choice(((side, side), (side, 2), (2, side), (1 << 24, 2), (2, 1 << 24)))
    flat = Image.new(rng.choice(("L", "1")), (min(size[0], 16_000), min(size[1], 4000)))
    webp = encode(photo(), "WEBP", lossless=True)
    jp2 = encode(photo(), "JPEG2000")
    siz, cut = jp2.index(b"\xff\x4f\xff\x51") + 8, encode(flat, "PNG")
    makers = (
        lambda: png(*size, *rng.choice(((0, 1), (2, 8), (3, 8), (6, 16), (0, 16)))),
        lambda: cut,
        lambda: ico(png(*size)),
        lambda: ico(cut),
        lambda: tiff(*size, 64, rng.choice("<>")),
        lambda: tiff(64, 64, side, rng.choice("<>")),
        lambda: tiff(64, 64, 64, tags=tuple((40_000 + i, 1, 90_000, 8) for i in range(3000))) + bytes(90_000),
        lambda: webp[:21] + (min(size[0], 16_384) - 1 | min(size[1], 16_384) - 1 << 14).to_bytes(4, "little") + webp[25:],
        lambda: jp2[:siz] + struct.pack(">2L", *size) + jp2[siz + 8 :],
        lambda: jp2[:siz] + struct.pack(">6L", *size, 0, 0, 16, 16) + jp2[siz + 24 :],
        lambda: scans(rng.choice((64, 512, 2048)), rng.choice((1, 3))),
        lambda: encode(
            flat.convert("L"), rng.choice(("JPEG", "WEBP", "GIF", "BMP", "TIFF")), **({"progressive": True} if side > 6000 else {})
        ),
        lambda: with_chunks(encode(photo(), "PNG"), chunk(b"zTXt", b"k\0\0" + cut) * rng.choice((1, 2000))),
        lambda: encode(photo())[:2] + segment(0xE1, b"Exif\0\0MM\0*" + rng.randbytes(60_000)) * 40 + encode(photo())[2:],
        lambda: b"P%d\n%d %d\n%d\n" % (rng.randrange(1, 7), *size, rng.choice((1, 99, 255, 65_535))) + bytes(100_000),
        lambda: b"P6\n#" + b"x" * (1 << 20) + b"\n8 8\n255\n" + bytes(192),
        lambda: encode(photo().quantize(9), "GIF", comment=b"y" * (1 << 20)),
    )
    return rng.choice(makers)()


def largest(number: int) -> bytes:
    """Sound images of about the most pixels that are decoded, one a kind."""
    plain = lambda mode, side: Image.new(mode, (side, side - 8))
    kinds = (
        lambda: encode(plain("RGB", 8192), "PNG", compress_level=1),
        lambda: encode(plain("P", 8192), "PNG", compress_level=1, transparency=0),
        lambda: encode(plain("I;16", 8192), "PNG", compress_level=1),
        lambda: encode(Image.new("RGB", (14_000_000, 4)), "PNG", compress_level=1),
        lambda: encode(plain("CMYK", 8192)),
        lambda: encode(plain("RGB", 7600), progressive=True, subsampling=0),
        lambda: encode(plain("RGBA", 5300), "WEBP", lossless=True),
        lambda: encode(plain("RGBA", 5600), "AVIF", speed=10) if features.check("avif") else encode(plain("L", 99)),
        lambda: encode(plain("RGBA", 3600), "JPEG2000"),
        lambda: encode(plain("RGBA", 6900), "TIFF", compression="tiff_lzw", tiffinfo={278: 6900}),
    )
    return kinds[number]()


def hostile(seed: int) -> tuple[bytes, bytes | None]:
    """The image of a seed, and the one that it is, or was before its end was cut off, where it is that; below zero, the largest ones."""
    if seed < 0:
        return (data := largest(-1 - seed)), data
    rng = random.Random(seed)
    choice, data = rng.random(), sound(rng)
    if choice < 0.3:
        return (data if choice < 0.15 else cut(rng, data)), data
    return (large(rng) if choice < 0.5 else damaged(rng, data)), None


def by_pillow(data: bytes) -> np.ndarray | None:
    """What Pillow makes of a file that it reads whole: upright, on white, its deep levels scaled; None of any other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = Image.open(io.BytesIO(data))
            if opened.width * opened.height > 1 << 22:
                return None
            image = ImageOps.exif_transpose(opened)
    except Exception:
        return None
    if image.mode.startswith("I"):
        return np.repeat(np.round(np.asarray(image) / 257)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255,) * 4)
        white.alpha_composite(image)
        image = white
    return np.asarray(image.convert("RGB"))


def memory(name: str) -> int:
    """A number of bytes from this process's status."""
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1])


def tried(seed: int) -> dict[str, object]:
    """What came of a seed."""
    data, origin = hostile(seed)  # which takes more than decoding it, and so has no limit yet
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)  # of its own time, and of the clock where it waits for something
    signal.alarm(10 * LIMIT)
    out: dict[str, object] = {"seed": seed, "start": data[:8].hex(), "sound": data == origin}
    try:
        uniforms = np.random.default_rng(abs(seed)).random(decode.UNIFORMS)
        shapes = decode.decode_eval(data, HOW).shape, decode.decode_eval(data, HOW._replace(fit="squash")).shape
        assert shapes == ((48, 48, 3),) * 2 == (decode.decode_train(data, HOW, uniforms).shape,) * 2
        decode.decode_canvas(data, HOW, uniforms)
        out["came"] = "pixels"
    except decode.Undecodable as error:
        out["came"], out["detail"] = error.reason, str(error)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.alarm(0)
    out |= {"seconds": time.process_time() - begin, "bytes": memory("VmHWM") - before}
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    want = by_pillow(data)
    if want is None and origin is not None:
        want = by_pillow(origin)  # a cut image is whole or refused
    if want is not None and out["came"] == "pixels":
        got = decode.decode_full(data, HOW)
        out["off"] = float(np.abs(got - want.astype(float)).mean()) if got.shape == want.shape else 999.0
    return out | {"pillow": want is not None}


if __name__ == "__main__":
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        print(json.dumps({"seed": number}), flush=True)
        print(json.dumps(tried(number)), flush=True)
