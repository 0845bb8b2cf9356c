"""Local gradient sharing: neighbouring pixels even out their gradients (section 6.2).

A feature's gradient lies on pixels in a pattern locked to the network's strides, while defects are compact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.refine.settings import F2PADConfig
from fettle.sampling import gaussian_matrix

_LEAST_WEIGHT = 1e-3


class Sharing(Protocol):
    """Evens out gradients (B, C, H, W), 0 outside the region, at iteration t."""

    def __call__(self, gradient: Tensor, t: int) -> Tensor: ...
    def rows(self, keep: Sequence[int]) -> Sharing: ...


class NoSharing:
    """Every pixel keeps its own."""

    def __call__(self, gradient: Tensor, t: int) -> Tensor:
        return gradient

    def rows(self, keep: Sequence[int]) -> NoSharing:
        return self


class BilateralSharing:
    """A mean over neighbours of like colour inside the region: it does not cross the picture's edges.

    Args:
        weights: (B, window^2, H, W), 1 in sum over the window.
        roi: (B, 1, H, W), 0 or 1.
    """

    def __init__(self, weights: Tensor, roi: Tensor) -> None:
        self.weights = weights
        self.roi = roi

    @classmethod
    def of(cls, picture: Tensor, roi: Tensor, window: int, contrast: float) -> BilateralSharing:
        """w_ij proportional to P_j exp(-||X_i - X_j||^2 / (2 contrast^2)), once a picture."""
        batch, _, height, width = picture.shape
        distance = picture.new_zeros(batch, window**2, height, width)
        for number in range(picture.shape[1]):
            channel = picture[:, number : number + 1]
            distance += (neighbours(channel, window)[:, 0] - channel).square()
        weights = torch.exp(-distance / (2 * contrast**2)) * neighbours(roi, window)[:, 0]
        return cls(weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12), roi)

    def __call__(self, gradient: Tensor, t: int) -> Tensor:
        window = round(self.weights.shape[1] ** 0.5)
        return (neighbours(gradient, window) * self.weights[:, None]).sum(dim=2) * self.roi

    def rows(self, keep: Sequence[int]) -> BilateralSharing:
        return BilateralSharing(self.weights[list(keep)], self.roi[list(keep)])


class GaussSharing:
    """A Gaussian mean inside the region, narrower from one part of the run to the next.

    Args:
        roi: (B, 1, H, W), 0 or 1.
        sigmas: px, one for each equal part of the run. iters: length of the run.
    """

    def __init__(self, roi: Tensor, sigmas: Sequence[float], iters: int) -> None:
        self.roi = roi
        self.sigmas = tuple(sigmas)
        self.iters = iters

    def __call__(self, gradient: Tensor, t: int) -> Tensor:
        sigma = self.sigmas[t * len(self.sigmas) // self.iters]
        weight = blurred(self.roi, sigma).clamp_min(_LEAST_WEIGHT)
        return self.roi * blurred(gradient * self.roi, sigma) / weight

    def rows(self, keep: Sequence[int]) -> GaussSharing:
        return GaussSharing(self.roi[list(keep)], self.sigmas, self.iters)


def make_sharing(config: F2PADConfig, picture: Tensor, roi: Tensor) -> Sharing:
    """For pictures (B, 3, H, W) and their regions (B, 1, H, W)."""
    if config.share == "bilateral":
        return BilateralSharing.of(picture, roi, config.share_window, config.share_contrast)
    if config.share == "gauss":
        return GaussSharing(roi, config.share_sigmas, config.iters)
    return NoSharing()


def neighbours(values: Tensor, window: int) -> Tensor:
    """(B, C, H, W) -> (B, C, window^2, H, W): each pixel's neighbours, 0 beyond the sides."""
    batch, channels, height, width = values.shape
    unfolded = F.unfold(values, window, padding=window // 2)
    return unfolded.view(batch, channels, window**2, height, width)


def blurred(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of the last two dimensions, px."""
    rows, columns = (torch.tensor(gaussian_matrix(n, sigma)).to(values) for n in values.shape[-2:])
    return rows @ values @ columns.T
