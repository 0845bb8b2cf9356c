"""TFA-Net (Luo, Yao, Yu, EAAI 131, 2024, arXiv 2603.22874): features gathered onto a good picture's.

A template, which is a good picture, is encoded beside every inspected one. A transformer lets the template's
tokens gather what they recognise in the input, and the input's tokens are thrown away; a second one rebuilds
the input's features from the template's tokens alone. What did not resemble the template was not gathered,
so it cannot be rebuilt: the difference is the anomaly map.

The paper's full text was not at hand. What its published code does, and where this differs, is in
docs/methods/tfanet.md. Sections named in comments are those of the method's specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.feature_cache.store import half_precision
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.fused_levels import FusedLevels
from fettle.layers.patches import patchify, unpatchify
from fettle.layers.pixel_map import pixel_map, valid_tokens
from fettle.layers.taps import levels_of_strides, spaced_blocks
from fettle.layers.template_aggregation import AggregationConfig, TemplateAggregation, Tokens
from fettle.layers.template_choice import mean_over, nearest, pooled
from fettle.layers.template_maps import Difference, Fusion, adoption_maps, difference, joined, units_of
from fettle.layers.token_grid import Align, MapScore, enlarged, score_of_map, valid_on_grid
from fettle.methods.template_bank import NewTemplate, TemplateBank
from fettle.methods.template_choosing import (
    Gathered,
    PlaceSpread,
    TemplateConfig,
    aspects_of,
    check_aspect,
    choose_templates,
    look_at_templates,
)
from fettle.perturb.pool import NAMED_POOLS, PoolConfig
from fettle.perturb.token_mask import keep_indices
from fettle.protocols import (
    Backbone,
    Batch,
    Explanation,
    FeatureStream,
    FitRecord,
    FramedPicture,
    Json,
    Level,
    Loss,
    Maps,
    Preset,
    Run,
    Step,
    Template,
    Traits,
)
from fettle.training import TrainingConfig
from fettle.training_config import Schedule

_STRIDES = (4, 8, 16)
_MORE = 2  # stride taken besides, where a pyramid has fewer than two of these
_MAP_SIDE = 256  # framed px that `smooth_sigma` is given for
_MOST_MASKED = 0.9  # where the share is random
_CLOSE_CALL = 0.02  # difference of two cosines

Share = Annotated[float, Field(ge=0, lt=1)]


class TFANetConfig(AggregationConfig, TemplateConfig, TrainingConfig):
    """Fields of TFA-Net, besides those of the network, of its templates and of the training.

    Attributes:
        taps: backbone levels, fine to coarse; None takes strides 4, 8 and 16 of a pyramid, or three blocks of
            a ViT, evenly spaced.
        pool_stem: a level of stride 2 goes through a ResNet's max-pool first.
        grid_stride: framed px a fused position; None takes the finest level's grid, made smaller until no
            side is longer than 32.
        align: how levels come to that grid: "corners" is the published bilinear with aligned corners (which
            maps are then enlarged with, too), "mean" averages cells.
        feature_norm: of fused features: "none" is as published; "standard" by each channel's mean and
            deviation over good pictures; "l2" makes unit vectors.
        mask_ratio: share of the input's tokens that training hides; "random" draws it for each picture from 0
            to 0.9; 0 hides none.
        pool: perturbations of the fused features in training, before masking.
        residual: what the network's output is added to: "none" as published, the good pictures' "mean" at
            each place, or the "template"'s features. What a backbone's padding does to the corners is in the
            mean, and need not be learnt.
        lambda_dir, lambda_dis: weights of the loss's two parts.
        fusion: of the direction and the distance map: their "product", "sum" (5 to 1), "calibrated_sum" (each
            in units of its 99 % quantile on the pictures learnt from), or one of the two alone.
        smooth_sigma: blur of the maps, px at a side of 256.
        score: of the picture: the map's "std", "max", the mean of its "top1%", or its "mean".
        steps: compact value, see docs/results.md.
    """

    steps: int = Field(default=2000, ge=1, le=100_000_000)
    batch: int = Field(default=8, ge=1, le=4096)
    lr: float = Field(default=5e-4, gt=0, le=10)
    betas: tuple[Share, Share] = (0.9, 0.95)
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    clip: float = Field(default=1.0, ge=0)
    schedule: Schedule = "cosine"

    taps: tuple[str, ...] | None = Field(default=None, min_length=1)
    pool_stem: bool = True
    grid_stride: int | None = Field(default=None, ge=1, le=256)
    align: Align = "mean"
    feature_norm: Literal["none", "standard", "l2"] = "standard"
    mask_ratio: Share | Literal["random"] = 0.5
    pool: PoolConfig = NAMED_POOLS["none"]
    residual: Literal["none", "mean", "template"] = "mean"
    lambda_dir: float = Field(default=5.0, ge=0, le=1e6)
    lambda_dis: float = Field(default=1.0, ge=0, le=1e6)
    fusion: Fusion = "product"
    smooth_sigma: float = Field(default=4.0, ge=0, le=100)
    score: MapScore = "std"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.template == "learned" and self.residual == "template":
            raise ValueError("residual 'template' needs a template's features: 'learned' has none")
        if self.discard != "template" and self.mask_mode == "drop" and self.mask_ratio != 0:
            raise ValueError(
                f"with discard '{self.discard}' dropped tokens cannot be rebuilt: set mask_mode=token"
            )
        if self.aggregation == "convolution" and self.mask_mode == "drop" and self.mask_ratio != 0:
            raise ValueError("aggregation 'convolution' needs every token's place: set mask_mode=token")
        if self.pool.guide is not None:
            raise ValueError("this method's pool takes no guide: leave it out")
        if self.lambda_dir == self.lambda_dis == 0:
            raise ValueError("lambda_dir and lambda_dis are both 0: nothing would be learnt")
        return self


_PUBLISHED = TFANetConfig(
    patch=4,
    width=768,
    heads=12,
    depth=12,
    rebuild_width=512,
    rebuild_heads=16,
    rebuild_depth=8,
    cls_token=True,
    taps=("stride2", "stride4", "stride8", "stride16"),
    grid_stride=4,
    align="corners",
    feature_norm="none",
    residual="none",
    template="first",
    epochs=400,
    batch=4,
    lr=1e-4,
    clip=0,
    schedule="constant",
    warmup=0,
    precision="fp32",
)


class TFANet(nn.Module):
    """The backbone, the network, and its templates. See the module's text."""

    name: ClassVar[str] = "tfanet"
    Config: ClassVar[type[TFANetConfig]] = TFANetConfig
    traits: ClassVar[Traits] = Traits(
        trained=True,
        multi_class=True,
        few_shot=True,
        fixed_grid=True,
        square_grid=False,
        leave_one_out=False,
        exports=("onnx", "openvino", "pt2"),
    )
    # "paper" is our best reading of the paper: the published code, with masking. "official" is that code as
    # published, less its choice of the best epoch on the test set.
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(TFANetConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(_PUBLISHED, backbone="wide_resnet50_2.tv_in1k", frame="square", size=256),
        "official": Preset(
            _PUBLISHED.model_copy(update={"mask_ratio": 0.0, "template_normalised": False}),
            backbone="wide_resnet50_2.tv_in1k",
            frame="square",
            size=256,
        ),
    }

    channel_mean: Tensor  # (C, 1, 1)
    channel_deviation: Tensor  # (C, 1, 1)
    place_mean: Tensor  # (1, C, h, w), fused features' mean at each place, for residual "mean"
    units: Tensor  # (2,) of distance and direction, for fusion "calibrated_sum"
    aspects: Tensor  # least and largest width over height of the good pictures

    def __init__(self, backbone: Backbone, config: TFANetConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        known = [level for name in levels if (level := backbone.spec.level(name))]
        strides = {level.name: level.stride for level in known}
        self._fuse = FusedLevels(strides, config.align, config.grid_stride, config.patch, config.pool_stem)
        self.channels = sum(level.channels for level in known)
        self.net = TemplateAggregation(self.channels, (0, 0), config)
        self.bank = TemplateBank()
        learned = config.template == "learned"
        self.learned = nn.Parameter(torch.zeros(0, config.width)) if learned else None
        self.register_buffer("channel_mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("channel_deviation", torch.ones(self.channels, 1, 1))
        self.register_buffer("place_mean", torch.zeros(1, self.channels, 0, 0))
        self.register_buffer("units", torch.ones(2))
        self.register_buffer("aspects", torch.zeros(2, dtype=torch.float64))
        self.scale = EnergyScale()
        # Known during the fit only: what predicting each position's mean costs, and the templates' products.
        self._baseline = 0.0
        self._products: list[str] = []

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: TFANetConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these.

        Raises:
            ConfigError: none of them is of a stride that it takes by itself.
        """
        if config.taps is not None:
            return config.taps
        return spaced_blocks(offered, (1, 2, 3)) or levels_of_strides(offered, _STRIDES, _MORE)

    def train(self, mode: bool = True) -> Self:
        """Leaving training, the templates' tokens are computed, once."""
        super().train(mode)
        if not mode:
            self.bank.check()
            self._keep_tokens()
        return self

    @torch.no_grad()
    def _keep_tokens(self) -> None:
        if len(self.bank):
            self.bank.tokens = self.net.embed(self.target_of_templates())

    # Features

    def feature_key(self) -> str:
        """The recipe of `features`."""
        return self._fuse.recipe()

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """All levels on one grid, side by side (section 2): {"fused": (B, C, h, w)}."""
        return {"fused": self._fused(pictures)}

    def _fused(self, pictures: Tensor) -> Tensor:
        return self._fuse(self.backbone(pictures, self.levels), (pictures.shape[-2], pictures.shape[-1]))

    def _normed(self, fused: Tensor) -> Tensor:
        """Fused features (B, C, h, w) by `feature_norm`."""
        if self.config.feature_norm == "l2":
            return F.normalize(fused, dim=1)
        if self.config.feature_norm == "none":
            return fused
        return (fused - self.channel_mean) / self.channel_deviation

    # The fit

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Set scales, draw weights, choose the templates and look at them. Walks twice.

        Raises:
            DataError: features that are NaN or infinite.
            ConfigError: a template's file does not fit.
        """
        gathered = self._gather(good)
        grid = gathered.seen.grid
        self._start(grid, run)
        facts: dict[str, Json] = {
            "taps": list(self.levels),
            "grid": list(grid),
            "channels": self.channels,
            "parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }
        record = FitRecord(facts)
        noise = run.generator("tfanet/noise")
        chosen = choose_templates(good, gathered, self.config, self._new_template, noise, record)
        if chosen:
            self.bank.store(chosen)
            self._keep_tokens()  # so that their shape is known when a training goes on
        self._products = [one.product for one in chosen]
        self._walk_again(good, gathered, record)
        return record

    def _gather(self, good: FeatureStream) -> Gathered:
        """Walk once: each channel's scale, and where each picture's features lie as a whole."""
        seen = FeatureStatistics()
        means: list[Tensor] = []
        keys: list[str] = []
        paths: list[str] = []
        products: list[str] = []
        for batch in good:
            fused, valid = batch.features["fused"], valid_on_grid(batch.features["fused"], batch.valid)
            if self.config.feature_norm == "l2":
                fused = self._normed(fused)
            seen.add(fused, valid, len(set(batch.keys)))
            means.append(mean_over(fused, valid))
            keys += batch.keys
            paths += batch.paths
            products += batch.products
        if not seen.finite:
            raise DataError("Features of good pictures hold NaN or inf.", "Check the backbone's weights.")
        self._set_norm(seen)
        aspects = aspects_of(good, paths)
        self.aspects = torch.tensor(aspects, dtype=torch.float64, device=self.aspects.device)
        vectors = torch.cat(means)
        if self.config.feature_norm != "l2":  # of these, unit vectors were averaged
            vectors = self._normed(vectors[:, :, None, None])[:, :, 0, 0]
        return Gathered(seen, vectors, keys, paths, products, aspects)

    def _set_norm(self, seen: FeatureStatistics) -> None:
        """Mean and deviation of each channel over the good pictures' valid positions."""
        number = max(seen.num_tokens, 1)
        mean = seen.sums.sum(dim=(1, 2)) / number
        deviation = (seen.squares / number - mean.square()).clamp_min(0).sqrt()
        deviation = deviation.clamp_min(1e-6 * float(deviation.max())).clamp_min(1e-12)
        if self.config.feature_norm == "standard":
            self.channel_mean = mean.to(self.channel_mean)[:, None, None]
            self.channel_deviation = deviation.to(self.channel_mean)[:, None, None]

    def _start(self, grid: tuple[int, int], run: Run) -> None:
        """A network for this grid, with new weights."""
        device = self.channel_mean.device
        on_tokens = (grid[0] // self.config.patch, grid[1] // self.config.patch)
        generator = run.generator("tfanet/weights")
        self.net = TemplateAggregation(self.channels, on_tokens, self.config)
        self.net.initialise(generator)
        self.net.to(device).train(self.training)
        if self.learned is not None:
            start = 0.02 * torch.randn(on_tokens[0] * on_tokens[1], self.config.width, generator=generator)
            self.learned = nn.Parameter(start.to(device))

    def _walk_again(self, good: FeatureStream, gathered: Gathered, record: FitRecord) -> None:
        """What predicting the mean costs, and whether the templates look like the good pictures."""
        patch, seen = self.config.patch, gathered.seen
        mean = (seen.sums / seen.counts.clamp_min(1)).to(self.channel_mean)[None]
        if self.config.feature_norm != "l2":  # of these, unit vectors were summed
            mean = self._normed(mean)
        if self.config.residual == "mean":
            self.place_mean = mean.contiguous()
        guess = patchify(mean, patch)
        cost, number, tokens = 0.0, 0, 0
        spreads: dict[str, PlaceSpread] = {}
        for batch in good:
            fused = self._normed(batch.features["fused"])
            valid = self._valid_tokens(fused, batch.valid)
            value = self._cost(guess.expand(len(fused), -1, -1), patchify(fused, patch), valid)
            cost += float(value) * int(valid.sum())
            number += len(fused)
            tokens += int(valid.sum())
            at_places = torch.unflatten(valid, 1, self.net.grid_of(fused))
            shown = batch.products or ("",) * len(fused)
            for product in {*shown, ""}:
                rows = torch.tensor([product in ("", own) for own in shown], device=valid.device)
                spread = spreads.setdefault(product, PlaceSpread())
                spread.add(F.avg_pool2d(fused[rows], patch), at_places[rows])
        self._baseline = cost / max(tokens, 1) if number > 1 else 0.0  # one picture is its own mean
        record.facts["mean_cost"] = self._baseline
        if self.config.template in ("medoid", "first", "file"):
            known = self.target_of_templates()
            vectors = mean_over(known, valid_on_grid(known, self.bank.valid))
            pooled_tokens = F.avg_pool2d(known, patch)
            look_at_templates(self.bank, pooled_tokens, vectors, spreads, gathered, record)

    # Templates

    def _new_template(
        self, picture: FramedPicture, name: str, product: str, fused: Tensor | None = None
    ) -> NewTemplate:
        """A template with its features, which are computed where they are not given."""
        if fused is None:
            pixels = picture.pixels
            if not self.config.template_normalised:  # the backbone's normalisation then undoes this
                spec = self.backbone.spec
                mean, std = (pixels.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
                pixels = pixels * std + mean
            fused = self._fused(pixels)
        fused = half_precision(fused, [f"the template '{name}'"]).to(self.channel_mean)  # as cached ones are
        vector = pooled(self._normed(fused), valid_on_grid(fused, picture.valid))
        return NewTemplate(picture, name, product, fused, vector)

    def templates(self) -> list[Template]:
        """Those in use."""
        return self.bank.templates()

    @torch.no_grad()
    def set_template(self, picture: FramedPicture, name: str, product: str = "") -> None:
        """Put another picture in place of a product's one template; thresholds must be set anew then.

        Raises:
            ConfigError: there is no template of that product, or there are several; the picture's shape is
                not that of the good ones.
        """
        numbers = [i for i, own in enumerate(self.bank.known()) if product in ("", own.product)]
        if len(numbers) != 1:
            which = f" of product '{product}'" if product else ""
            raise ConfigError(
                f"The model has {len(numbers)} templates{which}, and one is replaced.",
                "Name a product that has one."
                if len(self.bank)
                else "Fit with a template that is a picture.",
            )
        least, largest = self.aspects.tolist()
        check_aspect(picture, name, (least, largest))
        own_product = self.bank.known()[numbers[0]].product
        self.bank.replace(numbers[0], self._new_template(picture, name, own_product))
        self._keep_tokens()

    def _template_tokens(self, values: Tensor, which: Tensor) -> Tokens | None:
        """The templates' tokens (M, N, d) for pictures that are compared with `which` (B,)."""
        if self.config.discard == "no_template":
            return None
        if self.learned is not None:
            everywhere = torch.ones(which.shape[0], len(self.learned), dtype=torch.bool, device=which.device)
            return Tokens(self.learned.expand(which.shape[0], -1, -1), everywhere)
        valid = self._valid_tokens(self.bank.fused, self.bank.valid)  # (M, N)
        return Tokens(values[which], valid[which])

    def _nearest(self, fused: Tensor, valid: Tensor, products: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
        """Number of each picture's template, and by how much it is the nearest, (B,) each.

        Where a picture's product is told, its own templates alone are asked.
        """
        if not len(self.bank):
            none = torch.zeros(fused.shape[0], dtype=torch.long, device=fused.device)
            return none, none.float()
        allowed = None
        if products and any(self._products):
            rows = [[own == product for own in self._products] for product in products]
            allowed = torch.tensor(rows, device=fused.device)
        return nearest(pooled(fused, valid_on_grid(fused, valid)), self.bank.vectors, allowed)

    # Training

    def needs(self, step: Step) -> frozenset[str]:
        """Nothing besides features."""
        return frozenset()

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The error of rebuilding all tokens where some are hidden (sections 6 and 7)."""
        fused = self._normed(batch.features["fused"])
        valid = self._valid_tokens(fused, batch.valid)
        which, _ = self._nearest(fused, batch.valid, batch.products)
        seen = self._seen_in_training(self._perturbed(fused, batch.valid, step), valid, step)
        yield self._loss(fused, valid, seen, which)

    def held_out_loss(self, batch: Batch) -> Loss:
        """The same with nothing hidden."""
        fused = self._normed(batch.features["fused"])
        valid = self._valid_tokens(fused, batch.valid)
        which, _ = self._nearest(fused, batch.valid)
        return self._loss(fused, valid, Tokens(self.net.embed(fused), valid), which)

    def after_step(self, step: Step) -> None:
        """Nothing follows."""

    def _loss(self, fused: Tensor, valid: Tensor, seen: Tokens, which: Tensor) -> Loss:
        values = self.bank.tokens
        if len(self.bank) and self.config.discard != "no_template":
            values = self.net.embed(self.target_of_templates())
        rebuilt = self._rebuilt(
            seen, self._template_tokens(values, which), which, self.net.grid_of(fused)
        ).float()
        return Loss(self._cost(rebuilt, patchify(fused, self.config.patch), valid), self._baseline)

    def _perturbed(self, fused: Tensor, valid: Tensor, step: Step) -> Tensor:
        """Fused features after the pool, which has members only where asked for."""
        pool = self.config.pool
        if not pool.members:
            return fused
        grid = (fused.shape[-2], fused.shape[-1])
        inside = valid_on_grid(fused, valid).flatten(1)
        tokens = fused.flatten(2).transpose(1, 2)
        strength = pool.schedule(step.share)
        tokens = pool(tokens, grid, step.generator("pool"), strength=strength, valid=inside)
        return torch.unflatten(tokens.transpose(1, 2), 2, grid)

    def _seen_in_training(self, fused: Tensor, valid: Tensor, step: Step) -> Tokens:
        """The input's tokens, some of them hidden (section 6)."""
        config = self.config
        if config.mask_ratio == 0:
            return Tokens(self.net.embed(fused), valid)
        generator = step.generator("mask")
        if config.mask_ratio == "random":
            ratio = _MOST_MASKED * torch.rand(len(fused), generator=generator, dtype=torch.float64)
        else:
            ratio = torch.full((len(fused),), config.mask_ratio, dtype=torch.float64)
        kept, counts = keep_indices(valid, ratio, generator)
        if config.mask_mode == "drop":
            return Tokens(self.net.embed(fused), valid).chosen(kept, counts)
        hidden = torch.ones_like(valid).scatter(1, kept, ~counts)
        return Tokens(self.net.embed(fused, hidden & valid), valid)

    def _cost(self, rebuilt: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """The loss of tokens (B, N, E), a mean over the valid ones (section 7)."""
        away = 1 - F.cosine_similarity(rebuilt, target, dim=2, eps=1e-8)
        far = (rebuilt - target).square().mean(dim=2)
        both = self.config.lambda_dir * away + self.config.lambda_dis * far  # (B, N)
        return (both * valid).sum() / valid.sum().clamp_min(1)

    @torch.no_grad()
    def finish(self, good: FeatureStream) -> None:
        """The units of a calibrated sum: each map's 99 % quantile, a mean over the pictures learnt from."""
        if self.config.fusion != "calibrated_sum":
            return
        rows = []
        for batch in good:
            fused = self._normed(batch.features["fused"])
            which, _ = self._nearest(fused, batch.valid)
            found = difference(fused, self.rebuild(fused, batch.valid, which))
            inside = torch.unflatten(self._valid_tokens(fused, batch.valid), 1, self.net.grid_of(fused))
            rows += [units_of(found, inside, number) for number in range(len(fused))]
        known = [row for row in rows if row is not None]
        if known:
            self.units = torch.stack(known).mean(dim=0).clamp_min(1e-6).to(self.units)

    # Inspection

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        found, which, margin = self._compare(pictures, valid)
        sigma = self.config.smooth_sigma * min(pictures.shape[-2:]) / _MAP_SIDE
        smooth = Difference(*(self._on_pixels(part, valid, sigma) for part in found))
        anomaly_map = joined(smooth, self.config.fusion, self.units)
        remarks = torch.stack([which.to(margin), margin], dim=1) if len(self.bank) > 1 else None
        return Maps(anomaly_map, score_of_map(anomaly_map, valid[:, 0], self.config.score), remarks)

    def remark(self, numbers: Sequence[float]) -> tuple[str, ...]:
        """Which template of several a picture was compared with."""
        close = ", though another is about as near" if numbers[1] < _CLOSE_CALL else ""
        return (f"compared with template {self.bank.label(int(numbers[0]))}{close}",)

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): the joined maps before they are enlarged, on the stored scale."""
        energy: Tensor = self.scale(joined(self._compare(pictures, valid)[0], self.config.fusion, self.units))
        return energy

    def _compare(self, pictures: Tensor, valid: Tensor) -> tuple[Difference, Tensor, Tensor]:
        """What is not rebuilt; each picture's template, and by how much it is the nearest."""
        fused = self.target(pictures)
        which, margin = self._nearest(fused, valid)
        return difference(fused, self.rebuild(fused, valid, which)), which, margin

    def target(self, pictures: Tensor) -> Tensor:
        """What is rebuilt: the taps on one grid, normalised, (B, C, h, w)."""
        return self._normed(self._fused(pictures))

    def target_of_templates(self) -> Tensor:
        """The same of the templates, (M, C, h, w)."""
        return self._normed(self.bank.fused.to(self.channel_mean))

    def rebuild(self, fused: Tensor, valid: Tensor, which: Tensor) -> Tensor:
        """Fused features (B, C, h, w) rebuilt by way of the templates numbered `which` (B,)."""
        seen = Tokens(self.net.embed(fused), self._valid_tokens(fused, valid))
        grid = self.net.grid_of(fused)
        tokens = self._rebuilt(seen, self._template_tokens(self.bank.tokens, which), which, grid)
        return unpatchify(tokens, self.config.patch, grid)

    def _rebuilt(self, seen: Tokens, template: Tokens | None, which: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is rebuilt, (B, N, k k C)."""
        rebuilt: Tensor = self.net(seen, template, grid)
        if self.config.residual == "mean":
            return rebuilt + patchify(self.place_mean, self.config.patch)
        if self.config.residual == "template":
            return rebuilt + patchify(self.target_of_templates(), self.config.patch)[which]
        return rebuilt

    def _on_pixels(self, values: Tensor, valid: Tensor, sigma: float) -> Tensor:
        if self.config.align == "corners":
            values = enlarged(values, valid, "corners")
        return pixel_map(values, valid, sigma)

    def _valid_tokens(self, fused: Tensor, valid: Tensor) -> Tensor:
        """Which tokens hold a valid pixel, (B, N) bool."""
        return valid_tokens(valid, self.net.grid_of(fused)).flatten(1)

    @torch.no_grad()
    def explain(self, pictures: Tensor, valid: Tensor, blocks: Sequence[int] | None = None) -> Explanation:
        """What the template takes from each place of the picture, and where it puts it (section 11).

        Args:
            blocks: of the first transformer, from 0; None takes all.
        """
        fused = self.target(pictures)
        which, _ = self._nearest(fused, valid)
        grid = self.net.grid_of(fused)
        seen = Tokens(self.net.embed(fused), self._valid_tokens(fused, valid))
        template = self._template_tokens(self.bank.tokens, which)
        maps: dict[str, Tensor] = {}
        if template is not None and self.net.attends:
            by_block = list(self.net.attention(seen, template))
            attention = torch.stack([by_block[i] for i in blocks or range(len(by_block))]).mean(dim=0)
            maps = adoption_maps(attention, seen.valid, template.valid, self.net.cls_token is not None)
        found = difference(fused, self.rebuild(fused, valid, which))
        at_template = self.bank.valid[which] if len(self.bank) else valid
        shown = {}
        for name, values in maps.items():
            place = at_template if name == "taken" else valid
            shown[name] = pixel_map(torch.unflatten(values, 1, grid), place, 0)
        shown["error"] = pixel_map(joined(found, self.config.fusion, self.units), valid, 0)
        known = self.bank.templates()
        templates = {"template": torch.stack([known[i].pixels for i in which.tolist()])} if known else {}
        return Explanation(
            shown,
            {
                "templates": len(known),
                "masked in training": self.config.mask_ratio,
                "fusion": self.config.fusion,
            },
            "Adoption is what the template takes from a place of the picture: half-way is what it would take "
            "from all alike, dark is less. It is for people, and no part of the score.",
            templates,
        )
