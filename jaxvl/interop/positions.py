"""Learned positions for another resolution, resized exactly as the code that trained or published them does.

All variants are separable, with half-pixel centres: output pixel i lies at (i + 1/2) · source / target - 1/2 of the source.
"""

from typing import Literal

import numpy as np

# bicubic: a = -0.75, not widened when shrinking (ViT, DINOv2, CLIP, SigLIP in transformers). bicubic_antialias: a = -0.5,
# widened (DINOv2 with registers). bicubic_offset: as bicubic, but at the scale (target + 0.1) / source (DINOv2's own code).
Method = Literal["bicubic", "bicubic_antialias", "bicubic_offset", "bilinear"]


def resize_grid(grid: np.ndarray, target: tuple[int, int], method: Method) -> np.ndarray:
    """A grid of positions float [rows, columns, width] at `target` (rows, columns); the same array where that is its size."""
    if grid.shape[:2] == tuple(target):
        return grid
    rows, columns = (_weights(have, want, method) for have, want in zip(grid.shape[:2], target, strict=True))
    return np.einsum("rh,cw,hwd->rcd", rows, columns, grid.astype(np.float64), optimize=True).astype(grid.dtype)


def resize_table(table: np.ndarray, front: int, target: tuple[int, int], method: Method) -> np.ndarray:
    """A position table [front + patch, width], whose first `front` rows belong to no patch and stay as they are.

    The patches must form a square. Raises ValueError where they do not.
    """
    side = round((len(table) - front) ** 0.5)
    if side * side != len(table) - front:
        raise ValueError(
            f"{len(table)} positions less {front} of class tokens are {len(table) - front} patches, which form no square to resize"
        )
    grid = resize_grid(table[front:].reshape(side, side, -1), target, method)
    return np.concatenate([table[:front], grid.reshape(-1, table.shape[1])])


def _weights(source: int, target: int, method: Method) -> np.ndarray:
    """The matrix [target, source] that resizes one axis; its rows sum to 1."""
    scale = source / (target + 0.1) if method == "bicubic_offset" else source / target
    centre = (np.arange(target) + 0.5) * scale - 0.5
    widen = max(scale, 1.0) if method == "bicubic_antialias" else 1.0
    reach = int(np.ceil(2 * widen))
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-reach, reach + 1)
    kernel = {"bilinear": _triangle, "bicubic_antialias": lambda x: _cubic(x, -0.5)}.get(method, lambda x: _cubic(x, -0.75))
    values = kernel((taps - centre[:, None]) / widen)
    if method == "bicubic_antialias":
        values = np.where((taps >= 0) & (taps < source), values, 0)  # cut at the border; the others repeat the edge
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], np.clip(taps, 0, source - 1)), values)
    return matrix / matrix.sum(1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with slope `a` at 1."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))
