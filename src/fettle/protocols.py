"""The protocols: what a backbone, a method and a run are. torch is imported for typing only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True)
class Level:
    """One feature level of a backbone: its name, channels, and stride in picture px."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for one read from a file

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

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # for one read from a file

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
    """Final answers of a method.

    Attributes:
        anomaly_map: (B, H, W), framed px. score: (B,).
        remarks: (B, R) numbers that a method which `Remarks` puts into words; None: it has none.
        fold_scores: (B, K) of the folds' models, where one exported graph holds them all; else None.
    """

    anomaly_map: Tensor
    score: Tensor
    remarks: Tensor | None = None
    fold_scores: Tensor | None = None


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
        exports: formats that it can be exported to: "onnx", "openvino", "pt2"; empty: it cannot.
    """

    trained: bool
    multi_class: bool
    few_shot: bool
    fixed_grid: bool
    square_grid: bool
    leave_one_out: bool
    exports: tuple[str, ...] = ()


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
    (the same part, lot, ...); without groups each picture is its own. `paths` are the files, and `products`
    what they show, where that is known.
    """

    features: dict[str, Tensor]
    valid: Tensor  # (B, 1, H, W) bool, framed px
    keys: tuple[str, ...]
    groups: tuple[str, ...]
    paths: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


class FramedPicture(NamedTuple):
    """One picture as the network sees it.

    Attributes:
        pixels: (1, 3, H, W) in 0..1. valid: (1, 1, H, W) bool.
        sha256: hash of the file's bytes. size: height and width of the picture itself, px.
        keeps_aspect: False where the frame fills its sides whatever the picture's aspect.
    """

    pixels: Tensor
    valid: Tensor
    sha256: str
    size: tuple[int, int]
    keeps_aspect: bool


class FeatureStream(Protocol):
    """Good pictures' features, group by group in the order of their keys. May be walked several times."""

    @property
    def num_pictures(self) -> int: ...
    def __iter__(self) -> Iterator[FeatureBatch]: ...
    def framed(self, path: str) -> FramedPicture:
        """Any picture file in the frame of these pictures, on the run's device.

        Raises:
            PictureError: it cannot be read.
        """
        ...


def stream_seed(name: str) -> int:
    """A 63-bit seed hashed from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


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
        cache_dir: folder where features are kept: those of a training for other trainings too, those of any
            other fit in a temporary file; None computes them each time they are needed.
        cache_mib: bound on that folder, and on that file, MiB.
        training_dir: folder where a training keeps its state, so that it can go on after a kill.
        log_dir: folder for a TensorBoard log; None: none.
    """

    seed: int = 0
    device: str = "cpu"
    memory_mib: int = 256
    progress: Progress = no_progress
    say: Callable[[str], None] = no_words
    cache_dir: Path | None = None
    cache_mib: int = 8192
    training_dir: Path | None = None
    log_dir: Path | None = None

    def stream_seed(self, name: str) -> int:
        """A 63-bit seed for the purpose `name`, independent of every other purpose's."""
        return stream_seed(f"{self.seed}/{name}")

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

    @property
    def cues(self) -> tuple[str, ...]:
        """Names of the cues that it offers, the best first."""
        ...

    def features_and_cue(
        self,
        pictures: Tensor,
        levels: Sequence[str],
        cue: str,
        cue_levels: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features, and where the picture holds something, from one pass: raw maps (B, K, h, w), which have
        a scale each."""
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
    energy: Tensor  # raw patch energies (1, h, w)
    unbounded: Tensor | None = None  # the same without a bound, of a method that is `Unbounded`


@runtime_checkable
class LeavesOut(Protocol):
    """A method that can leave a picture (and its group) out cheaply."""

    def left_out(self, good: FeatureStream, run: Run) -> Iterator[LeftOut]:
        """Each picture of `good`, judged without itself and its group, in the stream's order."""
        ...


@runtime_checkable
class Crops(Protocol):
    """A method whose patch energy may be asked for a part of a frame."""

    def crop_energy(self, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]]) -> Tensor:
        """As `patch_energy` has it at these places of the whole frame, but for what the backbone's padding
        does to the part's sides, (B, h, w).

        Args:
            pictures: (B, 3, H, W), parts of frames. valid: (B, 1, H, W) bool.
            origins: (top, left) of each part, framed px; multiples of every stride in use.
        """
        ...


@runtime_checkable
class Unbounded(Protocol):
    """A method whose patch energy is bounded, for its map's sake, and which has one without a bound, of parts
    of frames, too."""

    def unbounded_energy(
        self, pictures: Tensor, valid: Tensor, origins: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """As `patch_energy`, or where origins are given as `Crops.crop_energy`, but it grows however strange
        a patch is: an optimisation needs the slope."""
        ...


@runtime_checkable
class Remarks(Protocol):
    """A method that has something to say of each picture that it judged."""

    def remark(self, numbers: Sequence[float]) -> tuple[str, ...]:
        """Notes from one row of `Maps.remarks`."""
        ...


class Template(NamedTuple):
    """A good picture that every other is compared with.

    Attributes:
        name: of its file, without the folder. sha256: of the file's bytes. product: "" where not known.
        pixels: (3, H, W) in 0..1, framed. valid: (1, H, W) bool.
    """

    name: str
    sha256: str
    product: str
    pixels: Tensor
    valid: Tensor


UNUSUAL_TEMPLATE = "Unusual template"
"""How each warning of a template begins, so that it goes when the template does."""


@runtime_checkable
class Templated(Protocol):
    """A method that compares with pictures which a person should look at."""

    def templates(self) -> list[Template]:
        """Those in use, none where the template is no picture."""
        ...

    def set_template(self, picture: FramedPicture, name: str, product: str = "") -> None:
        """Put another picture in place of a product's one template; thresholds and the scale of
        `patch_energy` must be set anew then. `product` "" means the only template there is.

        Raises:
            ConfigError: there is no template of that product, there are several, or the picture's aspect
                does not fit the frame.
        """
        ...


class Explanation(NamedTuple):
    """Pictures of a method's inner view, and what belongs beside them.

    Attributes:
        maps: (B, H, W) by name, framed px, in 0..1; "error" is on the anomaly map's own scale.
        numbers: shown beside the pictures.
        words: one sentence on what the maps are and are not.
        pictures: (B, 3, H, W) by name, framed px, in 0..1: shown in their own colours.
    """

    maps: dict[str, Tensor]
    numbers: dict[str, Json]
    words: str
    pictures: dict[str, Tensor] = {}  # noqa: RUF012  # never changed


@runtime_checkable
class Explains(Protocol):
    """A method that can show its inner view."""

    def explain(self, pictures: Tensor, valid: Tensor) -> Explanation:
        """What it sees in pictures (B, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Step:
    """One step of a training. All randomness of the step is hashed from it, so that resuming needs no state.

    Attributes:
        number: from 0. total: steps planned.
        seed: of the run. rank: of this process among several; each draws its own.
    """

    number: int
    total: int
    seed: int = 0
    rank: int = 0

    @property
    def share(self) -> float:
        """How far the training is, 0 at the first step, 1 at the last."""
        return self.number / max(self.total - 1, 1)

    def stream_seed(self, name: str) -> int:
        """A 63-bit seed for the purpose `name` in this step."""
        return stream_seed(f"{self.seed}/{self.number}/{self.rank}/{name}")

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for the purpose `name` in this step."""
        import torch

        return torch.Generator().manual_seed(self.stream_seed(name))


class Batch(NamedTuple):
    """What a training step learns from: views of good pictures.

    Attributes:
        features: clean features as `Method.features` gives them, rounded through half precision.
        valid: (B, 1, H, W) bool, framed px.
        pictures: (B, 3, H, W) in 0..1 where the step needs them, else None.
        products: of each picture, where that is known.
    """

    features: dict[str, Tensor]
    valid: Tensor
    pictures: Tensor | None = None
    products: tuple[str, ...] = ()


class Loss(NamedTuple):
    """A scalar to go down on, and what predicting the mean feature would cost: their ratio is the
    normalised loss (1 = has learnt no more than the mean)."""

    value: Tensor
    baseline: float


@runtime_checkable
class Trained(Method, Protocol):
    """A method that learns by gradient steps. Its Config is a `training.TrainingConfig`.

    `prepare` walks the good pictures once, before the first step: scales, templates, baselines. Parameters
    that require gradients are trained; the backbone's never do.
    """

    def feature_key(self) -> str:
        """The recipe of `features` (levels, alignment, ...): part of the feature cache's key."""
        ...

    def needs(self, step: Step) -> frozenset[str]:
        """What this step's batch must carry besides features: "pictures", or nothing."""
        ...

    def losses(self, batch: Batch, step: Step) -> Iterator[Loss]:
        """One loss for each optimiser step that this batch gives; most methods give one."""
        ...

    def held_out_loss(self, batch: Batch) -> Loss:
        """The loss on pictures not learnt from: no perturbation, nothing random."""
        ...

    def after_step(self, step: Step) -> None:
        """What follows an optimiser step, such as a momentum copy."""
        ...


@runtime_checkable
class Finishes(Protocol):
    """A trained method that measures something of its own with its final weights."""

    def finish(self, good: FeatureStream) -> None:
        """After the training: look once more at the pictures learnt from, nothing perturbed."""
        ...
