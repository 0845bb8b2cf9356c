"""UniAD (You et al., NeurIPS 2022, arXiv 2206.03687): features rebuilt from their surroundings.

A small transformer rebuilds the frozen features of every patch from patches further away, since its
neighbours and itself are masked. It can only put there what belongs there, and the error is the anomaly
map. One model holds many products and is told none of their names. Sections named in comments are those of
the specification of FPFNet and UniAD; the network is read from `EncoderLayer` on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from fettle.errors import ConfigError, DataError
from fettle.layers.attention import MultiHeadAttention, neighbour_mask, sees_nobody, visible
from fettle.layers.energy_scale import EnergyScale
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.positions import LearnedPositions
from fettle.layers.taps import spaced_blocks
from fettle.layers.token_grid import Align, aligned_to, enlarged, pooled_maximum, valid_on_grid
from fettle.perturb.attention import equal_energy
from fettle.perturb.attention_guide import AttentionGuide
from fettle.perturb.pool import NAMED_POOLS, PoolConfig
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

Fusion: TypeAlias = Literal["none", "encoder", "encoder_input", "decoder", "encoder_decoder", "skip", "full"]

_GRID_STRIDE = 16  # framed px a token, where the backbone is a pyramid
_STEM = 64  # a stride-2 level of so many channels is a network's stem, not a stage
_Side = Annotated[int, Field(ge=1, le=1024)]


def _square(value: object) -> object:
    return (value, value) if isinstance(value, int) else value


class UniadConfig(TrainingConfig):
    """Fields of UniAD and FPFNet. Those of the training are `TrainingConfig`'s.

    Attributes:
        levels: backbone levels, fine to coarse; None takes strides 2, 4, 8 and 16 where the network has
            such stages, or three blocks of a ViT.
        align: how levels come to the grid: "corners" is the paper's bilinear with aligned corners (which the
            map is then enlarged with, too), "mean" averages cells and keeps them on the picture.
        level_scaling: "rms" brings every level to the same size; "none" is the paper's.
        width, heads, ffn: channels of the transformer, its heads, and of the hidden layer.
        encoder_layers, decoder_layers: their numbers.
        dropout: in training only; the paper's 0.1 costs 1.7 times the time a step on a CPU, and a short
            training is far from fitting its pictures too well.
        window: side(s) of the neighbourhood that a token may not see, tokens; one number or (high, wide).
        mask_encoder: whether the encoder is masked, too. The decoder always is.
        pool: perturbations of the features in training: a name or a pool's own fields.
        fusion: which layers are summed, see `Reconstruction`. "none" is UniAD.
        score_pool: side of the windows that the map is averaged over before its maximum is the score,
            framed px; None is one token.
        steps, batch, lr: compact values, from a sweep on the error of rebuilding held-out good pictures
            (docs/results.md).
    """

    steps: int = Field(default=4000, ge=1, le=100_000_000)
    batch: int = Field(default=4, ge=1, le=4096)
    lr: float = Field(default=1e-3, gt=0, le=10)

    levels: tuple[str, ...] | None = None
    align: Align = "mean"
    level_scaling: Literal["none", "rms"] = "rms"
    width: int = Field(default=128, ge=2, le=4096, multiple_of=2)
    heads: int = Field(default=4, ge=1, le=256)
    ffn: int = Field(default=512, ge=1, le=65536)
    encoder_layers: int = Field(default=2, ge=1, le=64)
    decoder_layers: int = Field(default=2, ge=1, le=64)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    window: Annotated[tuple[_Side, _Side], BeforeValidator(_square)] = (7, 7)
    mask_encoder: bool = True
    pool: PoolConfig = NAMED_POOLS["gaussian"]
    fusion: Fusion = "none"
    score_pool: int | None = Field(default=None, ge=1, le=8192)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
        return self


class FeedForward(nn.Sequential):
    """W2 drop(relu(W1 x)), token by token."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Self attention, then a feed-forward step; the norm follows each sum (section 3.4).

    The residual keeps each token's own input in it. So nothing may carry encoder token i to output i.
    """

    def __init__(self, config: UniadConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.feed_forward = FeedForward(config.width, config.ffn, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """(B, N, width) -> the same. Positions are added to queries and keys only, never to values."""
        placed = x + position
        x = self.norm1(x + self.drop(self.attention(placed, placed, x, mask)))
        x = self.norm2(x + self.drop(self.feed_forward(x)))
        return x


class DecoderLayer(nn.Module):
    """A layer of the layer-wise query decoder (section 3.5).

    It starts from its own learned queries, the same for every picture, and reads the encoder's memory and
    the layer before as keys and values only: the residual stream holds no input token that did not come
    through a masked attention.
    """

    def __init__(self, num_tokens: int, config: UniadConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_tokens, config.width))
        self.read_memory = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.read_previous = MultiHeadAttention(config.width, config.heads, config.dropout)
        self.feed_forward = FeedForward(config.width, config.ffn, config.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, previous: Tensor, memory: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """`previous` and `memory` (B, N, width) -> (B, N, width)."""
        t: Tensor = self.queries.expand(memory.shape[0], -1, -1)  # (B, N, width): every layer starts anew
        t = self.norm1(t + self.drop(self.read_memory(t + position, memory + position, memory, mask)))
        t = self.norm2(t + self.drop(self.read_previous(t + position, previous + position, previous, mask)))
        t = self.norm3(t + self.drop(self.feed_forward(t)))
        return t


class Reconstruction(nn.Module):
    """The head: features to features, each token rebuilt from those that it may see (section 3).

    `fusion` says which layers are summed, without a parameter (section 9.2; e_0 is the projected input,
    e_1.. the encoder's layers, d_1.. the decoder's, LN0 a layer norm without weights):

    - none: memory m = e_L, output y = LN(d_L)
    - encoder: m = LN0(e_1 + ... + e_L); encoder_input: m = LN0(e_0 + ... + e_L)
    - decoder: y = LN(d_1 + ... + d_L)
    - skip: decoder layer l >= 2 reads LN0(d_{l-1} + e_{L+1-l}) as the layer before it
    - encoder_decoder: encoder and decoder. full: encoder, skip and decoder

    Sums of encoder tokens go into keys and values only, which output i cannot see at i. Added to the output
    or to the queries they would carry the input past the mask, so there are no such modes.

    Args:
        channels: of the features. grid: (H, W), tokens; (0, 0) while it is not known yet.
        config: sizes, window and fusion.
    """

    def __init__(self, channels: int, grid: tuple[int, int], config: UniadConfig) -> None:
        super().__init__()
        self.window, self.mask_encoder, self.fusion = config.window, config.mask_encoder, config.fusion
        self.project_in = nn.Linear(channels, config.width)
        self.positions = LearnedPositions(grid, config.width)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(grid[0] * grid[1], config) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.project_out = nn.Linear(config.width, channels)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W), tokens: the position tables' lengths."""
        return self.positions.grid

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Rebuild features.

        Args:
            tokens: (B, N, C), row by row. valid: (B, N) bool; invalid tokens are never looked at.

        Returns:
            (B, N, C).
        """
        allowed = neighbour_mask(self.grid, self.window, tokens.device)  # (N, N)
        mask = visible(allowed, valid)  # (B, 1, N, N)
        encoder_mask = mask if self.mask_encoder else visible(torch.ones_like(allowed), valid)
        position = self.positions()  # (N, width)

        encoded = [self.project_in(tokens)]  # e_0, each (B, N, width)
        for layer in self.encoder:
            encoded.append(layer(encoded[-1], position, encoder_mask))
        memory = self.memory(encoded)

        decoded: list[Tensor] = []  # d_1, d_2, ...
        previous = memory
        for layer in self.decoder:
            decoded.append(layer(previous, memory, position, mask))
            previous = self.carried(decoded, encoded)
        summed = self.fusion in ("decoder", "encoder_decoder", "full")
        output = torch.stack(decoded).sum(dim=0) if summed else decoded[-1]
        rebuilt: Tensor = self.project_out(self.norm(output))
        return rebuilt

    @torch.no_grad()
    def looked_at(self, tokens: Tensor, valid: Tensor, grid: tuple[int, int], layers: str) -> Tensor:
        """How much each token is looked at in "all" encoder layers or the "last", (B, N); no dropout."""
        training = self.training
        self.eval()
        allowed = neighbour_mask(grid, self.window, tokens.device)
        mask = visible(allowed if self.mask_encoder else torch.ones_like(allowed), valid)
        received = []
        with torch.autocast(tokens.device.type, enabled=False):
            position, x = self.positions(), self.project_in(tokens.float())
            for number, layer in enumerate(self.encoder, start=1):
                if layers == "all" or number == len(self.encoder):
                    attention = cast(EncoderLayer, layer).attention
                    received.append(attention.received(x + position, x + position, mask, valid))
                if number < len(self.encoder):
                    x = layer(x, position, mask)
        self.train(training)
        return torch.stack(received).mean(dim=0)

    def memory(self, encoded: list[Tensor]) -> Tensor:
        """m, what every decoder layer reads, from e_0, e_1, ..., e_L."""
        if self.fusion in ("encoder", "encoder_decoder", "full"):
            return plain_norm(torch.stack(encoded[1:]).sum(dim=0))
        if self.fusion == "encoder_input":
            return plain_norm(torch.stack(encoded).sum(dim=0))
        return encoded[-1]

    def carried(self, decoded: list[Tensor], encoded: list[Tensor]) -> Tensor:
        """What the decoder layer after d_1, ..., d_{l-1} reads as the layer before it."""
        if self.fusion not in ("skip", "full"):
            return decoded[-1]
        partner = len(encoded) - 1 - len(decoded)  # L + 1 - l: deep with shallow, as in a U-Net
        return plain_norm(decoded[-1] + encoded[max(partner, 0)])

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, on the CPU, layer by layer (section 3.6)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, MultiHeadAttention):  # the bound of the packed (3 width, width) matrix
                nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
                nn.init.zeros_(module.in_proj_bias)
            elif isinstance(module, LearnedPositions):
                nn.init.uniform_(module.rows, generator=generator)
                nn.init.uniform_(module.columns, generator=generator)
            elif isinstance(module, DecoderLayer):
                nn.init.normal_(module.queries, generator=generator)


def plain_norm(x: Tensor) -> Tensor:
    """LN0: layer norm over channels without weights."""
    return F.layer_norm(x, x.shape[-1:])


class Uniad(nn.Module):
    """The backbone, the head, and what they need to judge. See the module's text."""

    name: ClassVar[str] = "uniad"
    Config: ClassVar[type[UniadConfig]] = UniadConfig
    traits: ClassVar[Traits] = Traits(
        trained=True,
        multi_class=True,
        few_shot=False,
        fixed_grid=True,
        square_grid=False,
        leave_one_out=False,
        exports=("onnx", "openvino", "pt2"),
    )
    presets: ClassVar[dict[str, Preset]] = {
        "compact": Preset(UniadConfig(), backbone=None, frame="auto", size=256),
        "paper": Preset(
            UniadConfig(
                align="corners",
                level_scaling="none",
                width=256,
                heads=8,
                ffn=1024,
                encoder_layers=4,
                decoder_layers=4,
                dropout=0.1,
                epochs=1000,
                batch=8,
                lr=1e-4,
                warmup=0,
            ),
            backbone="tf_efficientnet_b4.aa_in1k",
            frame="square",
            size=224,
        ),
    }

    channel_scale: Tensor

    def __init__(self, backbone: Backbone, config: UniadConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.levels = tuple(levels)
        known = [level for name in levels if (level := backbone.spec.level(name))]
        self._sizes = [level.channels for level in known]
        self.stride = min(max(level.stride for level in known), _GRID_STRIDE)
        self.head = Reconstruction(sum(self._sizes), (0, 0), config)
        guide = config.pool.guide
        self.guide = None if guide is None else AttentionGuide(guide, backbone, levels)
        if self.guide is not None:
            self.guide.watch(self.head)
        self.register_buffer("channel_scale", torch.ones(sum(self._sizes)))  # one number a level, repeated
        self.scale = EnergyScale()
        self._baseline = 1.0  # MSE of predicting each position's mean; known during the fit only

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: UniadConfig) -> tuple[str, ...]:
        """Levels that this method taps on a backbone that offers these."""
        if config.levels is not None:
            return config.levels
        if len({level.stride for level in offered}) > 1:
            stages = [level for level in offered if level.stride > 2 or level.channels < _STEM]
            return tuple(level.name for level in stages if level.stride <= _GRID_STRIDE)
        return spaced_blocks(offered, (1, 2, 3))

    def feature_key(self) -> str:
        """The recipe of `features`."""
        prior = "" if self.guide is None else self.guide.recipe
        return f"tokens of {','.join(self.levels)}, {self.config.align} at stride {self.stride}{prior}"

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """All levels on one grid, side by side (section 2): {"tokens": (B, C, h, w)}.

        A pool that is guided by the backbone's cue adds {"prior": (B, K, h, w)}.
        """
        if self.guide is None:
            return {"tokens": self._side_by_side(self.backbone(pictures, self.levels), pictures)}
        by_name, prior = self.guide.features(self.backbone, pictures, self.levels)
        tokens = self._side_by_side(by_name, pictures)
        grid = (tokens.shape[-2], tokens.shape[-1])
        return {"tokens": tokens, **{name: aligned_to(maps, grid, "mean") for name, maps in prior.items()}}

    def _side_by_side(self, by_name: dict[str, Tensor], pictures: Tensor) -> Tensor:
        grid = (pictures.shape[-2] // self.stride, pictures.shape[-1] // self.stride)
        return torch.cat([aligned_to(by_name[name], grid, self.config.align) for name in self.levels], dim=1)

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Walk once: the levels' sizes, what predicting the mean costs, and the grid; then draw the weights.

        Raises:
            DataError: no picture, or features that are NaN or infinite.
            ConfigError: the window is too large for the grid.
        """
        seen = FeatureStatistics()
        lonely = 0
        for batch in good:
            tokens, valid = batch.features["tokens"], valid_on_grid(batch.features["tokens"], batch.valid)
            seen.add(tokens, valid, len(set(batch.keys)))
            if self.guide is not None and "prior" in batch.features:
                self.guide.keep_prior(batch.features["prior"].flatten(2), valid.flatten(1))
            allowed = neighbour_mask(seen.grid, self.config.window, tokens.device)
            lonely += int((sees_nobody(allowed, valid.flatten(1)) & valid.flatten(1)).sum())
        if not seen.num_pictures:
            raise DataError("There is no good picture to learn from.", "Give a folder of good pictures.")
        if not seen.finite:
            raise DataError("Features of good pictures hold NaN or inf.", "Check the backbone's weights.")
        if self.config.level_scaling == "rms":
            self.channel_scale = seen.level_scale(self._sizes).to(self.channel_scale)
        several = seen.num_pictures > 1  # one picture is its own mean
        self._baseline = seen.spread(self.channel_scale) if several else 0.0
        device = self.channel_scale.device
        self.head = Reconstruction(sum(self._sizes), seen.grid, self.config)
        self.head.initialise(run.generator("uniad/weights"))
        self.head.to(device).train(self.training)
        if self.guide is not None:
            self.guide.watch(self.head)
            self.guide.begin(seen.grid[0] * seen.grid[1])
        ends = torch.tensor(self._sizes).cumsum(0) - 1
        facts: dict[str, Json] = {
            "grid": list(seen.grid),
            "channels": sum(self._sizes),
            "parameters": sum(parameter.numel() for parameter in self.head.parameters()),
            "level_scale": self.channel_scale.cpu()[ends].tolist(),
            "mean_feature_mse": self._baseline,
        }
        warnings = []
        if lonely:
            warnings.append(
                f"{lonely / seen.num_tokens:.1%} of the patches inside the region see no other patch of it "
                "beyond their window; they are rebuilt from what lies outside. Use a smaller window."
            )
        return FitRecord(facts, warnings)

    def needs(self, step: Step) -> frozenset[str]:
        """Nothing besides features."""
        return frozenset()

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """The error of rebuilding the clean features from perturbed ones (section 4)."""
        clean, valid = self._tokens(batch.features["tokens"], batch.valid)
        seen = clean
        if self.training:
            pool = self.config.pool
            draws, strength = step.generator("pool"), pool.schedule(step.share)
            guide = self._guidance(batch, clean, valid, step)
            seen = pool(clean, self.head.grid, draws, strength=strength, guide=guide, valid=valid)
        yield Loss(mean_squared_error(self.head(seen, valid), clean, valid), self._baseline)

    def held_out_loss(self, batch: Batch) -> Loss:
        """The same without perturbation."""
        clean, valid = self._tokens(batch.features["tokens"], batch.valid)
        return Loss(mean_squared_error(self.head(clean, valid), clean, valid), self._baseline)

    def _guidance(self, batch: Batch, clean: Tensor, valid: Tensor, step: Step) -> Tensor | None:
        """Where a guided pool disturbs, (B, N); None: everywhere alike.

        Its members' noise goes with each token's own size: in this unit the energy stays as it is unguided.
        """
        if self.guide is None:
            return None
        prior = batch.features["prior"].flatten(2) if "prior" in batch.features else None
        learned = self.guide.learned(self.head, clean, valid, self.head.grid)
        size = clean.square().mean(dim=2).sqrt()  # (B, N)
        found = self.guide(prior, learned, step.share, valid, step.generator("places"), size)
        return equal_energy(found.strength, torch.ones_like(size), size, valid)

    def after_step(self, step: Step) -> None:
        """The momentum copy of a guided pool follows."""
        if self.guide is not None:
            self.guide.after_step(step, self.head)

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        error = self._squared_error(pictures, valid).sqrt()
        anomaly_map = enlarged(error, valid, self.config.align)
        side = (valid.shape[-2] // error.shape[-2], valid.shape[-1] // error.shape[-1])
        if self.config.score_pool is not None:
            side = (self.config.score_pool, self.config.score_pool)
        return Maps(anomaly_map, pooled_maximum(anomaly_map, valid, side))

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): sqrt(||r - f||^2 + 1e-8) on the stored scale (section 5). Both r and f follow the
        picture."""
        energy: Tensor = self.scale((self._squared_error(pictures, valid) + 1e-8).sqrt())
        return energy

    def _squared_error(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """||r - f||^2 of every token, (B, h, w)."""
        features = self._side_by_side(self.backbone(pictures, self.levels), pictures)
        clean, inside = self._tokens(features, valid)
        error: Tensor = (self.head(clean, inside) - clean).square().sum(dim=2)  # (B, N)
        return torch.unflatten(error, 1, self.head.grid)

    def _tokens(self, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C, h, w) -> scaled tokens (B, N, C) and whether each is valid (B, N)."""
        grid = (features.shape[-2], features.shape[-1])
        if grid != self.head.grid:
            raise ConfigError(
                f"Method '{self.name}' was fitted on a grid of {list(self.head.grid)}, not {list(grid)}.",
                "Use the model's frame.",
            )
        tokens = features.flatten(2).transpose(1, 2) * self.channel_scale
        return tokens, valid_on_grid(features, valid).flatten(1)


def mean_squared_error(rebuilt: Tensor, clean: Tensor, valid: Tensor) -> Tensor:
    """Mean over the channels of valid tokens: (B, N, C), (B, N, C), (B, N) -> scalar, typed as `clean`."""
    squared = (rebuilt.to(clean.dtype) - clean).square().mean(dim=2)  # (B, N)
    return (squared * valid).sum() / valid.sum().clamp_min(1)
