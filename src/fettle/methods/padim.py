"""PaDiM (Defard et al., ICPR workshops 2021, arXiv 2011.08785): a Gaussian at every position.

Each position of the finest grid has a mean and covariance of good features; a position scores its
Mahalanobis distance. Sections named in comments are those of the base methods' specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.channel_reduction import ChannelReduction, ReductionKind
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.pixel_map import pixel_map
from fettle.protocols import (
    Backbone,
    FeatureBatch,
    FeatureStream,
    FitRecord,
    Json,
    LeftOut,
    Level,
    Maps,
    Preset,
    Run,
    Traits,
)

_TOGETHER = 4  # pictures; a multiplication by W waits for memory, and one picture takes as long
_FEW = 20  # below so many pictures the distance is ruled by directions never seen
_MIB = 1 << 20
_TOGETHER = 16  # pictures that are left out at once: the basis is then read once for all of them
_PART = 256  # positions that are factorised at once


class PadimConfig(BaseModel):
    """Fields of PaDiM.

    Attributes:
        levels: backbone levels, fine to coarse; None takes strides 4, 8 and 16, or three blocks of a ViT.
        channels: d, channels that are kept of all levels together, the same at all positions.
        reduction: how they are chosen, at random: "draw" as in the paper, or "orthogonal" projections (see
            `layers.channel_reduction`), whose outcome hangs less on the seed where few of many are kept.
            "auto" projects where less than half are kept.
        regulariser: least that is added to each covariance's diagonal; the paper's 0.01.
        shrinkage: share of the features' mean variance that is added instead where it is more, for backbones
            whose features are of a larger scale than a ResNet's. A tenth is what good pictures that were
            left out find likeliest (`benchmarks/padim_shrinkage.py`).
        grid_stride: average the finer levels to this stride first (8: four times smaller); None: the finest.
        sigma: blur of the map, framed px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    levels: tuple[str, ...] | None = None
    channels: int = Field(default=100, ge=1, le=4096)
    reduction: Literal["auto", "draw", "orthogonal"] = "auto"
    regulariser: float = Field(default=0.01, gt=0, le=100)
    shrinkage: float = Field(default=0.1, ge=0, le=10)
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
        exports=("onnx", "openvino", "pt2"),
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(PadimConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(
            PadimConfig(channels=550, reduction="draw", shrinkage=0),
            backbone="wide_resnet50_2",
            frame="crop",
            size=256,
        ),
    }

    mean: Tensor
    whitening: Tensor
    grid: Tensor

    def __init__(self, backbone: Backbone, config: PadimConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        known = [backbone.spec.level(name) for name in levels]
        sizes = [level.channels for level in known if level]
        kind: ReductionKind = "orthogonal" if 2 * config.channels < sum(sizes) else "draw"
        if config.reduction != "auto":
            kind = config.reduction
        self.reduction = ChannelReduction(sizes, config.channels, kind)
        self.register_buffer("mean", torch.empty(0, 0))  # (P, d)
        self.register_buffer("whitening", torch.empty(0, 0, dtype=torch.float16))  # (P, d(d+1)/2): W = L^-1
        self.register_buffer("grid", torch.zeros(2, dtype=torch.int64))  # (h, w), P = h w
        self.scale = EnergyScale()
        self._dense: Tensor | None = None  # W unpacked, (P, d, d), in the mean's type; made when first needed
        # Known during the fit only: sums of squares (P, d, d) of the last block, their sum over all positions
        # and channels, and the blocks of positions.
        self._scatter = torch.empty(0)
        self._squares = 0.0
        self._blocks: list[slice] = []
        self._num_fitted = 0
        self._diagonal = config.regulariser

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
        """The kept channels of each level at its own grid: {level: (B, d_level, h, w)}."""
        by_name = self.backbone(pictures, self.levels)
        reduced = self.reduction([by_name[name] for name in self.levels])
        return {
            name: self._to_grid_stride(level, pictures)
            for name, level in zip(self.levels, reduced, strict=True)
        }

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Means and covariances in running sums (section 5.2), then the whitening W = L^-1 in fp16.

        Where the sums of squares do not fit `run.memory_mib`, positions are taken in blocks, a walk each.

        Raises:
            ConfigError: fewer channels than asked for, or a regulariser that is too small for the numbers.
            DataError: no picture, or features that are NaN or infinite.
        """
        self._choose_channels(run)
        count = self._measure(good)
        dims = self.config.channels
        if not count:
            raise DataError("There is no good picture to learn from.", "Give a folder of good pictures.")
        if not bool(torch.isfinite(self.mean).all()):
            raise DataError("Features of good pictures hold NaN or inf.", "Check the backbone's weights.")
        self._num_fitted = count
        freedom = max(count - 1, 1)  # one picture has no squares: its covariance is the diagonal alone
        self._diagonal = self._diagonal_of(self._squares / (freedom * self.mean.numel()))
        self._blocks = _blocks(len(self.mean), 4 * dims * dims, run.memory_mib)
        rows, columns = torch.tril_indices(dims, dims)
        self.whitening = torch.empty(len(self.mean), len(rows), dtype=torch.float16, device=self.mean.device)
        for block in self._blocks:
            self._scatter = self._scatter_of(block, good)
            for part in _parts(block):
                inside = slice(part.start - block.start, part.stop - block.start)
                root = _inverse_root(self._diagonal, self._scatter[inside] / freedom)
                self.whitening[part] = root[:, rows, columns].half()
                run.progress("whitening", part.stop, len(self.mean))
        if not bool(torch.isfinite(self.whitening).all()):  # entries reach 1 / sqrt(regulariser)
            raise _too_small("the whitening exceeds half precision, in which it is stored")
        self._dense = None
        warnings = []
        if count == 1:
            warnings.append(
                "PaDiM learnt from 1 picture: there is no covariance, and its distance is the plain one to "
                "this picture's features at the same position."
            )
        elif count < _FEW:
            warnings.append(
                f"PaDiM learnt from {count} pictures only: with fewer pictures than channels ({dims}), "
                "its distance is ruled by directions never seen."
            )
        facts: dict[str, Json] = {
            "positions": len(self.mean),
            "channels": dims,
            "walks": len(self._blocks),
            "diagonal": self._diagonal,
        }
        return FitRecord(facts, warnings)

    @torch.no_grad()
    def left_out(self, good: FeatureStream, run: Run) -> Iterator[LeftOut]:
        """Each picture by the Gaussian that its group is taken out of, exactly (section 8.3).

        Taking g pictures out changes the sums of squares by a matrix of rank g + 1 (Woodbury), and the
        diagonal by what they add to the variance. In the axes of the sums of squares a diagonal costs
        nothing, so that one eigendecomposition a position serves every group.
        """
        sizes = _group_sizes(good)
        fitting = sorted({size for size in sizes.values() if self._num_fitted - size >= 2})
        if not fitting:
            self._scatter = torch.empty(0)
            return
        diagonals = {
            group: diagonal
            for size in fitting
            for batch in _by_group(good, sizes, size)
            for group, diagonal in self._diagonals_without(batch, size)
        }
        squared: dict[str, Tensor] = {}  # by picture, (P,)
        for block in self._blocks:
            if len(self._blocks) > 1:
                self._scatter = self._scatter_of(block, good)
            axes = scatter_axes(self._scatter)
            for size in fitting:
                for batch in _by_group(good, sizes, size):
                    deviations = self._deviations(batch, size)[block]  # (block, G, g, d)
                    of_group = torch.tensor([diagonals[group] for group in batch.groups[::size]])
                    left = self._num_fitted - size
                    distances = left_out_distances(deviations, axes, of_group.to(deviations), left)
                    for key, one in zip(batch.keys, distances.flatten(1).T, strict=True):
                        squared.setdefault(key, self.mean.new_empty(len(self.mean)))[block] = one
        self._scatter = torch.empty(0)
        for batch in good:
            for single in _split(batch):
                (key,), (group,) = single.keys, single.groups
                if key in squared:
                    distance = squared.pop(key).sqrt().reshape(1, *self.grid.tolist())
                    maps = self._maps(distance, single.valid)
                    yield LeftOut(key, group, maps, single.valid, distance)

    def _deviations(self, batch: FeatureBatch, size: int) -> Tensor:
        """Deviations from the mean, groups of `size` pictures apart: (P, G, g, d)."""
        deviations = self._rows(batch.features) - self.mean[:, None]
        return deviations.reshape(len(deviations), -1, size, deviations.shape[2])

    def _diagonals_without(self, batch: FeatureBatch, size: int) -> Iterator[tuple[str, float]]:
        """The diagonal that a fit without each group would have."""
        left = self._num_fitted - size
        deviations = self._deviations(batch, size)
        group_mean = deviations.mean(dim=2)
        removed = deviations.square().sum(dim=(0, 2, 3))
        removed += group_mean.square().sum(dim=(0, 2)) * size**2 / left
        for group, share in zip(batch.groups[::size], removed.tolist(), strict=True):
            yield group, self._diagonal_of((self._squares - share) / ((left - 1) * self.mean.numel()))

    def _diagonal_of(self, variance: float) -> float:
        return max(self.config.regulariser, self.config.shrinkage * variance)

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        return self._maps(self._squared_distance(pictures, valid).sqrt(), valid)

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): sqrt(||W (x - mu)||^2 + 1e-8) on the stored scale (section 7); smooth."""
        energy: Tensor = self.scale((self._squared_distance(pictures, valid) + 1e-8).sqrt())
        return energy

    def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
        """The same of parts of frames, by the Gaussians of their own places; (B, h, w)."""
        parts = self._side_by_side(self.features(pictures, valid))  # (B, d, h, w)
        height, width = parts.shape[-2:]
        stride = pictures.shape[-2] // height
        whitening = self._dense_whitening()
        places = torch.arange(len(self.mean), device=parts.device).reshape(self.grid.tolist())
        squared = []
        for part, (top, left) in zip(parts, origins, strict=True):
            first, second = top // stride, left // stride
            cells = places[first : first + height, second : second + width].flatten()
            deviations = part.flatten(1).T - self.mean[cells]  # (p, d)
            whitened = torch.bmm(whitening[cells], deviations[:, :, None])[:, :, 0]
            squared.append(whitened.square().sum(dim=1).reshape(height, width))
        energy: Tensor = self.scale((torch.stack(squared) + 1e-8).sqrt())
        return energy

    def _squared_distance(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """||W (x - mu)||^2, (B, h, w)."""
        features = self.features(pictures, valid)
        deviations = self._rows(features) - self.mean[:, None]  # (P, B, d)
        whitening = self._dense_whitening().mT
        if torch.compiler.is_exporting():
            whitened = torch.bmm(deviations, whitening)
        else:  # always so many pictures: how a product rounds depends on their number
            padded = F.pad(deviations, (0, 0, 0, -deviations.shape[1] % _TOGETHER))
            parts = (padded[:, first : first + _TOGETHER] for first in range(0, padded.shape[1], _TOGETHER))
            each = [torch.bmm(part.contiguous(), whitening) for part in parts]
            whitened = torch.cat(each, dim=1)[:, : deviations.shape[1]]
        return torch.unflatten(whitened.square().sum(dim=2).T, 1, features[self.levels[0]].shape[-2:])

    def _maps(self, distance: Tensor, valid: Tensor) -> Maps:
        anomaly_map = pixel_map(distance, valid, self.config.sigma)
        return Maps(anomaly_map, anomaly_map.flatten(1).amax(dim=1))

    def _rows(self, features: dict[str, Tensor]) -> Tensor:
        """All levels' channels at each position of the whole grid: (P, B, d)."""
        joined = self._side_by_side(features)
        grid = joined.shape[-2:]
        if torch.compiler.is_exporting():  # a traced grid is known by its shape alone
            return joined.flatten(2).permute(2, 0, 1)
        if len(self.mean) and tuple(grid) != tuple(self.grid.tolist()) and int(self.grid[0]):
            raise ConfigError(
                f"PaDiM was fitted on a grid of {self.grid.tolist()}, not {list(grid)}.",
                "Use the model's frame.",
            )
        return joined.flatten(2).permute(2, 0, 1)

    def _side_by_side(self, features: dict[str, Tensor]) -> Tensor:
        """Levels on the finest grid, coarser cells replicated, (B, d, h, w)."""
        levels = [features[name] for name in self.levels]
        grid = levels[0].shape[-2:]
        replicated = [
            level if level.shape[-2:] == grid else F.interpolate(level, size=grid, mode="nearest")
            for level in levels
        ]
        return torch.cat(replicated, dim=1)

    def _to_grid_stride(self, level: Tensor, pictures: Tensor) -> Tensor:
        stride = self.config.grid_stride
        if stride is None:
            return level
        grid = (pictures.shape[-2] // stride, pictures.shape[-1] // stride)
        return F.adaptive_avg_pool2d(level, grid) if level.shape[-1] > grid[1] else level

    def _choose_channels(self, run: Run) -> None:
        total = sum(self.reduction.sizes)
        if self.config.channels > total:
            raise ConfigError(
                f"{self.config.channels} channels cannot be kept of {total}.",
                f"Use --set channels={total}.",
            )
        self.reduction.choose(run.generator("padim/channels"))
        self.mean = torch.empty(0, 0)
        self.grid = torch.zeros(2, dtype=torch.int64)

    def _measure(self, good: FeatureStream) -> int:
        """Walk once: set the mean, the grid and the sum of all squares about the mean; number of pictures."""
        count = 0
        mean = squares = torch.empty(0)
        for batch in good:
            rows = self._rows(batch.features)  # (P, b, d)
            if not count:
                grid = batch.features[self.levels[0]].shape[-2:]
                mean, squares = rows.new_zeros(rows.shape[0], rows.shape[2]), rows.new_zeros(len(rows))
            centred, shift = _centred(rows, mean, count)
            squares += centred.square().sum(dim=(1, 2))
            mean += shift
            count += rows.shape[1]
        if count:
            self.mean, self.grid, self._squares = mean, torch.tensor(grid), float(squares.double().sum())
        return count

    def _scatter_of(self, block: slice, good: FeatureStream) -> Tensor:
        """Sums of squares about the mean of a block of positions, (P, d, d), in one walk (Chan et al.)."""
        dims = self.config.channels
        mean = self.mean.new_zeros(block.stop - block.start, dims)
        scatter = self.mean.new_zeros(block.stop - block.start, dims, dims)
        accumulate((self._rows(batch.features)[block] for batch in good), mean, scatter)
        return scatter

    def _dense_whitening(self) -> Tensor:
        mean = self.mean
        if self._dense is None or (self._dense.device, self._dense.dtype) != (mean.device, mean.dtype):
            dims = mean.shape[1]
            with torch.inference_mode(False):  # kept for later calls, which may want gradients
                rows, columns = torch.tril_indices(dims, dims, device=mean.device)
                dense = mean.new_zeros(len(self.whitening), dims, dims)
                dense[:, rows, columns] = self.whitening.to(mean)
            self._dense = dense
        return self._dense


def _too_small(why: str) -> ConfigError:
    return ConfigError(
        f"PaDiM's regulariser is too small: {why}.", "Raise regulariser or shrinkage with --set."
    )


def accumulate(batches: Iterator[Tensor], mean: Tensor, scatter: Tensor) -> None:
    """Running mean (P, d) and sums of squares (P, d, d) over rows (P, b, d), in place (Chan et al.)."""
    count = 0
    for rows in batches:
        centred, shift = _centred(rows, mean, count)
        scatter.baddbmm_(centred.mT, centred)
        mean += shift
        count += rows.shape[1]


def _centred(rows: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows whose squares belong to the sums of squares after `count` earlier rows, and the mean's shift.

    (P, b, d), (P, d) -> (P, b + 1, d): deviations from the batch's own mean, and the mean's own share.
    """
    size = rows.shape[1]
    batch_mean = rows.mean(dim=1)  # (P, d)
    apart = batch_mean - mean
    share = apart * math.sqrt(count * size / (count + size))
    return torch.cat([rows - batch_mean[:, None], share[:, None]], dim=1), apart * (size / (count + size))


def _blocks(positions: int, bytes_each: int, memory_mib: int) -> list[slice]:
    """Blocks of positions whose sums of squares, and one copy of them, fit the memory."""
    room = max(memory_mib * _MIB // (2 * bytes_each), 1)
    return [slice(first, min(first + room, positions)) for first in range(0, positions, room)]


def _parts(block: slice) -> Iterator[slice]:
    """A block in small parts, for factorisations that make copies."""
    for first in range(block.start, block.stop, _PART):
        yield slice(first, min(first + _PART, block.stop))


def _inverse_root(diagonal: float, matrices: Tensor) -> Tensor:
    """L^-1 of L L^T = matrices + diagonal I, lower triangular, (P, d, d)."""
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    result = torch.empty_like(matrices)
    for first in range(0, len(matrices), _PART):
        factor, failed = torch.linalg.cholesky_ex(matrices[first : first + _PART] + diagonal * eye)
        if bool(failed.any()):
            raise _too_small("a covariance is not positive definite in single precision")
        result[first : first + _PART] = torch.linalg.solve_triangular(factor, eye, upper=False)
    return result


def scatter_axes(scatter: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors (P, d, d), in columns, and eigenvalues (P, d) of sums of squares, none below 0.

    Decomposed in double precision, in parts, since small eigenvalues carry the distance.
    """
    vectors, values = torch.empty_like(scatter), scatter.new_empty(scatter.shape[:2])
    for part in _parts(slice(0, len(scatter))):
        own_values, own_vectors = torch.linalg.eigh(scatter[part].double())
        vectors[part], values[part] = own_vectors.to(scatter), own_values.clamp_min(0).to(scatter)
    return vectors, values


def left_out_distances(
    deviations: Tensor, axes: tuple[Tensor, Tensor], diagonals: Tensor, left: int
) -> Tensor:
    """Squared distances of the pictures of G groups, each by the Gaussian fitted without all g of its group.

    With D a group's deviations from the mean of all n pictures and n' = n - g, the sums of squares without it
    are M - U^T U, where U holds D and (g / sqrt(n')) mean(D).

    Args:
        deviations: D, (P, G, g, d).
        axes: of M, see `scatter_axes`.
        diagonals: what the fit without each group adds to its covariances, (G,).
        left: n', pictures that stay, at least 2.

    Returns:
        (P, G, g).

    Raises:
        ConfigError: a diagonal so small against the deviations that the answer would be rounding.
    """
    vectors, values = axes
    size = deviations.shape[2]
    turned = (deviations.flatten(1, 2) @ vectors).reshape(deviations.shape)
    y = turned * (values[:, None] + diagonals[:, None] * (left - 1)).rsqrt()[:, :, None]  # (P, G, g, d)
    group_mean = y.mean(dim=2, keepdim=True)
    v = torch.cat([y, group_mean * (size / math.sqrt(left))], dim=2)  # U, (P, G, g + 1, d)
    z = y + group_mean * (size / left)  # deviations from the mean of those who stay, (P, G, g, d)
    inner = torch.eye(size + 1, dtype=v.dtype, device=v.device) - v @ v.mT
    cross = v @ z.mT  # (P, G, g + 1, g)
    factor, failed = torch.linalg.cholesky_ex(inner)
    # The answer's relative rounding is about eps / least.
    least = factor.diagonal(dim1=-2, dim2=-1).square().amin()
    if bool(failed.any()) or float(least) < 100 * torch.finfo(v.dtype).eps:
        raise _too_small("the difference that one picture makes is lost in rounding")
    part = torch.linalg.solve_triangular(factor, cross, upper=False)
    squared: Tensor = (z.square().sum(dim=3) + part.square().sum(dim=2)) * (left - 1)
    return squared


def _group_sizes(good: FeatureStream) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for batch in good:
        for group in batch.groups:
            sizes[group] = sizes.get(group, 0) + 1
    return sizes


def _by_group(good: FeatureStream, sizes: dict[str, int], size: int) -> Iterator[FeatureBatch]:
    """Pictures of several groups of this size together; each group is whole, the stream spreads none."""
    singles = (single for batch in good for single in _split(batch) if sizes[single.groups[0]] == size)
    pending: list[FeatureBatch] = []
    for _, members in groupby(singles, key=lambda single: single.groups[0]):
        pending += members
        if len(pending) >= _TOGETHER:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[FeatureBatch]) -> FeatureBatch:
    return FeatureBatch(
        {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features},
        torch.cat([part.valid for part in parts]),
        tuple(part.keys[0] for part in parts),
        tuple(part.groups[0] for part in parts),
    )


def _split(batch: FeatureBatch) -> Iterator[FeatureBatch]:
    for i in range(len(batch.keys)):
        part = slice(i, i + 1)
        features = {name: tensor[part] for name, tensor in batch.features.items()}
        yield FeatureBatch(features, batch.valid[part], batch.keys[part], batch.groups[part])
