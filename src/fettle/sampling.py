"""Bilinear resampling and Gaussian blur as matrices.

Both are linear and separable, so a map P is resized and blurred by `rows @ P @ columns.T`. One
definition serves training, inspection and export, in NumPy and in torch alike.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=64)
def bilinear_matrix(num_out: int, num_in: int) -> NDArray[np.float64]:
    """(num_out, num_in): linear, half-pixel centres (`align_corners=False`), no antialias."""
    position = (np.arange(num_out) + 0.5) * num_in / num_out - 0.5
    position = np.clip(position, 0, num_in - 1)
    lower = np.minimum(np.floor(position).astype(int), num_in - 1)
    upper = np.minimum(lower + 1, num_in - 1)
    weight = position - lower
    matrix = np.zeros((num_out, num_in))
    rows = np.arange(num_out)
    np.add.at(matrix, (rows, lower), 1 - weight)
    np.add.at(matrix, (rows, upper), weight)
    matrix.setflags(write=False)
    return matrix


@lru_cache(maxsize=64)
def gaussian_matrix(num: int, sigma: float) -> NDArray[np.float64]:
    """(num, num): Gaussian blur of radius int(4 sigma + 0.5); half-sample borders (d c b a | a b c d)."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2)) if radius else np.ones(1)
    taps /= taps.sum()
    matrix = np.zeros((num, num))
    rows = np.arange(num)
    for offset, tap in zip(range(-radius, radius + 1), taps, strict=True):
        column = (rows + offset) % (2 * num)  # the symmetric extension has period 2 num
        np.add.at(matrix, (rows, np.where(column < num, column, 2 * num - 1 - column)), tap)
    matrix.setflags(write=False)
    return matrix


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bring a map (h, w) to (height, width), bilinear. The same size gives the same array."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    rows = bilinear_matrix(height, anomaly_map.shape[0]).astype(np.float32)
    columns = bilinear_matrix(width, anomaly_map.shape[1]).astype(np.float32)
    return np.ascontiguousarray(rows @ anomaly_map @ columns.T, dtype=np.float32)
