"""Shards of photograph-like JPEGs with captions, made from nothing, the same for the same seed.

A photograph costs a JPEG decoder by its bytes. Scenes with the 1/f spectrum of natural images, objects with edges and sensor
noise come to 0.2 to 0.3 bytes a pixel at quality 85, as photographs on the web do.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import simplejpeg

from jaxvl.data.resize import resize

WORDS = """
a the of on with near under two three small large old new red blue green yellow dark bright photo view man woman child dog cat
bird horse street house bridge table window tree mountain river lake beach sky cloud road car bicycle boat train night day people
standing sitting running holding wearing white black shirt hat plate bread coffee cup book lamp door garden flower grass snow city
market wall stone wooden metal glass
""".split()
RATIOS = ((1, 1), (4, 3), (4, 3), (3, 2), (3, 2), (16, 9))


def scene(rng: np.random.Generator, side: int) -> np.ndarray:
    """A picture uint8 [side, side, 3]: clouds of all sizes in luma and colour, objects in front of them, noise."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    spectrum = frequency**-1.25

    def clouds() -> np.ndarray:
        waves = spectrum * (rng.normal(size=spectrum.shape) + 1j * rng.normal(size=spectrum.shape))
        field = np.fft.irfft2(waves, (side, side))
        return field / field.std()

    luma, warm, cool = clouds(), clouds(), clouds()
    y, x = np.mgrid[:side, :side] / side
    for _ in range(16):
        centre, radius, turn = rng.uniform(0, 1, 2), rng.uniform(0.02, 0.2, 2), rng.uniform(0, np.pi)
        u, v = (
            (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn),
            (y - centre[1]) * np.cos(turn) - (x - centre[0]) * np.sin(turn),
        )
        inside = np.abs(u / radius[0]) ** 3 + np.abs(v / radius[1]) ** 3 < 1
        for layer in (luma, warm, cool):
            layer[inside] = 0.6 * layer[inside] + rng.normal()
    pixels = 128 + 45 * luma[..., None] + 15 * np.stack([warm, cool / 3 - warm / 2, -cool], -1) + rng.normal(0, 2, (side, side, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_shards(folder: Path, shards: int, per_shard: int, seed: int = 0, sides: tuple[int, int] = (400, 600)) -> dict[str, float]:
    """Write `shards` tars of KEY.jpg, KEY.txt and KEY.json; the longer side is drawn from `sides`. Returns what they hold."""
    rng = np.random.default_rng(seed)
    scenes = [scene(rng, 2 * sides[1]) for _ in range(8)]
    pixels = size = 0
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(per_shard):
                long, (a, b) = int(rng.integers(sides[0], sides[1] + 1)), RATIOS[rng.integers(len(RATIOS))]
                width, height = (long, long * b // a) if rng.random() < 0.65 else (long * b // a, long)
                zoom = rng.uniform(1, 2)
                x, y = rng.uniform(0, 2 * sides[1] - zoom * width), rng.uniform(0, 2 * sides[1] - zoom * height)
                picture = resize(scenes[rng.integers(len(scenes))], (x, y, x + zoom * width, y + zoom * height), height, width)
                jpeg = simplejpeg.encode_jpeg(picture[:, :: rng.choice((-1, 1))].copy(), quality=85, colorsubsampling="420")
                words = rng.choice(WORDS, rng.integers(5, 23))
                meta = json.dumps({"width": width, "height": height}).encode()
                for suffix, data in (("jpg", jpeg), ("txt", " ".join(words).encode()), ("json", meta)):
                    member = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                pixels, size = pixels + width * height, size + len(jpeg)
    samples = shards * per_shard
    return {"samples": samples, "mean_pixels": round(pixels / samples), "bytes_per_pixel": round(size / pixels, 3)}
