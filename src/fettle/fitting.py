"""From good pictures to the parts of a detector: frame, backbone, method, calibration, model card."""

from __future__ import annotations

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fettle.backbones import registry as backbones
from fettle.calibration import needed_pictures
from fettle.datasets.folder import folder_name
from fettle.datasets.products import product_notes
from fettle.datasets.records import Dataset
from fettle.errors import UsageError, first_failing, nearest_name
from fettle.gathering import gather_good
from fettle.images.decode import read_mask
from fettle.images.framing import Frame, FrameMode, Resample, RoiMask, choose_frame
from fettle.judged import Calibrations, calibrate_judged
from fettle.judging import CalibrationMode, Fitter
from fettle.methods.registry import find_method, make_config
from fettle.processes import check_device, process_device
from fettle.protocols import Json, Method, Progress, Run, Templated
from fettle.refine.references import MAX_REFERENCES
from fettle.refining import ForRefiners, learn_for_refiners, raw_scale
from fettle.templates import judge_templates
from fettle.training import TrainingConfig


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
        shots: learn from so many good pictures alone (of each product), chosen by content and seed, see
            `datasets.few_shot`; None: from all.
        memory_mib: bound on what the fit holds besides the network.
        multi_class: one model for many products, which the data set names; thresholds for each and shared.
        products: of these only; empty for all.
        cache_dir: folder in which features are kept, of trained methods for other trainings too; None:
            FETTLE_CACHE, else the user's cache folder. cache_mib: bound on it; 0 switches it off, so that
            features are computed each time they are needed.
        training_dir: folder in which a training keeps its state to be resumed; None: nowhere.
        log_dir: folder for a TensorBoard log.
        refine_refs: good pictures that the model keeps for refiners to fill defects from; 0: none.
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
    shots: int | None = Field(default=None, ge=1)
    memory_mib: int = Field(default=512, ge=32)
    device: str = "cpu"
    multi_class: bool = False
    products: tuple[str, ...] = ()
    cache_dir: Path | None = None
    cache_mib: int = Field(default=8192, ge=0)
    training_dir: Path | None = None
    log_dir: Path | None = None
    refine_refs: int = Field(default=32, ge=0, le=MAX_REFERENCES)

    def run(self, progress: Progress, say: Callable[[str], None]) -> Run:
        """The circumstances of the fit. Half the memory is the method's, half is for all around it."""
        return Run(
            seed=self.seed,
            device=process_device(self.device),
            memory_mib=self.memory_mib // 2,
            progress=progress,
            say=say,
            cache_dir=(self.cache_dir or default_cache_dir()) if self.cache_mib else None,
            cache_mib=self.cache_mib,
            training_dir=self.training_dir,
            log_dir=self.log_dir,
        )


def default_cache_dir() -> Path:
    """FETTLE_CACHE, else `fettle` in the user's cache folder."""
    chosen = os.environ.get("FETTLE_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else cache / "fettle" / "features"


def make_request(settings: Mapping[str, object]) -> FitRequest:
    """A request from keyword arguments.

    Raises:
        UsageError: an unknown name, a value that it does not take, products without multi_class, or a
            device that cannot be used.
    """
    known = FitRequest.model_fields
    for name in settings:
        if name not in known:
            raise UsageError(f"A fit has no setting '{name}'.", nearest_name(name, known))
    if settings.get("products") and not settings.get("multi_class"):
        raise UsageError("Products are chosen without multi-class.", "Add --multi-class.")
    try:
        request = FitRequest.model_validate(dict(settings))
    except ValidationError as error:
        place, given, why = first_failing(error)
        raise UsageError(f"The setting '{place}' cannot be {given!r}: {why}.", "Correct it.") from error
    check_device(request.device)
    return request


@dataclass(frozen=True)
class FittedParts:
    """What a detector is made of."""

    method: Method
    fold_methods: tuple[Method, ...]
    frame: Frame
    calibrations: Calibrations
    card: dict[str, Json]
    for_refiners: ForRefiners | None


def fit_parts(
    dataset: Dataset, request: FitRequest, progress: Progress, say: Callable[[str], None]
) -> FittedParts:
    """Fit and calibrate. See `FitRequest`.

    Raises:
        DataError: no good picture that can be read, or fewer than the shots asked for.
    """
    method_class = find_method(request.method)
    config = make_config(method_class, request.preset, _settings(request, method_class))
    preset = method_class.presets[request.preset]
    _check_request(request, method_class)
    if request.shots is not None:
        _check_few_shot(request, method_class, config)
    run = request.run(progress, say)
    good = gather_good(dataset, request.group, progress, by_product=request.multi_class)
    if request.shots is not None:
        good = good.few(request.shots, request.seed)
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
        cast(torch.nn.Module, method).to(run.device).eval()
        return method

    fitter = Fitter(new_method, frame, run)
    needed = needed_pictures(min(5 * request.target_frr, 0.2))
    judged = fitter.fit(
        good.pictures, request.calibration, holdout=needed, learn_all=request.shots is not None
    )
    method = judged.method
    known = [picture.key for picture in good.pictures]
    if isinstance(method, Templated):  # a template scores well against itself
        own = [template.sha256 for template in method.templates() if template.sha256]
        judged.leave_out(own)
        known += [key for key in own if key not in known]
    if judged.energies is not None:
        method.settle(judged.energies)
    product_of = {picture.key: picture.product for picture in good.pictures if request.multi_class}
    calibrations = calibrate_judged(
        judged,
        product_of,
        mode=judged.mode,
        target_frr=request.target_frr,
        grouped=good.column is not None,
        strict=request.strict,
        folds=judged.folds,
    )
    products = [product_of.get(key, "") for key in judged.keys]
    templates = judge_templates(method, judged.scores, products, run.device)
    for_refiners = learn_for_refiners(
        good.pictures,
        judged,
        calibrations,
        frame,
        num_references=request.refine_refs,
        generator=run.generator("refine/noise floor"),
        progress=progress,
        scale=raw_scale(judged),
    )
    refused = good.refused + fitter.refusals
    card: dict[str, Json] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": request.preset,
        "seed": request.seed,
        "versions": _versions(),
        "data": {
            "source": folder_name(dataset.root),
            "layout": dataset.layout,
            "pictures": judged.num_fit,
            "shots": request.shots,
            "sha256": hashlib.sha256("".join(sorted(good.sizes)).encode()).hexdigest(),
            "group_column": good.column,
            "duplicates_left_out": good.num_duplicates,
            **({"products": dict(Counter(product_of.values()))} if product_of else {}),
            "refused": [asdict(refusal) for refusal in refused],
        },
        "picture_keys": [key[:16] for key in known],
        "fit": judged.record.facts,
        **({"templates": templates.card} if isinstance(method, Templated) else {}),
        "warnings": [*judged.record.warnings, *templates.warnings, *_product_warnings(dataset, request)],
        "promise": " ".join(calibrations.shared.sentences()),
    }
    return FittedParts(method, judged.fold_methods, frame, calibrations, card, for_refiners)


def _check_request(request: FitRequest, method_class: type[Method]) -> None:
    """Refuse what does not go together."""
    if request.log_dir is not None and not method_class.traits.trained:
        raise UsageError(
            f"Method '{request.method}' is not trained, so it has nothing to log.", "Leave --log-dir out."
        )
    if not request.multi_class:
        return
    if not method_class.traits.multi_class:
        raise UsageError(
            f"Method '{request.method}' cannot hold many products in one model.",
            "'fettle methods' lists those that can; or fit a model for each product.",
        )
    if request.calibration == "cross":
        raise UsageError(
            "Cross calibration keeps a model a fold and is for one product.", "Use --calibration kfold."
        )


def _settings(request: FitRequest, method_class: type[Method]) -> dict[str, object]:
    """Fields to change in the preset: those that a few-shot fit changes, and the user's own, which win."""
    few_shot = getattr(method_class.Config, "few_shot", None)  # a configuration may have it
    if request.shots is None or few_shot is None:
        return request.settings
    return {**few_shot(request.preset), **request.settings}


def _check_few_shot(request: FitRequest, method_class: type[Method], config: BaseModel) -> None:
    """Refuse what would keep some of the few pictures from being learnt, or ask too much of them."""
    if request.calibration not in ("auto", "leave_one_out"):
        raise UsageError(
            f"Calibration '{request.calibration}' is not for a few-shot fit, which learns from each picture.",
            "Leave --calibration out; later, run 'fettle calibrate MODEL MORE_GOOD_PICTURES'.",
        )
    if isinstance(config, TrainingConfig) and config.early_stop:
        raise UsageError(
            "early_stop keeps pictures from being learnt, and a few-shot fit learns from each.",
            "Leave early_stop or --shots out.",
        )
    if request.strict and not method_class.traits.leave_one_out:
        raise UsageError(
            f"A few-shot fit of method '{request.method}' judges no good picture and promises nothing.",
            "Leave --strict or --shots out.",
        )


def _product_warnings(dataset: Dataset, request: FitRequest) -> list[str]:
    if request.multi_class:
        return product_notes(dataset)
    products = sorted({record.product for record in dataset.good_for_training()})
    if len(products) < 2:
        return []
    return [
        f"The pictures are of {len(products)} products ({', '.join(products[:5])}, ...), and one threshold "
        "is set for all. Use --multi-class for thresholds of each."
    ]


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
