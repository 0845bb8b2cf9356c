"""AGPNet (Huang et al., arXiv 2408.07490): a reconstruction whose training is disturbed where it matters.

A light transformer rebuilds the frozen features of a good picture from disturbed ones. Noise is strongest
where the attention of the backbone, and of a slow copy of the decoder, lies. At inspection nothing is
disturbed: the error of rebuilding is the anomaly map.

The paper's numbers for most constants are not known to us; they are our own, and the paper's mechanism.
Sections named in comments are those of the method's specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.pixel_map import pixel_map
from fettle.layers.taps import levels_of_strides, spaced_blocks
from fettle.layers.token_decoder import TokenDecoder
from fettle.layers.token_grid import MapScore, aligned_to, score_of_map, valid_on_grid
from fettle.perturb.attention import (
    Guidance,
    GuideConfig,
    joint_prior,
    linear,
    normalise,
    picture_sigma,
)
from fettle.perturb.attention_guide import AttentionGuide
from fettle.perturb.turns import Turns, turned
from fettle.protocols import (
    Backbone,
    Batch,
    Explanation,
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

_GRID_STRIDE = 16  # framed px a token, where the backbone is a pyramid
_STRIDES = (8, 16)
_MORE = 4  # stride taken besides, where a pyramid has fewer than two of these
_EPS = 1e-6  # of the layer norms
_MAP_SIDE = 256  # framed px that `smooth_sigma` is given for


class AGPNetConfig(GuideConfig, TrainingConfig):
    """Fields of AGPNet, besides those of cues and strengths (`GuideConfig`) and of the training.

    Attributes:
        taps: backbone levels, fine to coarse; None takes strides 8 and 16 of a pyramid, or four blocks of a
            ViT, evenly spaced. Stride 32 would rule the error by its channels and blur it (docs/results.md).
        fuse: "sum" of the layer-normed taps, or "concat"; "auto" sums where all are of one width.
        width, heads, depth: channels, heads and blocks of the decoder.
        out_norm: a layer norm before its output; it takes away each token's length.
        positions: "learned", or fixed "waves", which hold on any grid.
        levels: what is disturbed: features, the picture, or both.
        image_every: with levels "both", the picture is disturbed in every n-th step only; it costs a pass
            through the backbone.
        noise_unit: what noise of strength 1 is: the RMS of the picture's features, of each token, or 1.
        ratio_start, ratio_end: share of the pixels that are disturbed at the first and the last step.
        sigma: noise at these pixels, in units of pictures in 0..1.
        schedule_unit: alpha and ratio grow by "step", or stay for an "epoch" each.
        augment: "flip" mirrors pictures in training, "turn" turns them by quarters, too (squares only). Each
            step then runs the backbone.
        loss: "mse", the paper's, or "cosine".
        smooth_sigma: blur of the map, px at a side of 256.
        score: of the picture: the map's "max", the mean of its "top1%", or its "mean".
        infer_with: the "decoder" that was trained, or its "momentum" copy.
        steps: compact value; without noise the loss is flat by then on a product of 200 pictures.
    """

    steps: int = Field(default=800, ge=1, le=100_000_000)
    batch: int = Field(default=16, ge=1, le=4096)
    lr: float = Field(default=1e-3, gt=0, le=10)
    clip: float = Field(default=1.0, ge=0)
    decay: Literal["all", "linear"] = "linear"

    taps: tuple[str, ...] | None = Field(default=None, min_length=1)
    fuse: Literal["auto", "sum", "concat"] = "auto"
    width: int = Field(default=128, ge=4, le=4096, multiple_of=4)
    heads: int = Field(default=4, ge=1, le=256)
    depth: int = Field(default=2, ge=1, le=64)
    out_norm: bool = False
    positions: Literal["learned", "waves"] = "learned"
    levels: Literal["feature", "image", "both"] = "both"
    image_every: int = Field(default=4, ge=1, le=1_000_000)
    noise_unit: Literal["picture_rms", "token_rms", "one"] = "picture_rms"
    ratio_start: float = Field(default=0.1, ge=0, le=1)
    ratio_end: float = Field(default=0.5, ge=0, le=1)
    sigma: float = Field(default=0.2, ge=0, le=10)
    schedule_unit: Literal["step", "epoch"] = "step"
    augment: Turns = "none"
    loss: Literal["mse", "cosine"] = "mse"
    smooth_sigma: float = Field(default=4.0, ge=0, le=100)
    score: MapScore = "max"
    infer_with: Literal["decoder", "momentum"] = "decoder"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}: choose heads that do")
        if self.infer_with == "momentum" and self.momentum == 0:
            raise ValueError("infer_with 'momentum' needs a momentum above 0")
        return self

    @staticmethod
    def few_shot(preset: str) -> dict[str, object]:
        """As of every training; the paper preset's learning rate goes with the batch (section 10)."""
        return {**TrainingConfig.few_shot(preset), **({"lr": 1e-4} if preset == "paper" else {})}

    @property
    def disturbs_pictures(self) -> bool:
        """Whether any step disturbs pictures."""
        return self.noise != "none" and self.levels != "feature"


class AGPNet(nn.Module):
    """The backbone, the decoder, its momentum copy, and the guide. See the module's text."""

    name: ClassVar[str] = "agpnet"
    Config: ClassVar[type[AGPNetConfig]] = AGPNetConfig
    traits: ClassVar[Traits] = Traits(
        trained=True,
        multi_class=True,
        few_shot=True,
        fixed_grid=True,
        square_grid=False,
        leave_one_out=False,
        exports=("onnx", "openvino", "pt2"),
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(AGPNetConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(
            AGPNetConfig(
                width=384,
                heads=6,
                depth=4,
                image_every=1,
                contrast_floor=0.0,
                epochs=500,
                batch=32,
                lr=4e-4,
            ),
            backbone="vit_small_patch16_224.dino",
            frame="square",
            size=256,
        ),
    }

    def __init__(self, backbone: Backbone, config: AGPNetConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        known = [level for name in levels if (level := backbone.spec.level(name))]
        sizes = [level.channels for level in known]
        self.stride = min(max(level.stride for level in known), _GRID_STRIDE)
        self.sums = config.fuse == "sum" or (config.fuse == "auto" and len(set(sizes)) == 1)
        if self.sums and len(set(sizes)) > 1:
            raise ConfigError(f"Taps of {sizes} channels cannot be summed.", "Use fuse=concat.")
        self.channels = sizes[0] if self.sums else sum(sizes)
        self.decoder = self._new_decoder((0, 0))
        self.guide = AttentionGuide(config, backbone, levels)
        self._watch()
        self.scale = EnergyScale()
        # Known during the fit only: MSE of predicting each position's mean, and the number of views.
        self._baseline = 0.0
        self._num_views = 0

    def _new_decoder(self, grid: tuple[int, int]) -> TokenDecoder:
        config = self.config
        return TokenDecoder(
            self.channels,
            grid,
            width=config.width,
            heads=config.heads,
            depth=config.depth,
            learned_positions=config.positions == "learned",
            out_norm=config.out_norm,
        )

    def _watch(self) -> None:
        self.guide.watch(self.decoder, needed=self.config.infer_with == "momentum")

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: AGPNetConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these.

        Raises:
            ConfigError: none of them is of a stride that it takes by itself.
        """
        if config.taps is not None:
            return config.taps
        return spaced_blocks(offered, (1, 2, 3, 4)) or levels_of_strides(offered, _STRIDES, _MORE)

    # Constants of a picture

    def feature_key(self) -> str:
        """The recipe of `features`."""
        return f"{'sum' if self.sums else 'concat'} at stride {self.stride}{self.guide.recipe}"

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """What is to be rebuilt, {"tokens": (B, C, h, w)}, and where it is used the backbone's cue, {"prior":
        (B, K, h, w)}."""
        by_name, prior = self.guide.features(self.backbone, pictures, self.levels)
        tokens = self._fused(by_name, pictures)
        return {"tokens": tokens, **{k: aligned_to(maps, _grid(tokens), "mean") for k, maps in prior.items()}}

    def _fused(self, by_name: dict[str, Tensor], pictures: Tensor) -> Tensor:
        """The taps, layer-normed without weights, as a sum or side by side: (B, C, h, w) (equation 1)."""
        grid = (pictures.shape[-2] // self.stride, pictures.shape[-1] // self.stride)
        tokens = [aligned_to(by_name[name], grid, "mean").flatten(2).transpose(1, 2) for name in self.levels]
        normed = [F.layer_norm(level, level.shape[-1:], eps=_EPS) for level in tokens]  # (B, N, C) each
        fused = torch.stack(normed).sum(dim=0) if self.sums else torch.cat(normed, dim=2)
        return torch.unflatten(fused.transpose(1, 2), 2, grid)

    # The fit

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Walk once: the grid, what predicting the mean costs, and the mean prior; then draw the weights.

        Raises:
            DataError: features that are NaN or infinite.
        """
        seen = FeatureStatistics()
        for batch in good:
            tokens, valid = batch.features["tokens"], valid_on_grid(batch.features["tokens"], batch.valid)
            seen.add(tokens, valid, len(set(batch.keys)))
            self._num_views += len(tokens)
            if "prior" in batch.features:
                self.guide.keep_prior(batch.features["prior"].flatten(2), valid.flatten(1))
        if not seen.finite:
            raise DataError("Features of good pictures hold NaN or inf.", "Check the backbone's weights.")
        several = seen.num_pictures > 1 and self.config.loss == "mse"
        ones = torch.ones(self.channels, device=seen.sums.device)
        self._baseline = seen.spread(ones) if several else 0.0  # one picture is its own mean
        device = self.scale.median.device
        self.decoder = self._new_decoder(seen.grid)
        self.decoder.initialise(run.generator("agpnet/weights"))
        self.decoder.to(device).train(self.training)
        self.guide.begin(seen.grid[0] * seen.grid[1])
        self._watch()
        facts: dict[str, Json] = {
            "taps": list(self.levels),
            "cue": self.guide.cue,
            "grid": list(seen.grid),
            "channels": self.channels,
            "parameters": sum(parameter.numel() for parameter in self.decoder.parameters()),
            "mean_feature_mse": self._baseline,
        }
        return FitRecord(facts)

    def needs(self, step: Step) -> frozenset[str]:
        """Pictures, in steps that disturb or turn them."""
        return frozenset({"pictures"} if self._disturbs_picture(step) or self._turns else ())

    @property
    def _turns(self) -> bool:
        return self.config.augment != "none"

    def _disturbs_picture(self, step: Step) -> bool:
        every = self.config.image_every if self.config.levels == "both" else 1
        return self.config.disturbs_pictures and step.number % every == 0

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The error of rebuilding clean features from disturbed ones (section 8)."""
        if self._turns:
            batch = self._turned(batch, step)
        clean, valid = self._tokens(batch.features["tokens"], batch.valid)
        grid = _grid(batch.features["tokens"])
        if self.config.noise == "none":
            yield self._loss(self.decoder(clean, valid, grid), clean, valid)
            return
        unit = self._unit(clean, valid)
        guidance = self._guidance(batch, clean, valid, step, unit)
        weight = (guidance.strength * unit)[:, :, None]
        rebuilt = []
        if self.config.levels != "image":
            disturbed = clean + weight * _normal(clean, step.generator("noise/features"))
            rebuilt.append(self.decoder(disturbed, valid, grid))
        if self._disturbs_picture(step):
            disturbed = self._of_disturbed_picture(batch, guidance, step)
            if self.config.levels == "both":
                disturbed = disturbed + weight * _normal(clean, step.generator("noise/features of pictures"))
            rebuilt.append(self.decoder(disturbed, valid, grid))
        losses = [self._loss(own, clean, valid) for own in rebuilt]
        yield Loss(torch.stack([loss.value for loss in losses]).mean(), losses[0].baseline)

    def held_out_loss(self, batch: Batch) -> Loss:
        """The same without noise."""
        clean, valid = self._tokens(batch.features["tokens"], batch.valid)
        return self._loss(self.decoder(clean, valid, _grid(batch.features["tokens"])), clean, valid)

    def after_step(self, step: Step) -> None:
        """The momentum copy follows."""
        self.guide.after_step(step, self.decoder)

    def _guidance(self, batch: Batch, clean: Tensor, valid: Tensor, step: Step, unit: Tensor) -> Guidance:
        prior, learned = self._cues(batch, clean, valid)
        share, places = self._share(step), step.generator("places")
        found: Guidance = self.guide(prior, learned, share, valid, places, unit)
        return found

    def _cues(self, batch: Batch, clean: Tensor, valid: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The prior (B, K, N) and the learned cue (B, N), where they are used."""
        prior = batch.features["prior"].flatten(2) if "prior" in batch.features else None
        return prior, self.guide.learned(self.decoder, clean, valid, _grid(batch.features["tokens"]))

    def _share(self, step: Step) -> float:
        """How far the training is; by epochs it is a staircase."""
        if self.config.schedule_unit == "step":
            return step.share
        epochs = self.config.epochs or step.total * self.config.batch / max(self._num_views, 1)
        epoch = math.floor(epochs * step.number / step.total)
        return epoch / max(math.ceil(epochs) - 1, 1)

    def _unit(self, clean: Tensor, valid: Tensor) -> Tensor:
        """What noise of strength 1 is at each token, (B, N) (section 6.1)."""
        squares = clean.square().mean(dim=2)  # (B, N)
        if self.config.noise_unit == "token_rms":
            return squares.sqrt()
        if self.config.noise_unit == "one":
            return torch.ones_like(squares)
        number = valid.sum(dim=1, keepdim=True).clamp_min(1)
        return ((squares * valid).sum(dim=1, keepdim=True) / number).sqrt().expand_as(squares)

    @torch.no_grad()
    def _of_disturbed_picture(self, batch: Batch, guidance: Guidance, step: Step) -> Tensor:
        """Tokens (B, N, C) of the pictures with noise where attention is highest (section 6.2). No clamp."""
        assert batch.pictures is not None
        config = self.config
        ratio = linear(config.ratio_start, config.ratio_end, self._share(step), config.ramp)
        grid = _grid(batch.features["tokens"])
        sigma = picture_sigma(guidance.attention, config.noise, ratio, config.sigma, grid, batch.valid)
        noise = _normal(batch.pictures, step.generator("noise/pictures"))
        with torch.autocast(noise.device.type, enabled=False):
            disturbed = batch.pictures + sigma * noise
            fused = self._fused(self.backbone(disturbed, self.levels), disturbed)
        return fused.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _turned(self, batch: Batch, step: Step) -> Batch:
        """The batch with each picture mirrored or turned at random, and its features computed anew."""
        assert batch.pictures is not None
        pictures, valid = turned(batch.pictures, batch.valid, self.config.augment, step.generator("turns"))
        with torch.autocast(pictures.device.type, enabled=False):
            return Batch(self.features(pictures, valid), valid, pictures)

    def _loss(self, rebuilt: Tensor, clean: Tensor, valid: Tensor) -> Loss:
        """Mean over valid tokens, then over pictures."""
        if self.config.loss == "cosine":
            error = 1 - F.cosine_similarity(rebuilt.float(), clean, dim=2)
        else:
            error = (rebuilt.float() - clean).square().mean(dim=2)  # (B, N)
        of_pictures = (error * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
        return Loss(of_pictures.mean(), self._baseline)

    # Inspection

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        height, width = pictures.shape[-2:]
        sigma = self.config.smooth_sigma * min(height, width) / _MAP_SIDE
        anomaly_map = pixel_map(self._error(pictures, valid), valid, sigma)
        return Maps(anomaly_map, score_of_map(anomaly_map, valid[:, 0], self.config.score))

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): the error of rebuilding on the stored scale."""
        energy: Tensor = self.scale(self._error(pictures, valid))
        return energy

    def _error(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """||F - F_hat|| of every token, (B, h, w) (equation 8)."""
        features = self._fused(self.backbone(pictures, self.levels), pictures)
        return self._error_of(features, valid)

    def _error_of(self, features: Tensor, valid: Tensor) -> Tensor:
        clean, inside = self._tokens(features, valid)
        momentum = self.config.infer_with == "momentum"
        decoder = self.guide.slow if momentum and self.guide.slow is not None else self.decoder
        error = (decoder(clean, inside, _grid(features)) - clean).square().sum(dim=2)
        return torch.unflatten((error + 1e-12).sqrt(), 1, _grid(features))

    def _tokens(self, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) -> tokens (B, N, C) and whether each is valid (B, N)."""
        return features.flatten(2).transpose(1, 2), valid_on_grid(features, valid).flatten(1)

    @torch.no_grad()
    def explain(self, pictures: Tensor, valid: Tensor) -> Explanation:
        """The cues, the masks that they make as a training ends, and the error unblurred (section 14)."""
        config = self.config
        batch = Batch(self.features(pictures, valid), valid, pictures)
        features = batch.features["tokens"]
        clean, inside = self._tokens(features, valid)
        prior, learned = self._cues(batch, clean, inside)
        tokens: dict[str, Tensor] = {}
        pixels: dict[str, Tensor] = {}
        if prior is not None:
            tokens["prior"] = joint_prior(self.guide.cut(prior, inside), inside, config.contrast_floor)
        if learned is not None:
            tokens["learned"] = normalise(learned, inside, config.contrast_floor)
        if tokens:
            end = Step(max(config.steps - 1, 1), config.steps)
            found: Guidance = self.guide(prior, learned, 1.0, inside, end.generator("places"))
            tokens["mask"] = found.mask
            if config.levels != "feature" and config.noise != "uniform":
                shown = (found.attention, config.noise, config.ratio_end, 1.0, _grid(features), valid)
                pixels["mask_image"] = picture_sigma(*shown)[:, 0]
        on_grid = {name: torch.unflatten(values, 1, _grid(features)) for name, values in tokens.items()}
        maps = {name: pixel_map(values, valid, 0) for name, values in on_grid.items()}
        maps |= {**pixels, "error": pixel_map(self._error_of(features, valid), valid, 0)}
        words = "Masks guide training; they are not part of the verdict."
        if config.noise == "uniform":
            words += " Here noise was the same everywhere: the mask placed none."
        if learned is not None and self.guide.slow is None:
            words += " The learned cue is the decoder's own, since there is no momentum copy."
        return Explanation(maps, self._strengths(), words)

    def _strengths(self) -> dict[str, Json]:
        """How strong the noise was, for the report."""
        config = self.config
        return {
            "noise": config.noise,
            "alpha": [config.alpha(0.0), config.alpha(1.0)],
            "beta": config.beta,
            "pixels": [config.ratio_start, config.ratio_end],
            "contrast floor": config.contrast_floor,
        }


def _grid(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of that shape, drawn on the CPU so that a seed means the same everywhere."""
    return torch.randn(like.shape, generator=generator).to(like)
