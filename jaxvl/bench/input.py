"""`jaxvl bench input`: images per CPU-second of the loader and of a plain webdataset pipeline, over the same shards.

Both read tar shards, decode, take a random resized crop to 224 pixels, tokenise the caption to 77 ids and stack batches of 64;
jaxvl delivers uint8, since it normalises on the device, and the peer normalised floats. Each measurement is a fresh process
with one thread on one core, page cache warm, and the rivals take turns: the ratio is taken inside each round, so a slow spell
of the machine meets both. CPU time counts every thread of the process.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxvl.data import decode, keyed
from jaxvl.data.text import TokenizerOptions, load_tokenizer, train_tokenizer
from jaxvl.terminal import tell

BATCH = 64
OPTIONS = decode.DecodeOptions()
MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PACKAGES = ("grain", "numpy", "pillow", "simplejpeg", "tokenizers", "webdataset")


def loader(folder: Path, margin: float = OPTIONS.dct_margin, resize: Literal["host", "device"] = "host") -> Iterator[int]:
    """jaxvl: shuffled samples of the tar index, turbo decode, banded bicubic, batch tokenising; uint8"""
    from jaxvl.data.stream import DataOptions, open_data, train_batches

    options = DataOptions(
        source=str(folder / "*.tar"), indexes=str(folder / "indexes"), dct_margin=margin, resize=resize, chunk=BATCH, threads=1, workers=0
    )
    tokenizer = load_tokenizer(TokenizerOptions(), folder)
    for batch in train_batches(open_data(options), tokenizer, seed=0, start=0, batch_size=BATCH):
        side = OPTIONS.size if resize == "host" else decode.canvas_side(OPTIONS._replace(dct_margin=margin))
        assert batch.arrays["image"].shape == (BATCH, side, side, 3) and batch.arrays["tokens"].shape == (BATCH, 77)
        yield BATCH


def loader_device(folder: Path) -> Iterator[int]:
    """jaxvl with data.resize=device: canvases leave the host, and the step resizes them (not timed here)"""
    yield from loader(folder, resize="device")


def loader_full(folder: Path) -> Iterator[int]:
    """jaxvl with data.dct_margin=inf: every JPEG decoded at full size"""
    yield from loader(folder, float("inf"))


def peer(folder: Path) -> Iterator[int]:
    """webdataset, Pillow's full decode, crop and antialiased bicubic, float normalisation, tokenising by the sample"""
    import webdataset
    from PIL import Image

    tokenizer = load_tokenizer(TokenizerOptions(), folder)
    draws = np.random.default_rng(0)

    def pixels(image: Image.Image) -> np.ndarray:
        box = decode.random_box(*image.size, OPTIONS, draws.random(decode.UNIFORMS))
        image = image.crop(box).resize((OPTIONS.size, OPTIONS.size), Image.Resampling.BICUBIC)
        return (np.asarray(image, np.float32) / 255 - MEAN) / STD

    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat().decode("pilrgb")
    pairs = samples.to_tuple("jpg", "txt").map_tuple(pixels, lambda caption: tokenizer.encode_batch([caption])[0])
    for images, tokens in pairs.batched(BATCH):
        assert images.shape == (BATCH, OPTIONS.size, OPTIONS.size, 3) and np.shape(tokens) == (BATCH, 77)
        yield BATCH


def decode_full(folder: Path, scale: int = 1) -> Iterator[int]:
    """A limit: libjpeg-turbo decodes images in memory at full size, and nothing else is done"""
    import simplejpeg

    for image in itertools.cycle(list(_jpegs(folder, 256))):
        height, width, *_ = simplejpeg.decode_jpeg_header(image)
        least = (-(-height // scale), -(-width // scale)) if scale > 1 else (0, 0)
        simplejpeg.decode_jpeg(image, fastupsample=True, min_height=least[0], min_width=least[1])
        yield 1


def decode_half(folder: Path) -> Iterator[int]:
    """A limit: the same at half size"""
    yield from decode_full(folder, 2)


def decode_eighth(folder: Path) -> Iterator[int]:
    """The limit of any reader of all the bytes: the same at 1/8 size, little more than entropy decoding"""
    yield from decode_full(folder, 8)


RIVALS = {f.__name__: f for f in (loader, peer, loader_device, loader_full, decode_full, decode_half, decode_eighth)}


def measure(rounds: int, images: int = 1024, shards: int = 4, per_shard: int = 256) -> dict[str, Any]:
    """Make shards, let the rivals take turns `rounds` times, `images` each after twice as many to warm up, and compare them."""
    with tempfile.TemporaryDirectory(prefix="jaxvl-bench-") as name:
        folder = Path(name)
        from jaxvl.bench.photos import write_shards

        made = write_shards(folder, shards, per_shard)
        captions = (tar.extractfile(m).read().decode() for tar, m in _members(folder, ".txt"))  # type: ignore[union-attr]
        train_tokenizer(captions, TokenizerOptions()).save(folder)
        similarity = quality(folder)
        found: dict[str, list[dict[str, float]]] = {rival: [] for rival in RIVALS}
        for _, rival in itertools.product(range(rounds), RIVALS):
            found[rival].append(_run(rival, folder, images))
    rates = {rival: [images / run["cpu_s"] for run in runs] for rival, runs in found.items()}
    ratios = [a / b for a, b in zip(rates["loader"], rates["peer"], strict=True)]
    rows = {
        rival: {
            "what": f.__doc__,
            "images_per_cpu_second": round(statistics.median(rates[rival]), 1),
            "spread": [round(min(rates[rival]), 1), round(max(rates[rival]), 1)],
            "images_per_second": round(statistics.median(images / run["wall_s"] for run in found[rival]), 1),
        }
        for rival, f in RIVALS.items()
    }
    return {
        "images_per_cpu_second": rows["loader"]["images_per_cpu_second"],
        "peer_images_per_cpu_second": rows["peer"]["images_per_cpu_second"],
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
        **similarity,
        "rounds": rounds,
        "images": images,
        "shards": made,
        "rows": rows,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
    }


def quality(folder: Path, images: int = 256) -> dict[str, float]:
    """PSNR in dB of decode_train against Pillow's full decode, crop and antialiased bicubic; the mean is over the squared error."""
    from PIL import Image

    errors = []
    for image, uniforms in zip(_jpegs(folder, images), keyed.uniforms(np.arange(images, dtype=np.uint64), decode.UNIFORMS), strict=False):
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        box = decode.random_box(*picture.size, OPTIONS, uniforms)
        want = np.asarray(picture.crop(box).resize((OPTIONS.size, OPTIONS.size), Image.Resampling.BICUBIC), np.float64)
        errors.append(np.mean((decode.decode_train(image, OPTIONS, uniforms) - want) ** 2))
    decibels = 20 * np.log10(255) - 10 * np.log10([np.mean(errors), np.median(errors), np.max(errors)])
    return dict(zip(("psnr_db", "psnr_db_median", "psnr_db_worst"), decibels.round(1).tolist(), strict=True))


def _members(folder: Path, suffix: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from ((tar, member) for member in tar if member.name.endswith(suffix))


def _jpegs(folder: Path, most: int) -> Iterator[bytes]:
    for tar, member in itertools.islice(_members(folder, ".jpg"), most):
        yield tar.extractfile(member).read()  # type: ignore[union-attr]


def _run(rival: str, folder: Path, images: int) -> dict[str, float]:
    """One measurement in its own process."""
    env = {**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxvl.bench.input", rival, str(folder), str(images)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the measurement of {rival} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _work(rival: str, folder: Path, images: int) -> dict[str, float]:
    """Time of `images` images of a rival in this process, which has one core from here on."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stream = RIVALS[rival](folder)
    _take(stream, 2 * images)
    wall, cpu = time.perf_counter(), time.process_time()
    _take(stream, 2 * images)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stream.close()  # type: ignore[attr-defined]
    return {"cpu_s": cpu, "wall_s": wall}


def _take(stream: Iterator[int], images: int) -> None:
    while images > 0:
        images -= next(stream)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(config: str | None = None, overrides: Sequence[str] = (), *, rounds: int = 3) -> int:
    """Entry point of `jaxvl bench input`; prints one JSON object."""
    if config or overrides:
        raise ValueError("bench input measures the default loader over shards of its own; it takes no --config")
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it takes 1 or more, 3 for a claim")
    tell(json.dumps(measure(rounds), indent=2))
    return 0


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="One measurement, in this process.")
    arguments.add_argument("rival", choices=RIVALS)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("images", type=int)
    given = arguments.parse_args()
    tell(json.dumps(_work(given.rival, given.folder, given.images)))
    os._exit(0)  # threads that still prepare the next batches have nothing left to say
