"""The protocols: what a backbone, a method and a run are. torch is imported for typing only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True)
class Level:
    """One feature level of a backbone: its name, channels, and stride in picture px."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is and where its weights came from.

    Attributes:
        id: the registry's name ("tf_efficientnet_lite2").
        sha256: hash of the weights file; "random" for weights asked for as random.
        source: where the weights were found, in words.
        licence: licence of the weights.
        levels: every level that the weights can serve, finest first.
        side_step: picture sides must be multiples of it (32; 14 for a patch-14 ViT).
        mean, std: normalisation of an RGB picture in 0..1, done inside the backbone.
    """

    id: str
    sha256: str
    source: str
    licence: str
    levels: tuple[Level, ...]
    side_step: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def level(self, name: str) -> Level | None:
        return next((level for level in self.levels if level.name == name), None)


class Maps(NamedTuple):
    """Final answers of a method: anomaly map (B, H, W) in framed px, and score (B,)."""

    anomaly_map: Tensor
    score: Tensor


@dataclass(frozen=True)
class Traits:
    """What a method can do. Code asks traits, never names.

    Attributes:
        trained: learns by gradient steps (False: a memory method, fitted in one pass).
        multi_class: one model may hold many products without labels.
        few_shot: meaningful from a handful of pictures.
        fixed_grid: bound to the framed size that it was fitted at.
        square_grid: needs a square token grid.
        leave_one_out: offers `left_out`, so that calibration wastes no picture.
    """

    trained: bool
    multi_class: bool
    few_shot: bool
    fixed_grid: bool
    square_grid: bool
    leave_one_out: bool


class Preset(NamedTuple):
    """A named setting of a method: its configuration and what belongs to it.

    `backbone` None is the product's default; `frame` and `size` as in `--frame` and `--size`.
    """

    config: BaseModel
    backbone: str | None
    frame: str
    size: int


class FeatureBatch(NamedTuple):
    """Clean features of some good pictures, as `Method.features` gave them.

    `keys` names each picture (hash of its file), `groups` says which pictures belong together
    (the same part, lot, ...); without groups each picture is its own.
    """

    features: dict[str, Tensor]
    valid: Tensor  # (B, 1, H, W) bool, framed px
    keys: tuple[str, ...]
    groups: tuple[str, ...]


class FeatureStream(Protocol):
    """Good pictures' features, group by group in the order of their keys. May be walked several times."""

    @property
    def num_pictures(self) -> int: ...
    def __iter__(self) -> Iterator[FeatureBatch]: ...


Progress: TypeAlias = "Callable[[str, int, int], None]"
"""progress(what, done, total): called often; a front end draws it."""


def no_progress(what: str, done: int, total: int) -> None:
    """The progress of a caller that wants none."""


def no_words(sentence: str) -> None:
    """The listener of a caller that wants no words."""


@dataclass(frozen=True)
class Run:
    """The circumstances of one fit: seed, device and bounds.

    Attributes:
        seed: every random stream is hashed from it and a name.
        device: "cpu", "cuda", "cuda:1", ...
        memory_mib: bound on what a fit may hold besides the network, MiB.
        progress: called with (what, done, total).
        say: called with a sentence that the user should see while he waits.
    """

    seed: int = 0
    device: str = "cpu"
    memory_mib: int = 256
    progress: Progress = no_progress
    say: Callable[[str], None] = no_words

    def stream_seed(self, name: str) -> int:
        """A 63-bit seed for the purpose `name`, independent of every other purpose's."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for the purpose `name`."""
        import torch

        return torch.Generator().manual_seed(self.stream_seed(name))


@dataclass
class FitRecord:
    """What a fit did, for the model card: plain facts by name, and warnings in words."""

    facts: dict[str, Json] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@runtime_checkable
class Backbone(Protocol):
    """A frozen network: pictures (B, 3, H, W) in 0..1 to features. Normalises inside; differentiable
    in the picture. An nn.Module."""

    spec: BackboneSpec

    def __call__(self, pictures: Tensor, levels: Sequence[str]) -> dict[str, Tensor]:
        """Features (B, C, h, w) by level name. A level it cannot serve is refused by name."""
        ...

    def features_and_cue(
        self, pictures: Tensor, levels: Sequence[str], cue: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features, and a map (B, h, w) of where the picture holds something, from one pass."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...


@runtime_checkable
class Method(Protocol):
    """Learns what good looks like. An nn.Module; all that it learnt is in its state_dict.

    `valid` is (B, 1, H, W) bool in framed px: False on padding and outside the region of interest.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    traits: ClassVar[Traits]
    presets: ClassVar[dict[str, Preset]]
    backbone: Backbone
    config: BaseModel
    levels: tuple[str, ...]

    def __init__(self, backbone: Backbone, config: Any, levels: Sequence[str]) -> None: ...

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: Any) -> tuple[str, ...]:
        """The levels to tap on a backbone that offers these, finest first."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Clean features with nothing learnt in them: what a cache may keep."""
        ...

    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        """Learn from good pictures, in memory bounded by `run.memory_mib`."""
        ...

    def settle(self, energies: Tensor) -> None:
        """Fix the scale of `patch_energy` from raw energies (n,) of good pictures not learnt from."""
        ...

    def __call__(self, pictures: Tensor, valid: Tensor) -> Maps:
        """Final map and score. A picture's answer never depends on its batch mates."""
        ...

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        """(B, h, w): about 0 for a typical patch, about 1 for a rare good one; differentiable."""
        ...


class LeftOut(NamedTuple):
    """One good picture judged by a model that does not know it."""

    key: str
    group: str
    maps: Maps  # of this one view, B = 1
    valid: Tensor  # (1, 1, H, W) bool
    energies: Tensor  # raw patch energies (n,), valid patches only


@runtime_checkable
class LeavesOut(Protocol):
    """A method that can leave a picture (and its group) out cheaply."""

    def left_out(self, good: FeatureStream, run: Run) -> Iterator[LeftOut]:
        """Each picture of `good`, judged without itself and its group, in the stream's order."""
        ...
