"""Slow, independent definitions to hold the product code against, and pictures to do it on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fettle.metrics import PixelMetrics, PixelResult

FIVE = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro", "aupro_005")


def loop_aupro(maps: list[NDArray], masks: list[NDArray], limit: float) -> float:
    """AUPRO by its definition: every distinct threshold in turn, straight lines between points."""
    regions = []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(number, labels == label) for label in range(1, count + 1)]
    good = np.concatenate([one[~mask] for one, mask in zip(maps, masks, strict=True)])
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(np.unique(np.concatenate([one.ravel() for one in maps])), reverse=True):
        fpr.append(float(np.mean(good >= threshold)))
        pro.append(float(np.mean([np.mean(maps[number][region] >= threshold) for number, region in regions])))
    return _area(np.array([*fpr, 1.0]), np.array([*pro, 1.0]), limit)


def _area(fpr: NDArray, pro: NDArray, limit: float) -> float:
    below = fpr <= limit
    last = int(np.flatnonzero(below)[-1])
    x, y = list(fpr[below]), list(pro[below])
    if x[-1] < limit:
        slope = (pro[last + 1] - pro[last]) / (fpr[last + 1] - fpr[last])
        x.append(limit)
        y.append(pro[last] + slope * (limit - fpr[last]))
    return float(np.trapezoid(y, x) / limit)


@dataclass(frozen=True)
class Sorted:
    """The five values and F1-max's threshold, from one sort of all pixels in float64."""

    pixel_auroc: float
    pixel_ap: float
    pixel_f1max: float
    aupro: float
    aupro_005: float
    threshold: float


def sorted_oracle(scores: NDArray, region_weight: NDArray) -> Sorted:
    """All metrics of flat scores; `region_weight` is 1 / region size on defect pixels, 0 elsewhere."""
    order = np.argsort(-scores)
    ranked = scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    weight = region_weight[order]
    true_positive = np.cumsum(weight > 0)[last].astype(np.float64)
    false_positive = last + 1 - true_positive
    num_defect, num_good = true_positive[-1], false_positive[-1]
    tpr, fpr = np.append(0, true_positive) / num_defect, np.append(0, false_positive) / num_good
    f1 = 2 * true_positive / (true_positive + false_positive + num_defect)
    pro = np.append(0, np.cumsum(weight)[last])
    pro /= pro[-1]
    return Sorted(
        pixel_auroc=float(np.trapezoid(tpr, fpr)),
        pixel_ap=float(np.sum(np.diff(tpr) * true_positive / (last + 1))),
        pixel_f1max=float(f1.max()),
        aupro=_area(fpr, pro, 0.3),
        aupro_005=_area(fpr, pro, 0.05),
        threshold=float(ranked[last[np.argmax(f1)]]),
    )


def region_weights(masks: NDArray) -> NDArray[np.float64]:
    """1 / (size of its region) on the defect pixels of masks (n, H, W), 0 elsewhere."""
    weights = np.zeros(masks.shape)
    for mask, weight in zip(masks, weights, strict=True):
        labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        weight[mask] = 1 / np.bincount(labels.ravel())[labels[mask]]
    return weights


def smooth_pictures(number: int, side: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Maps and masks (n, side, side): a standardised smooth random field, blurred defects on six of ten."""
    rng = np.random.default_rng(seed)
    maps, masks = np.empty((number, side, side)), np.zeros((number, side, side), bool)
    row, column = np.mgrid[:side, :side]
    for index in range(number):
        noise = ndimage.zoom(rng.gamma(4, 0.25, (side // 8, side // 8)), 8, order=1)
        maps[index] = ndimage.gaussian_filter(noise, 4 * side / 256)
        for _ in range(rng.integers(1, 4) if index % 10 < 6 else 0):
            y, x = rng.uniform(0.1, 0.9, 2) * side
            height, width = np.maximum(0.01 * 12 ** rng.random(2) * side, 1)
            ellipse = ((row - y) / height) ** 2 + ((column - x) / width) ** 2 <= 1
            masks[index] |= ellipse
            maps[index] += rng.uniform(0.1, 1.2) * ndimage.gaussian_filter(
                ellipse.astype(float), 5 * side / 256
            )
    return ((maps - maps.mean()) / maps.std()).astype(np.float32), masks


def feed(metrics: PixelMetrics, maps: NDArray, masks: NDArray, defect: str = "scratch") -> PixelMetrics:
    """Update with all pictures: those with an empty mask are good."""
    for one, mask in zip(maps, masks, strict=True):
        metrics.update(one, mask, defect=defect if mask.any() else "good")
    return metrics


def five(result: PixelResult | Sorted) -> NDArray[np.float64]:
    """AUROC, AP, F1-max, AUPRO 0.3, AUPRO 0.05."""
    return np.array([getattr(result, name) for name in FIVE], dtype=np.float64)
