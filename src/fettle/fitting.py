"""From good pictures to the parts of a detector: frame, backbone, method, calibration, model card."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fettle.backbones import registry as backbones
from fettle.calibration import Calibration, calibrate, needed_pictures
from fettle.datasets.records import Dataset
from fettle.errors import UsageError, nearest_name
from fettle.gathering import gather_good
from fettle.images.decode import read_mask
from fettle.images.framing import Frame, FrameMode, Resample, RoiMask, choose_frame
from fettle.judging import CalibrationMode, Fitter
from fettle.methods.registry import find_method, make_config
from fettle.protocols import Json, Method, Progress, Run


class FitRequest(BaseModel):
    """What a fit is asked for. None means the preset's own.

    Attributes:
        method, preset: names in the registry of methods.
        backbone: a registered or timm name. weights: a file, or "random".
        size, frame: framed size in px and framing, see `images.framing`.
        resample: filter for resizing. roi: left, top, right, bottom as shares of the picture.
        roi_mask: a mask picture, white inside the region of interest.
        group: column of a manifest whose pictures belong together (None: found by itself).
        settings: fields of the method's configuration to change.
        target_frr: share of good parts that may be rejected. strict: fail where it cannot be promised.
        calibration: how good pictures are judged by a model that does not know them, see `judging`.
        memory_mib: bound on what the fit holds besides the network.
    """

    model_config = ConfigDict(extra="forbid")

    method: str = "patchcore"
    preset: str = "compact"
    backbone: str | None = None
    weights: str | None = None
    size: int | None = Field(default=None, ge=14, le=8192)
    frame: FrameMode | None = None
    resample: Resample = "bilinear"
    roi: tuple[float, float, float, float] | None = None
    roi_mask: Path | None = None
    group: str | None = None
    seed: int = Field(default=0, ge=0)
    settings: dict[str, object] = Field(default_factory=dict)
    target_frr: float = Field(default=0.01, gt=0, lt=1)
    strict: bool = False
    calibration: CalibrationMode = "auto"
    memory_mib: int = Field(default=512, ge=32)
    device: str = "cpu"


def make_request(settings: Mapping[str, object]) -> FitRequest:
    """A request from keyword arguments.

    Raises:
        UsageError: an unknown name, or a value that it does not take.
    """
    known = FitRequest.model_fields
    for name in settings:
        if name not in known:
            raise UsageError(f"A fit has no setting '{name}'.", nearest_name(name, known))
    try:
        return FitRequest.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"The setting '{place}' cannot be {first['input']!r}: {first['msg']}.", "Correct it."
        ) from error


@dataclass(frozen=True)
class FittedParts:
    """What a detector is made of."""

    method: Method
    fold_methods: tuple[Method, ...]
    frame: Frame
    calibration: Calibration
    card: dict[str, Json]


def fit_parts(
    dataset: Dataset, request: FitRequest, progress: Progress, say: Callable[[str], None]
) -> FittedParts:
    """Fit and calibrate. See `FitRequest`.

    Raises:
        DataError: no good picture that can be read.
    """
    method_class = find_method(request.method)
    config = make_config(method_class, request.preset, request.settings)
    preset = method_class.presets[request.preset]
    # Half for the method, half for features that are kept for a second walk.
    run = Run(request.seed, request.device, request.memory_mib // 2, progress, say)
    good = gather_good(dataset, request.group, progress)
    name = request.backbone or (None if request.weights else preset.backbone)
    levels = _levels(method_class, config, name, request.weights)
    backbone = backbones.load_backbone(name, levels, weights=request.weights)
    frame = choose_frame(
        request.frame or cast(FrameMode, preset.frame),
        request.size or _nearest_multiple(preset.size, backbone.spec.side_step),
        [good.sizes[picture.key] for picture in good.pictures],
        backbone.spec.side_step,
        resample=request.resample,
        roi=request.roi,
        roi_mask=_read_roi(request.roi_mask),
    )
    traits = method_class.traits
    if frame.mode == "tile" and traits.fixed_grid:
        raise UsageError(
            f"Method '{request.method}' learns each position by itself and cannot take tiles.",
            "Use --frame auto, or --method patchcore.",
        )
    if frame.height != frame.width and traits.square_grid:
        raise UsageError(f"Method '{request.method}' needs a square.", "Use --frame square or pad.")

    def new_method() -> Method:
        method = method_class(backbone, config, levels)
        cast(torch.nn.Module, method).to(request.device).eval()
        return method

    fitter = Fitter(new_method, frame, run)
    needed = needed_pictures(min(5 * request.target_frr, 0.2))
    judged = fitter.fit(good.pictures, request.calibration, holdout=needed)
    method = judged.method
    if judged.energies is not None:
        method.settle(judged.energies)
    calibration = calibrate(
        judged.scores,
        target_frr=request.target_frr,
        mode=judged.mode,
        groups=judged.groups if good.column else None,
        folds=judged.folds,
        pixel_statistics=judged.pixel_statistics or None,
        strict=request.strict,
    )
    refused = good.refused + fitter.refusals
    card: dict[str, Json] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": request.preset,
        "seed": request.seed,
        "versions": _versions(),
        "data": {
            "source": dataset.root.name,
            "layout": dataset.layout,
            "pictures": judged.num_fit,
            "sha256": hashlib.sha256("".join(sorted(good.sizes)).encode()).hexdigest(),
            "group_column": good.column,
            "duplicates_left_out": good.num_duplicates,
            "refused": [asdict(refusal) for refusal in refused],
        },
        "picture_keys": [picture.key[:16] for picture in good.pictures],
        "fit": judged.record.facts,
        "warnings": [*judged.record.warnings],
        "promise": " ".join(calibration.sentences()),
    }
    return FittedParts(method, judged.fold_methods, frame, calibration, card)


def _levels(
    method_class: type[Method], config: BaseModel, name: str | None, weights: str | None
) -> tuple[str, ...]:
    """The levels that the method taps on the backbone that will be loaded."""
    explicit = Path(weights) if weights and weights != backbones.RANDOM else None
    known = backbones.name_by_hash(explicit) if explicit and name is None else None
    entry = backbones.find_entry(name or known or backbones.DEFAULT_BACKBONE)
    levels = method_class.choose_levels(entry.levels, config)
    return backbones.resolve_level_names(entry, levels)


def _read_roi(path: Path | None) -> RoiMask | None:
    return None if path is None else RoiMask.from_array(read_mask(path)[0])


def _nearest_multiple(size: int, step: int) -> int:
    return max(round(size / step), 1) * step


def _versions() -> dict[str, Json]:
    packages = ("torch", "timm", "numpy", "pillow")
    return {
        "fettle": version("fettle"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
