"""CFLOW-AD (Gudovskiy et al., WACV 2022, arXiv 2107.12571): how likely each feature is at its place.

Each level of the backbone has a normalising flow of its own, which learns the density of good features given
a code of their position. A feature scores by its negative log-likelihood, and the levels' scores are joined
on the finest grid. Sections named in comments are those of the base methods' specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.coupling import ConditionalFlow, Mixing
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.pixel_map import pixel_map
from fettle.layers.position_code import position_code
from fettle.layers.taps import levels_of_strides, spaced_blocks
from fettle.layers.token_grid import enlarged, valid_on_grid
from fettle.perturb.rotation import rotated
from fettle.protocols import (
    Backbone,
    Batch,
    FeatureStream,
    FitRecord,
    Json,
    Level,
    Loss,
    Maps,
    Preset,
    Run,
    Step,
    Traits,
)
from fettle.training import TrainingConfig
from fettle.training_config import Schedule

_STRIDES = (8, 16, 32)
_MORE = 4  # stride taken besides, where a pyramid has fewer than two of these
_LEAST_DEVIATION = 1e-3  # of a channel, times that of the level's liveliest
_MAX_ENERGIES = 1_000_000  # of a level, from which its scale is set
_LOUDEST = 1e30  # more counts as this, so that no energy is infinite
_MOST = 2.0  # of a level's tempered energy; a rare good feature, settled at 1, has 0.79

Origins = Sequence[tuple[int, int]]


class CflowConfig(TrainingConfig):
    """Fields of CFLOW-AD. Those of the training are `TrainingConfig`'s.

    Attributes:
        taps: backbone levels, fine to coarse; None takes strides 8, 16 and 32 of a pyramid, or three blocks
            of a ViT's later half.
        feature_norm: "standard" brings each channel to mean 0 and deviation 1 over good pictures; "none" is
            the paper's.
        code: channels of the position code.
        blocks: coupling blocks of each level's flow.
        hidden: width of a block's hidden layer, times that of its input.
        mixing: how channels change places between blocks: a random "rotation", the paper's, or a
            "permutation", which needs no matrix.
        fibres: features of one optimiser step; a batch of pictures gives many steps.
        rotate: pictures are turned in training by up to so many degrees; each step then runs the backbone.
        score_form: of the map: "nll" joins the levels' energies, each on a scale of its own and bounded;
            "prob" is the paper's sum of probabilities.
        sigma: blur of the map, framed px.
        epochs, lr, clip: compact values. Passes, since a flow learns few pictures by heart if steps are many.
        precision: of the flows; bf16 would blur their densities.
    """

    epochs: float | None = Field(default=25, gt=0, le=1_000_000)
    batch: int = Field(default=8, ge=1, le=4096)
    lr: float = Field(default=1e-2, gt=0, le=10)
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    clip: float = Field(default=1.0, ge=0)
    schedule: Schedule = "cosine"
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    taps: tuple[str, ...] | None = Field(default=None, min_length=1)
    feature_norm: Literal["none", "standard"] = "standard"
    code: int = Field(default=128, ge=4, le=4096, multiple_of=4)
    blocks: int = Field(default=4, ge=1, le=64)
    hidden: int = Field(default=1, ge=1, le=16)
    mixing: Mixing = "rotation"
    fibres: int = Field(default=1024, ge=1, le=1_000_000)
    rotate: float = Field(default=0.0, ge=0, le=180)
    score_form: Literal["nll", "prob"] = "nll"
    sigma: float = Field(default=4.0, ge=0, le=100)


class LevelDensity(nn.Module):
    """How likely features of one level are, given their places.

    Attributes:
        flow: what is trained.
        scale: of the level's energies, so that levels can be joined.
        least: the smallest energy of a good feature.
        baseline: what a Gaussian of each channel's mean and deviation would cost; known during the fit only.
    """

    mean: Tensor  # (C,)
    deviation: Tensor  # (C,)
    least: Tensor

    def __init__(self, level: Level, config: CflowConfig) -> None:
        super().__init__()
        self.channels = level.channels
        self.flow = self.new_flow(config)
        self.register_buffer("mean", torch.zeros(level.channels))
        self.register_buffer("deviation", torch.ones(level.channels))
        self.register_buffer("least", torch.tensor(0.0))
        self.scale = EnergyScale()
        self.baseline = 0.0

    def new_flow(self, config: CflowConfig) -> ConditionalFlow:
        """An untrained flow."""
        return ConditionalFlow(self.channels, config.code, config.blocks, config.hidden, config.mixing)

    def set_norm(self, seen: FeatureStatistics, norm: Literal["none", "standard"]) -> None:
        """Mean and deviation of each channel over the valid places of good pictures, and the baseline."""
        number = max(seen.num_tokens, 1)
        mean = seen.sums.sum(dim=(1, 2)) / number
        deviation = (seen.squares / number - mean.square()).clamp_min(0).sqrt()
        deviation = deviation.clamp_min(_LEAST_DEVIATION * float(deviation.max())).clamp_min(1e-12)
        if norm == "standard":
            self.mean = mean.to(self.mean)
            self.deviation = deviation.to(self.deviation)
        left = deviation / self.deviation  # 1 where normalised
        likelihood = -0.5 * math.log(2 * math.pi * math.e) - left.log().mean()
        self.baseline = float(-F.logsigmoid(likelihood))

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:
        """log p / C of features (n, C), as normalised, with codes (n, P): (n,)."""
        return self.flow.log_likelihood((features - self.mean) / self.deviation, codes)

    def settle(self, energies: Tensor) -> None:
        """Set the scale and the least energy from those of good features (n,)."""
        self.scale.settle(energies)
        self.least = energies.amin().to(self.least)


class Cflow(nn.Module):
    """The backbone, and a density for each of its levels. See the module's text."""

    name: ClassVar[str] = "cflow"
    Config: ClassVar[type[CflowConfig]] = CflowConfig
    traits: ClassVar[Traits] = Traits(
        trained=True,
        multi_class=False,
        few_shot=False,
        fixed_grid=True,  # a position's code is another place at another size
        square_grid=False,
        leave_one_out=False,
        exports=("onnx", "openvino", "pt2"),
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(CflowConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(
            CflowConfig(
                feature_norm="none",
                blocks=8,
                hidden=2,
                fibres=256,
                rotate=5,
                score_form="prob",
                sigma=0,
                epochs=200,
                batch=32,
                lr=2e-4,
                clip=0,
                schedule="stages",
            ),
            backbone="wide_resnet50_2",
            frame="square",
            size=256,
        ),
    }

    grids: Tensor  # (L, 2) int64, height and width of each level; 0 until the fit

    def __init__(self, backbone: Backbone, config: CflowConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        known = [level for name in levels if (level := backbone.spec.level(name))]
        self._strides = [level.stride for level in known]
        self.densities = nn.ModuleList(LevelDensity(level, config) for level in known)
        self.register_buffer("grids", torch.zeros(len(known), 2, dtype=torch.int64))
        self.scale = EnergyScale()

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: CflowConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these.

        Raises:
            ConfigError: none of them is of a stride that it takes by itself.
        """
        if config.taps is not None:  # fine to coarse: energies are joined on the first one's grid
            strides = {level.name: level.stride for level in offered}
            return tuple(sorted(config.taps, key=lambda name: strides.get(name, 0)))
        return spaced_blocks(offered, (2, 3, 4)) or levels_of_strides(offered, _STRIDES, _MORE)

    def feature_key(self) -> str:
        """The recipe of `features`."""
        return f"levels {','.join(self.levels)} as they are"

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Each level at its own grid: {level: (B, C, h, w)}."""
        by_name = self.backbone(pictures, self.levels)
        return {name: by_name[name] for name in self.levels}

    def _by_level(self) -> Iterator[tuple[int, str, LevelDensity]]:
        for number, (name, density) in enumerate(zip(self.levels, self.densities, strict=True)):
            assert isinstance(density, LevelDensity)
            yield number, name, density

    # The fit

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Walk once: each channel's scale, and the grids; then draw the flows' weights.

        Raises:
            DataError: no picture, or features that are NaN or infinite.
        """
        seen = [FeatureStatistics() for _ in self.levels]
        for batch in good:
            for number, name, _ in self._by_level():
                features = batch.features[name]
                valid = valid_on_grid(features, batch.valid)
                seen[number].add(features, valid, len(set(batch.keys)))
        if not seen[0].num_pictures:
            raise DataError("There is no good picture to learn from.", "Give a folder of good pictures.")
        if not all(one.finite for one in seen):
            raise DataError("Features of good pictures hold NaN or inf.", "Check the backbone's weights.")
        self.grids = torch.tensor([one.grid for one in seen], device=self.grids.device)
        for number, name, density in self._by_level():
            density.set_norm(seen[number], self.config.feature_norm)
            flow = density.new_flow(self.config)
            flow.initialise(run.generator(f"cflow/{name}"))
            density.flow = flow.to(self.grids.device).train(self.training)
        facts: dict[str, Json] = {
            "taps": list(self.levels),
            "grids": self.grids.tolist(),
            "parameters": sum(p.numel() for p in self.densities.parameters() if p.requires_grad),
        }
        return FitRecord(facts)

    def needs(self, step: Step) -> frozenset[str]:
        """Pictures, where they are turned."""
        return frozenset({"pictures"} if self.config.rotate else ())

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """Level by level, the features of all pictures in random order, some for each optimiser step.

        What is left over is dropped; a level with fewer features than one step's takes them all at once.
        """
        if self.config.rotate:
            batch = self._rotated(batch, step)
        for _, name, density in self._by_level():
            features, codes = self._fibres(name, batch)
            order = torch.randperm(len(features), generator=step.generator(f"fibres/{name}"))
            size = min(self.config.fibres, len(order))
            for chunk in torch.split(order.to(features.device), max(size, 1)):
                if len(chunk) == size > 0:
                    cost = -F.logsigmoid(density(features[chunk], codes[chunk]))  # section 6.4
                    yield Loss(cost.mean(), density.baseline)

    def held_out_loss(self, batch: Batch) -> Loss:
        """The mean over all features of all levels."""
        cost, baseline, number = self.grids.new_zeros((), dtype=torch.float32), 0.0, 0
        for _, name, density in self._by_level():
            features, codes = self._fibres(name, batch)
            cost = cost - F.logsigmoid(density(features, codes)).sum()
            baseline += density.baseline * len(features)
            number += len(features)
        return Loss(cost / max(number, 1), baseline / max(number, 1))

    def after_step(self, step: Step) -> None:
        """Nothing follows."""

    @torch.no_grad()
    def _rotated(self, batch: Batch, step: Step) -> Batch:
        """The batch with each picture turned by a small angle, and its features computed anew."""
        assert batch.pictures is not None
        angles = step.generator("rotation")
        pictures, valid = rotated(batch.pictures, batch.valid, self.config.rotate, angles)
        with torch.autocast(pictures.device.type, enabled=False):
            return Batch(self.features(pictures, valid), valid, pictures, batch.products)

    def _fibres(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (n, C) of a level at valid places, and the codes of these (n, P)."""
        features = batch.features[name]
        valid = valid_on_grid(features, batch.valid)
        codes = self._codes(self.levels.index(name), features, None)
        return features.permute(0, 2, 3, 1)[valid], codes[valid]

    @torch.no_grad()
    def finish(self, good: FeatureStream) -> None:
        """Each level's scale and least energy, on the pictures learnt from."""
        found: list[list[Tensor]] = [[] for _ in self.levels]
        most = max(_MAX_ENERGIES // good.num_pictures, 1)  # of a picture
        for batch in good:
            seen = Batch(batch.features, batch.valid)
            for number, name, density in self._by_level():
                energies = -density(*self._fibres(name, seen))
                every = math.ceil(len(energies) / (most * len(set(batch.keys))))
                if every:
                    energies = energies.sort().values
                    found[number].append(torch.cat([energies[:1], energies[every // 2 :: every]]))
        for number, _, density in self._by_level():
            density.settle(torch.cat(found[number]))

    # Inspection

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        energies = self._energies(pictures, valid)
        if self.config.score_form == "nll":
            anomaly_map = pixel_map(self._joined(energies, valid, tempered), valid, self.config.sigma)
        else:
            anomaly_map = self._improbability(energies, valid)
        inside = anomaly_map.masked_fill(~valid[:, 0], -torch.inf)
        return Maps(anomaly_map, inside.flatten(1).amax(dim=1))

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): the joined energies of the levels on the stored scale (section 7)."""
        energy: Tensor = self.scale(self._joined(self._energies(pictures, valid), valid, tempered))
        return energy

    def unbounded_energy(self, pictures: Tensor, valid: Tensor, origins: Origins | None = None) -> Tensor:
        """As `patch_energy`, of slowed energies in place of bounded ones; see `protocols.Unbounded`.

        Of a part of a frame the codes are those of the whole one. Coarse levels are resampled within the
        part, so that the cells at its sides differ by that, too.

        Raises:
            ConfigError: an origin that is no multiple of every stride, or a part that leaves the frame.
        """
        joined = self._joined(self._energies(pictures, valid, origins), valid, slowed)
        energy: Tensor = self.scale(joined)
        return energy

    def _energies(self, pictures: Tensor, valid: Tensor, origins: Origins | None = None) -> list[Tensor]:
        """Raw energies -log p / C of each level, (B, h, w)."""
        features = self.features(pictures, valid)
        energies = []
        for number, name, density in self._by_level():
            own = features[name].permute(0, 2, 3, 1)  # (B, h, w, C)
            codes = self._codes(number, features[name], origins)  # (B, h, w, P)
            likelihood = density(own.flatten(0, 2), codes.flatten(0, 2))
            energies.append(-likelihood.view(own.shape[:3]))
        return energies

    def _joined(self, energies: Sequence[Tensor], valid: Tensor, damp: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over the levels, each on its scale, damped, and on the finest grid.

        (B, h, w), 0 where not valid.
        """
        inside = valid_on_grid(energies[0], valid)[:, None]
        scaled = [damp(density.scale(energies[number])) for number, _, density in self._by_level()]
        return torch.stack([pixel_map(one, inside, sigma=0) for one in scaled]).mean(dim=0)

    def _improbability(self, energies: Sequence[Tensor], valid: Tensor) -> Tensor:
        """L minus the sum of the levels' probabilities, (B, H, W) in 0..L (section 6.6).

        A probability of 1 is that of the likeliest good feature, and no other picture's.
        """
        anomaly_map = torch.zeros_like(valid[:, 0], dtype=energies[0].dtype)
        for number, _, density in self._by_level():
            improbable = -torch.expm1((density.least - energies[number]).clamp_max(0))
            anomaly_map = anomaly_map + enlarged(improbable, valid, "corners")
        return pixel_map(anomaly_map, valid, self.config.sigma)

    def _codes(self, number: int, features: Tensor, origins: Origins | None) -> Tensor:
        """Codes of a level's places (B, h, w, P); of parts of frames, where `origins` says where they lie."""
        height, width = features.shape[-2:]
        if origins is None and torch.compiler.is_exporting():  # a traced grid is known by its shape alone
            grid = [height, width]
        else:
            grid = self.grids[number].tolist()
        whole = position_code((grid[0], grid[1]), self.config.code, features.device).to(features)
        if origins is None:
            if [height, width] != grid:
                raise ConfigError(
                    f"CFLOW-AD was fitted on a grid of {grid}, not {[height, width]}.",
                    "Use the model's frame.",
                )
            return whole.expand(features.shape[0], -1, -1, -1)
        stride, parts = self._strides[number], []
        for top, left in origins:
            row, column = top // stride, left // stride
            part = whole[max(row, 0) : row + height, max(column, 0) : column + width]
            if top % stride or left % stride or part.shape[:2] != (height, width):
                raise ConfigError(
                    f"A part at {(top, left)} px does not lie on whole cells of the frame, {stride} px each.",
                    "Begin parts at multiples of every stride, inside the frame.",
                )
            parts.append(part)
        return torch.stack(parts)


def tempered(settled: Tensor) -> Tensor:
    """A level's settled energies, above 0 as 2 (1 - exp(-z / 2)), which joins on smoothly and ends at 2.

    Far from what it has learnt a flow's scales multiply from block to block, and energies of a million are
    common. Without a bound the coarsest level's one loud cell would be all that a mean over levels shows.
    """
    return torch.where(settled > 0, -_MOST * torch.expm1(-settled.clamp_min(0) / _MOST), settled)


def slowed(settled: Tensor) -> Tensor:
    """A level's settled energies, above 0 as log(1 + z): what is loud stays louder, and has a slope."""
    return torch.where(settled > 0, torch.log1p(settled.clamp(0, _LOUDEST)), settled)
