"""PaDiM (Defard et al., ICPR workshops 2021, arXiv 2011.08785): a Gaussian at every position.

Each position of the finest grid has a mean and covariance of good features; a position scores its
Mahalanobis distance. Sections named in comments are those of the base methods' specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.pixel_map import pixel_map, valid_tokens
from fettle.protocols import (
    Backbone,
    FeatureBatch,
    FeatureStream,
    FitRecord,
    LeftOut,
    Level,
    Maps,
    Preset,
    Run,
    Traits,
)

_FEW = 20  # below so many pictures the distance is ruled by directions never seen
_MIB = 1 << 20


class PadimConfig(BaseModel):
    """Fields of PaDiM.

    Attributes:
        levels: backbone levels, fine to coarse; None takes strides 4, 8 and 16, or three blocks of a ViT.
        channels: d, channels drawn at random from all levels together, one draw for all positions.
        regulariser: added to each covariance's diagonal.
        grid_stride: average the finer levels to this stride first (8: four times smaller); None: the finest.
        sigma: blur of the map, framed px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: tuple[str, ...] | None = None
    channels: int = Field(default=100, ge=1, le=4096)
    regulariser: float = Field(default=0.01, gt=0, le=100)
    grid_stride: int | None = Field(default=None, ge=2, le=64)
    sigma: float = Field(default=4.0, ge=0, le=100)


class Padim(nn.Module):
    """A Gaussian at every position. See the module's text."""

    name: ClassVar[str] = "padim"
    Config: ClassVar[type[PadimConfig]] = PadimConfig
    traits: ClassVar[Traits] = Traits(
        trained=False,
        multi_class=False,
        few_shot=False,
        fixed_grid=True,
        square_grid=False,
        leave_one_out=True,
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(PadimConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(PadimConfig(channels=550), backbone="wide_resnet50_2", frame="crop", size=256),
    }

    channels: Tensor
    mean: Tensor
    whitening: Tensor
    grid: Tensor

    def __init__(self, backbone: Backbone, config: PadimConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        self.register_buffer("channels", torch.empty(0, dtype=torch.int16))  # (d,), sorted
        self.register_buffer("mean", torch.empty(0, 0))  # (P, d)
        self.register_buffer("whitening", torch.empty(0, 0, dtype=torch.float16))  # (P, d(d+1)/2): W = L^-1
        self.register_buffer("grid", torch.zeros(2, dtype=torch.int64))  # (h, w), P = h w
        self.scale = EnergyScale()
        self._dense: Tensor | None = None  # W unpacked, (P, d, d) fp32; made when first needed
        self._scatter = torch.empty(0)  # sums of squares (P, d, d): known during the fit only
        self._num_fitted = 0

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: PadimConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these."""
        if config.levels is not None:
            return config.levels
        if len({level.stride for level in offered}) > 1:
            return tuple(level.name for level in offered if level.stride in (4, 8, 16))
        blocks = [level.name for level in offered if level.name.startswith("block")]
        return tuple(blocks[len(blocks) * quarter // 4 - 1] for quarter in (1, 2, 3))

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """The drawn channels of each level at its own grid: {level: (B, d_level, h, w)}."""
        by_name = self.backbone(pictures, self.levels)
        first = 0
        features = {}
        for name in self.levels:
            level = by_name[name]
            drawn = self.channels.long()
            own = drawn[(drawn >= first) & (drawn < first + level.shape[1])] - first
            first += level.shape[1]
            features[name] = self._to_grid_stride(level[:, own], pictures)
        return features

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Means and covariances in running sums (section 5.2), then the whitening W = L^-1 in fp16.

        Where the sums do not fit `run.memory_mib`, positions are taken in blocks, a walk each.

        Raises:
            ConfigError: fewer channels than asked for. DataError: fewer than two pictures.
        """
        self._draw_channels(run)
        count, height, width = self._measure(good)
        dims = len(self.channels)
        positions = height * width
        if count < 2:
            raise DataError(
                f"PaDiM needs at least 2 good pictures, not {count}.",
                "Give more, or use --method patchcore, which works from one.",
            )
        room = max(run.memory_mib * _MIB // 2 // (4 * dims * (dims + 1)), 1)
        blocks = math.ceil(positions / room)
        if blocks == 1:
            room = positions
        mean = torch.zeros(positions, dims)
        scatter = torch.zeros(positions, dims, dims)
        for first in range(0, positions, room):
            part = slice(first, min(first + room, positions))
            _accumulate((self._rows(batch.features)[part] for batch in good), mean[part], scatter[part])
        self.grid = torch.tensor([height, width])
        self.mean = mean
        self.whitening = self._whiten(scatter, count, run)
        self._dense = None
        self._scatter, self._num_fitted = scatter, count
        warnings = []
        if count < _FEW:
            warnings.append(
                f"PaDiM learnt from {count} pictures only: with fewer pictures than channels ({dims}), "
                "its distance is ruled by directions never seen."
            )
        return FitRecord({"positions": positions, "channels": dims, "walks": blocks}, warnings)

    @torch.no_grad()
    def left_out(self, good: FeatureStream, run: Run) -> Iterator[LeftOut]:
        """Each picture by the Gaussian that its group is taken out of, exactly (section 8.3).

        Taking g pictures out changes the scatter matrix by a matrix of rank g + 1, so that one Cholesky a
        group size serves all groups of that size (Woodbury).
        """
        sizes = _group_sizes(good)
        for size in sorted({size for size in sizes.values() if self._num_fitted - size >= 2}):
            left = self._num_fitted - size
            basis = self._inverse_root(self.config.regulariser * (left - 1), self._scatter)
            for batch in _by_group(good, sizes, size):
                rows = self._rows(batch.features)  # (P, g, d)
                squared = left_out_distances(rows - self.mean[:, None], basis, left)  # (P, g)
                distance = squared.sqrt().T.reshape(-1, *self.grid.tolist())  # (g, h, w)
                for i, (key, group) in enumerate(zip(batch.keys, batch.groups, strict=True)):
                    valid = batch.valid[i : i + 1]
                    tokens = valid_tokens(valid, (distance.shape[-2], distance.shape[-1]))
                    maps = self._maps(distance[i : i + 1], valid)
                    yield LeftOut(key, group, maps, valid, distance[i : i + 1][tokens])
        self._scatter = torch.empty(0)

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        return self._maps(self._squared_distance(pictures, valid).sqrt(), valid)

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): sqrt(||W (x - mu)||^2 + 1e-8) on the stored scale (section 7); smooth."""
        energy: Tensor = self.scale((self._squared_distance(pictures, valid) + 1e-8).sqrt())
        return energy

    def _squared_distance(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """||W (x - mu)||^2, (B, h, w)."""
        rows = self._rows(self.features(pictures, valid))  # (P, B, d)
        whitened = torch.bmm(rows - self.mean[:, None], self._dense_whitening().mT)
        return whitened.square().sum(dim=2).T.reshape(-1, *self.grid.tolist())

    def _maps(self, distance: Tensor, valid: Tensor) -> Maps:
        anomaly_map = pixel_map(distance, valid, self.config.sigma)
        return Maps(anomaly_map, anomaly_map.flatten(1).amax(dim=1))

    def _rows(self, features: dict[str, Tensor]) -> Tensor:
        """Levels side by side on the finest grid, coarser cells replicated: (P, B, d)."""
        levels = [features[name] for name in self.levels]
        grid = levels[0].shape[-2:]
        if len(self.mean) and tuple(grid) != tuple(self.grid.tolist()) and int(self.grid[0]):
            raise ConfigError(
                f"PaDiM was fitted on a grid of {self.grid.tolist()}, not {list(grid)}.",
                "Use the model's frame.",
            )
        replicated = [
            level if level.shape[-2:] == grid else F.interpolate(level, size=grid, mode="nearest")
            for level in levels
        ]
        return torch.cat(replicated, dim=1).flatten(2).permute(2, 0, 1)

    def _to_grid_stride(self, level: Tensor, pictures: Tensor) -> Tensor:
        stride = self.config.grid_stride
        if stride is None:
            return level
        grid = (pictures.shape[-2] // stride, pictures.shape[-1] // stride)
        return F.adaptive_avg_pool2d(level, grid) if level.shape[-1] > grid[1] else level

    def _draw_channels(self, run: Run) -> None:
        levels = [self.backbone.spec.level(name) for name in self.levels]
        total = sum(level.channels for level in levels if level)
        if self.config.channels > total:
            raise ConfigError(
                f"{self.config.channels} channels cannot be drawn from {total}.",
                f"Use --set channels={total}.",
            )
        order = torch.randperm(total, generator=run.generator("padim/channels"))
        self.channels = order[: self.config.channels].sort().values.to(torch.int16)
        self.mean = torch.empty(0, 0)
        self.grid = torch.zeros(2, dtype=torch.int64)

    def _measure(self, good: FeatureStream) -> tuple[int, int, int]:
        """Number of pictures (views) and the grid's height and width."""
        count = height = width = 0
        for batch in good:
            finest = batch.features[self.levels[0]]
            count += len(finest)
            height, width = finest.shape[-2:]
        return count, height, width

    def _whiten(self, scatter: Tensor, count: int, run: Run) -> Tensor:
        """Packed lower triangles of W = L^-1, with L L^T = scatter / (n - 1) + regulariser I."""
        dims = scatter.shape[-1]
        rows, columns = torch.tril_indices(dims, dims)
        packed = torch.empty(len(scatter), len(rows), dtype=torch.float16)
        for first in range(0, len(scatter), 256):
            part = scatter[first : first + 256] / (count - 1)
            packed[first : first + 256] = self._inverse_root(self.config.regulariser, part)[
                :, rows, columns
            ].half()
            run.progress("whitening", min(first + 256, len(scatter)), len(scatter))
        return packed

    @staticmethod
    def _inverse_root(diagonal: float, matrices: Tensor) -> Tensor:
        """L^-1 of L L^T = matrices + diagonal I, lower triangular, (P, d, d)."""
        eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
        result = torch.empty_like(matrices)
        for first in range(0, len(matrices), 256):
            factor = torch.linalg.cholesky(matrices[first : first + 256] + diagonal * eye)
            result[first : first + 256] = torch.linalg.solve_triangular(factor, eye, upper=False)
        return result

    def _dense_whitening(self) -> Tensor:
        if self._dense is None or self._dense.device != self.whitening.device:
            dims = self.mean.shape[1]
            rows, columns = torch.tril_indices(dims, dims, device=self.whitening.device)
            dense = torch.zeros(len(self.whitening), dims, dims, device=self.whitening.device)
            dense[:, rows, columns] = self.whitening.float()
            self._dense = dense
        return self._dense


def _accumulate(batches: Iterator[Tensor], mean: Tensor, scatter: Tensor) -> None:
    """Running mean (P, d) and sums of squares (P, d, d) over rows (P, b, d), in place (Chan et al.)."""
    count = 0
    for rows in batches:
        size = rows.shape[1]
        batch_mean = rows.mean(dim=1)  # (P, d)
        centred = rows - batch_mean[:, None]
        shift = (batch_mean - mean) * math.sqrt(count * size / (count + size))
        centred = torch.cat([centred, shift[:, None]], dim=1)  # (P, b + 1, d)
        scatter.baddbmm_(centred.mT, centred)
        mean += (batch_mean - mean) * (size / (count + size))
        count += size


def left_out_distances(deviations: Tensor, basis: Tensor, left: int) -> Tensor:
    """Squared distances of g pictures by the Gaussian fitted without all g of them.

    With D the deviations from the mean of all n pictures and n' = n - g, the scatter matrix without them is
    M - U^T U, where U holds D and (g / sqrt(n')) mean(D).

    Args:
        deviations: D, (P, g, d).
        basis: inverse root of M + regulariser (n' - 1) I, (P, d, d).
        left: n', pictures that stay, at least 2.

    Returns:
        (P, g).
    """
    size = deviations.shape[1]
    group_mean = deviations.mean(dim=1, keepdim=True)
    removed = torch.cat([deviations, group_mean * (size / math.sqrt(left))], dim=1)  # U, (P, g + 1, d)
    shifted = deviations + group_mean * (size / left)  # from the mean of those who stay
    z = shifted @ basis.mT  # (P, g, d)
    v = removed @ basis.mT  # (P, g + 1, d)
    inner = torch.eye(size + 1, dtype=v.dtype, device=v.device) - v @ v.mT
    cross = v @ z.mT  # (P, g + 1, g)
    factor, _ = torch.linalg.cholesky_ex(inner + 1e-7 * torch.eye(size + 1, dtype=v.dtype, device=v.device))
    part = torch.linalg.solve_triangular(factor, cross, upper=False)
    squared: Tensor = (z.square().sum(dim=2) + part.square().sum(dim=1)) * (left - 1)
    return squared


def _group_sizes(good: FeatureStream) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for batch in good:
        for group in batch.groups:
            sizes[group] = sizes.get(group, 0) + 1
    return sizes


def _by_group(good: FeatureStream, sizes: dict[str, int], size: int) -> Iterator[FeatureBatch]:
    """The pictures of each group of this size together; a group is never spread over the stream."""
    pending: list[FeatureBatch] = []
    singles = (single for batch in good for single in _split(batch) if sizes[single.groups[0]] == size)
    for _, members in groupby(singles, key=lambda single: single.groups[0]):
        pending = list(members)
        yield FeatureBatch(
            {name: torch.cat([one.features[name] for one in pending]) for name in pending[0].features},
            torch.cat([one.valid for one in pending]),
            tuple(one.keys[0] for one in pending),
            tuple(one.groups[0] for one in pending),
        )


def _split(batch: FeatureBatch) -> Iterator[FeatureBatch]:
    for i in range(len(batch.keys)):
        part = slice(i, i + 1)
        features = {name: tensor[part] for name, tensor in batch.features.items()}
        yield FeatureBatch(features, batch.valid[part], batch.keys[part], batch.groups[part])
