"""The network of TFA-Net: a template's tokens gather what they recognise in an input, and rebuild it.

One embedding serves input and template, and both have the same positions. After the first transformer the
input's tokens are thrown away: the only road from input to output leads through the attention of template
tokens. It is closed to defects by learning alone, not by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.layers.positions import wave_positions
from fettle.layers.vit_block import ViTBlock, seen_by_all

_EPS = 1e-5  # of the layer norms, as published
_INIT_STD = 0.02  # of tokens that belong to no place


class AggregationConfig(BaseModel):
    """Sizes and switches of the network.

    Attributes:
        patch: k; a token is k x k cells of the fused features.
        width, heads, depth: channels, heads and blocks of the first transformer (TFAM).
        rebuild_width, rebuild_heads, rebuild_depth: of the second (FDRM).
        positions: fixed "sincos", or a table "learned" from there.
        cls_token: a token of no place in both transformers.
        aggregation: "joint" lets all tokens look at all; in "cross" template tokens alone ask, and those of
            the input stay as they are. "convolution" has no attention: the template's grid takes from the
            input's by 3 x 3 convolutions, so from nearby places alone (ablation).
        discard: whose tokens go on: "template" throws the input's away. "keep_input" throws the template's
            away, and "no_template" never has any: then each token may copy itself (ablations).
        mask_mode: tokens that are masked in training leave the sequence ("drop"), or become one learned
            "token" before positions are added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: int = Field(default=2, ge=1, le=64)
    width: int = Field(default=128, ge=4, le=4096, multiple_of=4)
    heads: int = Field(default=4, ge=1, le=256)
    depth: int = Field(default=4, ge=1, le=64)
    rebuild_width: int = Field(default=128, ge=4, le=4096, multiple_of=4)
    rebuild_heads: int = Field(default=4, ge=1, le=256)
    rebuild_depth: int = Field(default=2, ge=1, le=64)
    positions: Literal["sincos", "learned"] = "sincos"
    cls_token: bool = False
    aggregation: Literal["joint", "cross", "convolution"] = "joint"
    discard: Literal["template", "keep_input", "no_template"] = "template"
    mask_mode: Literal["drop", "token"] = "drop"

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        for width, heads in ((self.width, self.heads), (self.rebuild_width, self.rebuild_heads)):
            if width % heads:
                raise ValueError(f"{heads} heads do not divide a width of {width}: choose heads that do")
        if self.aggregation == "convolution" and (self.cls_token or self.discard != "template"):
            raise ValueError("aggregation 'convolution' takes no cls_token and needs discard 'template'")
        return self


class Tokens(NamedTuple):
    """Tokens (B, n, d), and (B, n) bool: which may be looked at."""

    values: Tensor
    valid: Tensor

    def chosen(self, indices: Tensor, counts: Tensor) -> Tokens:
        """Those at indices (B, m), of which (B, m) bool count."""
        rows = indices[:, :, None].expand(-1, -1, self.values.shape[2])
        return Tokens(self.values.gather(1, rows), self.valid.gather(1, indices) & counts)


class TemplateAggregation(nn.Module):
    """See the module's text.

    Args:
        channels: of the fused features. grid: (H, W), tokens; (0, 0) while it is not known yet.
        config: sizes and switches.
    """

    def __init__(self, channels: int, grid: tuple[int, int], config: AggregationConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.width, config.rebuild_width
        self.embedding = nn.Conv2d(channels, width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, width)) if config.cls_token else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if config.mask_mode == "token" else None
        self.positions = _Positions(grid, width, config)
        self.aggregation = nn.ModuleList(
            _ConvolutionBlock(width)
            if config.aggregation == "convolution"
            else ViTBlock(width, config.heads, _EPS)
            for _ in range(config.depth)
        )
        self.aggregation_norm = nn.LayerNorm(width, eps=_EPS)
        self.narrow = nn.Linear(width, inner)
        self.inner_positions = _Positions(grid, inner, config)
        self.rebuilding = nn.ModuleList(
            ViTBlock(inner, config.rebuild_heads, _EPS) for _ in range(config.rebuild_depth)
        )
        self.rebuilding_norm = nn.LayerNorm(inner, eps=_EPS)
        self.project_out = nn.Linear(inner, config.patch**2 * channels)

    @property
    def attends(self) -> bool:
        """Whether the template's tokens look at the input's, and are kept: `attention` then has something."""
        return self.config.discard == "template" and self.config.aggregation != "convolution"

    def embed(self, fused: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Fused features (B, C, H k, W k) -> tokens (B, H W, width) with their positions.

        `hidden` (B, H W) bool are replaced by the mask token, which then has the position.
        """
        tokens = self.embedding(fused).flatten(2).transpose(1, 2)
        if hidden is not None:
            assert self.mask_token is not None
            tokens = torch.where(hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        placed: Tensor = self.positions(tokens, self.grid_of(fused))
        return placed

    def grid_of(self, fused: Tensor) -> tuple[int, int]:
        """Height and width of the token grid of fused features (B, C, h, w)."""
        return fused.shape[-2] // self.config.patch, fused.shape[-1] // self.config.patch

    def forward(self, seen: Tokens, template: Tokens | None, grid: tuple[int, int]) -> Tensor:
        """Rebuild the input's features from what the template's tokens gather.

        Args:
            seen: of the input; some may be missing. template: all N; None with discard "no_template".
            grid: (H, W) with H W = N.

        Returns:
            (B, N, k k C), as `patchify` lays it out.
        """
        if self.config.aggregation == "convolution":
            assert template is not None
            return self._rebuilt(self._convolved(seen, template, grid), grid)
        sequence, num_kept = self._sequence(seen, template)
        mask = seen_by_all(sequence.valid)
        x = sequence.values
        for number, block in enumerate(self.aggregation, start=1):
            # Nobody reads the other rows of the last block; in "cross" of none.
            asked = num_kept if self.config.aggregation == "cross" or number == self.config.depth else None
            x = self._step(cast(ViTBlock, block), x, mask, asked)
        kept = x[:, -num_kept:]
        return self._rebuilt(Tokens(self.aggregation_norm(kept), sequence.valid[:, -num_kept:]), grid)

    def _convolved(self, seen: Tokens, template: Tokens, grid: tuple[int, int]) -> Tokens:
        """Template tokens that have taken from places of the input near their own; all N must be there."""
        x = template.values
        for block in self.aggregation:
            x = block(x, template.valid, seen, grid)
        return Tokens(self.aggregation_norm(x), template.valid)

    def attention(self, seen: Tokens, template: Tokens) -> Iterator[Tensor]:
        """By block: how much template token j looks at input token i, (B, N, n), a mean over heads."""
        assert self.attends
        sequence, num_kept = self._sequence(seen, template)
        mask = seen_by_all(sequence.valid)
        x = sequence.values
        num_seen, num_template = seen.values.shape[1], template.values.shape[1]
        for block in cast("list[ViTBlock]", list(self.aggregation)):
            weights = block.attention.weights(block.norm1(x), mask, num_template)
            yield weights[:, :, :num_seen]
            x = self._step(block, x, mask, num_kept if self.config.aggregation == "cross" else None)

    @staticmethod
    def _step(block: ViTBlock, x: Tensor, mask: Tensor, asked: int | None) -> Tensor:
        """One block. Where only the last rows ask, the others stay as they are."""
        if asked is None:
            return cast(Tensor, block(x, mask))
        return torch.cat([x[:, :-asked], block(x, mask, asked)], dim=1)

    def _sequence(self, seen: Tokens, template: Tokens | None) -> tuple[Tokens, int]:
        """All tokens, those that go on at its end, and how many these are."""
        kept, others = seen, template
        if self.config.discard == "template":
            assert template is not None
            kept, others = template, seen
        num = seen.values.shape[0]
        parts = [] if others is None or self.config.discard == "no_template" else [others]
        if self.cls_token is not None:
            cls = self.positions.cls(self.cls_token).expand(num, 1, -1)
            parts.append(Tokens(cls, seen.valid.new_ones(num, 1)))
        parts.append(kept)
        values = torch.cat([part.values for part in parts], dim=1)
        sequence = Tokens(values, torch.cat([part.valid for part in parts], dim=1))
        return sequence, kept.values.shape[1] + (self.cls_token is not None)

    def _rebuilt(self, kept: Tokens, grid: tuple[int, int]) -> Tensor:
        """The second transformer over the tokens that go on, (B, [1 +] N, width) -> (B, N, k k C)."""
        num_cls = 0 if self.cls_token is None else 1
        narrow = self.narrow(kept.values)
        cls = self.inner_positions.cls(narrow[:, :num_cls])
        x = torch.cat([cls, self.inner_positions(narrow[:, num_cls:], grid)], dim=1)
        mask = seen_by_all(kept.valid)
        for block in self.rebuilding:
            x = block(x, mask)
        rebuilt: Tensor = self.project_out(self.rebuilding_norm(x))
        return rebuilt[:, num_cls:]

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights anew, on the CPU (section 7)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                bound = module.weight[0].numel() ** -0.5  # torch's own, for a bias
                nn.init.uniform_(cast(Tensor, module.bias), -bound, bound, generator=generator)
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=_INIT_STD, generator=generator)


class _ConvolutionBlock(nn.Module):
    """As a transformer's block, with a 3 x 3 convolution of both grids in the place of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.convolution = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, valid: Tensor, seen: Tokens, grid: tuple[int, int]) -> Tensor:
        """Template tokens x (B, N, d), of which valid (B, N) count, beside the input's (B, N, d)."""
        both = torch.cat(
            [self.norm1(x) * valid[:, :, None], self.norm1(seen.values) * seen.valid[:, :, None]], dim=2
        )
        on_grid = torch.unflatten(both.transpose(1, 2), 2, grid)  # (B, 2d, H, W)
        x = x + self.convolution(on_grid).flatten(2).transpose(1, 2)
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class _Positions(nn.Module):
    """Positions of a grid's tokens: fixed waves, or a table that starts as these and is learnt."""

    def __init__(self, grid: tuple[int, int], width: int, config: AggregationConfig) -> None:
        super().__init__()
        learned = config.positions == "learned"
        waves = wave_positions(grid, width, torch.device("cpu"))
        self.table = nn.Parameter(waves.clone()) if learned else None
        self.of_cls = nn.Parameter(torch.zeros(1, width)) if learned and config.cls_token else None

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, H W, width) with their positions."""
        if self.table is None:
            return tokens + wave_positions(grid, tokens.shape[-1], tokens.device).to(tokens.dtype)
        if len(self.table) != tokens.shape[1]:
            raise ConfigError(
                f"The model was fitted on a grid of {len(self.table)} tokens, not {tokens.shape[1]}.",
                "Use the model's frame.",
            )
        return tokens + self.table

    def cls(self, token: Tensor) -> Tensor:
        """A token of no place, (..., width), with its position: none, unless it is learnt."""
        return token if self.of_cls is None else token + self.of_cls
