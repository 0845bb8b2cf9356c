"""The two kinds of backbone: a convolutional pyramid and a vision transformer, both from timm networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fettle.backbones.folding import fold_batch_norm
from fettle.backbones.timm_import import import_timm
from fettle.errors import UsageError, WeightsError, nearest_name
from fettle.protocols import BackboneSpec, Level

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer as TimmViT
    from torch.nn import Module


_CUE_STRIDE = 16  # the cue's grid of a convolutional network
_PLAIN_VIT = "VisionTransformer"  # by timm's name of the class
_KNOWN_ATTENTION = "Attention"  # timm's plain one; others rotate, window or linearise


class _Frozen(nn.Module):
    """Eval mode for ever, no parameter gradients, normalisation inside."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: BackboneSpec, net: Module, levels: Sequence[str]) -> None:
        super().__init__()
        self.spec = spec
        self.built = tuple(levels)
        self.net = net.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> _Frozen:
        """Stays in eval mode: batch norm must use its running statistics."""
        return super().train(False)

    def normalise(self, pictures: Tensor, levels: Sequence[str]) -> Tensor:
        """Check what is asked, then map RGB in 0..1 to what the network was trained on."""
        for name in levels:
            if name not in self.built:
                raise UsageError(
                    f"Backbone '{self.spec.id}' was built without level '{name}'.",
                    f"It gives {', '.join(self.built)}.",
                )
        height, width = pictures.shape[-2:]
        step = self.spec.side_step
        if height % step or width % step:
            wrong = height if height % step else width
            below = max(wrong // step, 1) * step
            raise UsageError(
                f"Backbone '{self.spec.id}' cannot take {height} x {width} px.",
                f"Use sides that are multiples of {step}, such as {below} and {below + step}.",
            )
        return (pictures - self.mean).div_(self.std)

    def check_cue(self, cue: str, offered: Sequence[str]) -> None:
        """Refuse a cue that is not among those offered. Raises UsageError."""
        if cue not in offered:
            names = ", ".join(f"'{name}'" for name in offered)
            raise UsageError(f"Backbone '{self.spec.id}' has no cue '{cue}'.", f"It has {names}.")

    def extra_repr(self) -> str:
        return f"{self.spec.id}, levels={self.built}"


class ConvPyramid(_Frozen):
    """A convolutional network whose levels are named by stride: "stride4", "stride8", ...

    Tensors lie channels last in memory, which is one and a half to three times faster on a CPU. What runs is
    a copy whose batch norms are folded into the convolutions, made at the first picture; what is saved is the
    network as it came.
    """

    def __init__(self, spec: BackboneSpec, net: Module, levels: Sequence[str]) -> None:
        super().__init__(spec, net, levels)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # known to torch only
        self._folded: list[Module] = []  # a list, so that it is no part of this module's state
        self.register_load_state_dict_post_hook(_forget_folded)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvPyramid:
        """Moves and casts: the folded copy is made anew."""
        self._folded.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def fix(self, height: int, width: int) -> None:
        """From now on the folded copy is the network itself, as an exported graph holds it."""
        self.net = self._running
        self._folded = [self.net]

    @property
    def _running(self) -> Module:
        if not self._folded:
            self._folded.append(fold_batch_norm(self.net, 2 * self.spec.side_step))
        return self._folded[0]

    @property
    def cues(self) -> tuple[str, ...]:
        """What `features_and_cue` offers, the best first."""
        return ("energy", "energy_with_border")

    def features_and_cue(
        self,
        pictures: Tensor,
        levels: Sequence[str],
        cue: str = "energy",
        cue_levels: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features, and where the picture holds something: activation energy, from one pass.

        Args:
            levels: fine to coarse.
            cue: "energy", or "energy_with_border", see `activation_energy`.
            cue_levels: those of `levels` that the cue is taken from; None: all.

        Returns:
            features by level, and the energy of each level as it is, (B, cue levels, H/16, W/16).
        """
        self.check_cue(cue, self.cues)
        features = self(pictures, levels)
        grid = (pictures.shape[-2] // _CUE_STRIDE, pictures.shape[-1] // _CUE_STRIDE)
        without_border = cue == "energy"
        energies = [activation_energy(features[name], grid, without_border) for name in cue_levels or levels]
        return features, torch.cat(energies, dim=1)

    def forward(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, H, W) in 0..1 -> level: (B, C, H/stride, W/stride)."""
        pictures = self.normalise(pictures, levels).contiguous(memory_format=torch.channels_last)
        by_name = dict(zip(self.built, self._running(pictures), strict=True))
        for name in levels:
            level = self.spec.level(name)
            if level is not None and by_name[name].shape[1] != level.channels:
                raise UsageError(
                    f"Backbone '{self.spec.id}' gives channels last, as window attention does.",
                    "Use a convolutional network or a plain ViT.",
                )
        return {name: by_name[name] for name in levels}


def _forget_folded(backbone: ConvPyramid, _: object) -> None:
    """After weights were loaded."""
    backbone._folded.clear()


class VisionTransformer(_Frozen):
    """A plain ViT whose levels are the residual stream after each block ("block1", ...) and "final", the
    last block after the final norm. Positions are resampled by timm (bicubic with antialiasing)."""

    def forward(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, H, W) in 0..1 -> level: (B, C, H/patch, W/patch), patch tokens only."""
        features, _ = self._walk(pictures, levels, ())
        return features

    def fix(self, height: int, width: int) -> None:
        """From now on positions are those of pictures of this size, px, as an exported graph holds them."""
        cast("TimmViT", self.net).set_input_size(img_size=(height, width))

    @property
    def cues(self) -> tuple[str, ...]:
        """What `features_and_cue` offers, the best first."""
        return ("cls", "received") if cast("TimmViT", self.net).cls_token is not None else ("received",)

    def features_and_cue(
        self,
        pictures: Tensor,
        levels: Sequence[str],
        cue: str = "cls",
        cue_levels: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features, and the attention of the same blocks, from one pass.

        Args:
            cue: "cls", what the class token attends to, or "received", what all patches attend to; a mean
                over heads and blocks. It sums to 1 less what prefix tokens take.
            cue_levels: those of `levels` whose blocks' attention is taken; None: all.

        Returns:
            features by level, and the cue, (B, 1, h, w).
        """
        self.check_cue(cue, self.cues)
        net = cast("TimmViT", self.net)
        prefix = net.num_prefix_tokens
        rows = slice(0, 1) if cue == "cls" else slice(prefix, None)
        blocks = sorted({_block_number(name, len(net.blocks)) for name in cue_levels or levels})
        features, maps = self._walk(pictures, levels, blocks, rows)
        looked_at = torch.stack([maps[block].mean(dim=(1, 2))[:, prefix:] for block in blocks])
        step = self.spec.side_step
        grid = (pictures.shape[-2] // step, pictures.shape[-1] // step)
        return features, torch.unflatten(looked_at.mean(dim=0), 1, (1, *grid))

    def tokens(self, pictures: Tensor, level: str) -> Tensor:
        """All tokens of one level, class token first: (B, T, C)."""
        grid: dict[str, Tensor] = {}
        self._walk(pictures, (level,), (), tokens=grid)
        return grid[level]

    def attention(self, pictures: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Attention of blocks counted from 1: (B, heads, T, T) each, rows sum to 1."""
        _, maps = self._walk(pictures, (), tuple(blocks), slice(None))
        return [maps[block] for block in blocks]

    def _walk(
        self,
        pictures: Tensor,
        levels: Sequence[str],
        attention_of: Sequence[int],
        rows: slice = slice(None),
        tokens: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """One pass through the blocks, no further than what is asked for. `rows`: queries whose attention
        is wanted."""
        net = cast("TimmViT", self.net)
        x = net.patch_embed(self.normalise(pictures, levels))
        x = net.norm_pre(net.patch_drop(net._pos_embed(x)))  # (B, T, C)
        step = self.spec.side_step
        grid = (pictures.shape[-2] // step, pictures.shape[-1] // step)
        last = max([_block_number(name, len(net.blocks)) for name in levels] + list(attention_of))
        if last > len(net.blocks):
            raise UsageError(
                f"Backbone '{self.spec.id}' was built with {len(net.blocks)} blocks, not {last}."
            )
        found: dict[str, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for number, block in enumerate(list(net.blocks)[:last], start=1):
            if number in attention_of:
                kept: list[Tensor] = []
                with _attention_kept(block, rows, kept):
                    x = block(x)
                maps[number] = kept[0]
            else:
                x = block(x)
            if f"block{number}" in levels:
                found[f"block{number}"] = x
        if "final" in levels:
            found["final"] = net.norm(x)
        if tokens is not None:
            tokens.update(found)
        prefix = net.num_prefix_tokens
        return {name: _to_grid(found[name][:, prefix:], grid) for name in levels}, maps


def _to_grid(patch_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h w, C) -> (B, C, h, w)."""
    batch, _, channels = patch_tokens.shape
    return patch_tokens.transpose(1, 2).reshape(batch, channels, *grid)


def _block_number(level: str, depth: int) -> int:
    return depth if level == "final" else int(level.removeprefix("block"))


@contextmanager
def _attention_kept(block: Module, rows: slice, kept: list[Tensor]) -> Iterator[None]:
    """Within, what `block` attends to goes into `kept`: (B, heads, rows, T).

    Its fused attention never builds the matrix, and switching that off would move the features. So queries
    and keys are computed anew from the attention's own input; the features stay the same bits.
    """
    attention = cast("Module", getattr(block, "attn", None))
    if type(attention).__name__ != _KNOWN_ATTENTION:
        raise UsageError(
            f"The attention of {type(block).__name__} ({type(attention).__name__}) cannot be read.",
            "Use a plain ViT, such as vit_small_patch16_224.dino.",
        )

    def keep(module: Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(_attention_weights(module, inputs[0], rows))

    handle = attention.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _attention_weights(attention: Module, x: Tensor, rows: slice) -> Tensor:
    """softmax(q k^T / sqrt(d)) of timm's `Attention` on its input x (B, T, C), for some queries."""
    batch, num_tokens, _ = x.shape
    qkv = cast("nn.Linear", attention.qkv)(x)
    qkv = qkv.reshape(batch, num_tokens, 3, cast(int, attention.num_heads), -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
    query = cast("Module", attention.q_norm)(query[:, :, rows])
    key = cast("Module", attention.k_norm)(key)
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return cast(Tensor, scores.softmax(dim=-1))


def activation_energy(level: Tensor, grid: tuple[int, int], without_border: bool = True) -> Tensor:
    """Root mean square over channels of a level (B, C, h, w) on the given grid: (B, 1, *grid).

    Args:
        without_border: the outermost ring takes its inner neighbour's value, since zero padding makes the
            border stand out; on a grid of fewer than four a side nothing is replaced.
    """
    energy = level.square().mean(dim=1, keepdim=True).sqrt()
    if energy.shape[-1] >= grid[1]:
        energy = F.adaptive_avg_pool2d(energy, grid)
    else:
        energy = F.interpolate(energy, size=grid, mode="bilinear", align_corners=False)
    if without_border and min(grid) >= 4:
        energy = F.pad(energy[..., 1:-1, 1:-1], (1, 1, 1, 1), mode="replicate")
    return energy


def conv_levels(timm_name: str) -> tuple[Level, ...]:
    """Every level that timm's network of this name offers, finest first."""
    with torch.device("meta"):
        net = import_timm().create_model(timm_name, pretrained=False, features_only=True)
    info = net.feature_info
    pairs = zip(info.channels(), info.reduction(), strict=True)
    return tuple(Level(f"stride{stride}", channels, stride) for channels, stride in pairs)


def build_conv(timm_name: str, levels: Sequence[str], offered: Sequence[Level]) -> Module:
    """timm's pyramid of this name, cut after the deepest level asked for."""
    names = [level.name for level in offered]
    indices = tuple(names.index(name) for name in levels)
    if list(indices) != sorted(indices):
        raise UsageError(f"Levels must be named from fine to coarse, not {', '.join(levels)}.")
    net = import_timm().create_model(timm_name, pretrained=False, features_only=True, out_indices=indices)
    stages = getattr(net, "_stage_out_idx", None)
    if stages is not None:  # EfficientNets run every stage unless they are cut
        net.blocks = net.blocks[: max(stages)]
    return cast("Module", net)


def vit_levels(timm_name: str) -> tuple[tuple[Level, ...], int]:
    """Levels of a timm ViT, and its patch side."""
    with torch.device("meta"):
        net = import_timm().create_model(timm_name, pretrained=False, num_classes=0)
    if _PLAIN_VIT not in (parent.__name__ for parent in type(net).__mro__):
        raise UsageError(
            f"Backbone '{timm_name}' is a {type(net).__name__}, which is no plain ViT.",
            "Use one whose positions are added once, such as vit_small_patch16_224.dino.",
        )
    patch = int(net.patch_embed.patch_size[0])
    names = [f"block{number}" for number in range(1, len(net.blocks) + 1)] + ["final"]
    return tuple(Level(name, int(net.embed_dim), patch) for name in names), patch


def build_vit(timm_name: str, levels: Sequence[str], offered: Sequence[Level]) -> Module:
    """timm's ViT of this name, cut after the last block asked for."""
    net = import_timm().create_model(timm_name, pretrained=False, num_classes=0, dynamic_img_size=True)
    depth = max(_block_number(name, len(net.blocks)) for name in levels)
    net.blocks = net.blocks[:depth]
    if "final" not in levels:
        net.norm = nn.Identity()
    return cast("Module", net)


def is_vit(timm_name: str) -> bool:
    """True for timm's plain vision transformers. An unknown name is refused with the nearest one."""
    timm = import_timm()
    if not timm.is_model(timm_name):
        raise UsageError(
            f"There is no backbone '{timm_name}'.",
            nearest_name(timm_name, timm.list_models()) or "'fettle doctor' lists those with weights here.",
        )
    return timm_name.startswith(("vit_", "deit"))


def load_state(net: Module, state: dict[str, Tensor], known_keys: set[str], where: str) -> None:
    """Load `state` into a network that may be cut.

    Everything the network has must be in the state, but for the batch counters of batch norm, which are
    never used. Everything in the state must belong to the whole network (`known_keys`).

    Raises:
        WeightsError: keys are missing, unknown, or of another shape.
    """
    own = net.state_dict()
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    missing = sorted(needed - set(state))
    unknown = sorted(set(state) - known_keys - set(own))
    if missing or unknown:
        trouble = f"lack {missing[0]}" if missing else f"hold {unknown[0]}, which the network does not have"
        raise WeightsError(
            f"The weights {where} do not fit: they {trouble}.", "Name the backbone they belong to."
        )
    for key in needed:
        if own[key].shape != state[key].shape:
            raise WeightsError(
                f"The weights {where} do not fit: {key} has shape {tuple(state[key].shape)}.",
                "Name the backbone they belong to.",
            )
    net.load_state_dict({key: state[key].float() for key in needed}, strict=False)
