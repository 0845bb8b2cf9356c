"""The fields of F2PAD, its presets, and how lengths follow the framed side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fettle.errors import ConfigError, UsageError, first_failing, nearest_name

_SIDE = 256  # the framed side, px, at which lengths are given


class F2PADConfig(BaseModel):
    """Fields of F2PAD. One setting serves every method: energies, objective and steps are normalised.

    Lengths in px are those at a framed side of 256 px and scale with the smaller side / 256, areas with its
    square. Those of the gradient's sharing do not scale: the pattern that it evens out has the pitch of the
    backbone's stride.

    Attributes:
        form: unknown of the problem: "mask" moves the picture towards the reference fill by a share V in
            0..1 a pixel; "free" is any anomaly A, subtracted from the picture.
        kappa: hinge, in units of the settled patch energy; None: no hinge.
        floor: energy that counts as nothing left: "fill", what the reference fill leaves (good surface has
            some too, and with real features much), or "zero". Shares of energy are of what is above it.
        near: energies count in and around the regions only (16 px); False: in the whole window.
        start: share of the full replacement to start from: "zero", "half" (0.5) or "full" (1).
        fill: what the region would look like if good: "exemplar" from good pictures, "diffusion" from the
            picture itself, "mean" of the good pictures at the same place.
        refs: good pictures that a model keeps for the fill; 0: none, and the fill is diffusion.
        turn: exemplars are also turned and fitted between pixels; False: moved by whole pixels only.
        ring: width of the surroundings that an exemplar is matched by, px.
        lambda1: weight of the sparsity. lambda2: weight of the total variation (free form).
        sparsity: of the free form: "group" over the three channels of a pixel, "l1" per channel, "none".
        choice_lambda: weight of the area where the objective chooses between masks; None: lambda1. With less
            than the default, chosen on drawn defects, masks come out too large.
        iters: iterations at most; 0: none, the mask is the difference to the fill.
        eta, eta_free: largest step of the mask form (share), of the free form (intensity).
        step: "scalar" scales steps by one number a picture; "adam" the gradient's by one a pixel.
        momentum, scale_decay: of the gradient's running mean and of its running mean square.
        stop_gain: a picture stops when its objective fell by less than this in 6 iterations; 0: never.
        share: how neighbours share their gradients: "bilateral" does not cross the picture's edges; "gauss";
            "none".
        share_window, share_contrast: of "bilateral": side of its window, picture px, odd; standard
            deviation in colour.
        share_sigmas: of "gauss": one for each equal part of the run, picture px. Several, falling, are coarse
            to fine.
        roi: False takes everything valid as the region of interest.
        roi_low: energy above which a pixel may belong to a region. roi_rel: share of its component's peak
            that it must exceed besides. roi_dilate: widening, px.
        max_roi_share: largest share of the valid pixels that regions may take.
        crop_margin, crop_side: px around the region; least side of a crop, px.
        rim: width along a crop's sides where energies do not count, px.
        read_out: what is thresholded: "V", "a" = V ||D||, "guided" = a through a guided filter.
        levels: shares of tau, the difference that fills of good pictures have, at which it is cut; the
            objective chooses between several.
        guide_radius, guide_eps: of that filter, px; in squared intensity.
        snap: masks by colour models (GrabCut): "off", "always" where there is one, or "objective": where
            their objective is less. Without OpenCV, "objective" is as "off".
        judge: the objective may also choose the plain difference to the fill; False: the solver's mask alone.
        acceptance: False takes every region without a check.
        time_cap_s: wall time of the iterations a picture, s; 0: none are made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["mask", "free"] = "mask"
    kappa: float | None = Field(default=0.5, ge=0, le=2)
    floor: Literal["fill", "zero"] = "fill"
    near: bool = True
    start: Literal["zero", "half", "full"] = "full"
    fill: Literal["exemplar", "diffusion", "mean"] = "exemplar"
    refs: int = Field(default=32, ge=0, le=256)
    turn: bool = True
    ring: int = Field(default=12, ge=1, le=128)
    lambda1: float = Field(default=0.6, ge=0, le=100)
    lambda2: float = Field(default=0.0, ge=0, le=100)
    sparsity: Literal["group", "l1", "none"] = "group"
    choice_lambda: float | None = Field(default=2.0, ge=0, le=100)
    iters: int = Field(default=24, ge=0, le=500)
    eta: float = Field(default=0.3, gt=0, le=10)
    eta_free: float = Field(default=0.03, gt=0, le=10)
    step: Literal["scalar", "adam"] = "scalar"
    momentum: float = Field(default=0.7, ge=0, lt=1)
    scale_decay: float = Field(default=0.8, ge=0, lt=1)
    stop_gain: float = Field(default=0.002, ge=0, le=1)
    share: Literal["bilateral", "gauss", "none"] = "bilateral"
    share_window: int = Field(default=7, ge=3, le=31)
    share_contrast: float = Field(default=0.08, gt=0, le=10)
    share_sigmas: tuple[float, ...] = Field(default=(3.0, 1.5, 0.7), min_length=1, max_length=16)
    roi: bool = True
    roi_low: float = Field(default=1.0, gt=0, le=100)
    roi_rel: float = Field(default=0.15, ge=0, lt=1)
    roi_dilate: float = Field(default=8.0, ge=0, le=128)
    max_roi_share: float = Field(default=0.35, gt=0, le=1)
    crop_margin: int = Field(default=24, ge=0, le=256)
    crop_side: int = Field(default=96, ge=32, le=1024)
    rim: int = Field(default=16, ge=0, le=256)
    read_out: Literal["V", "a", "guided"] = "guided"
    levels: tuple[float, ...] = Field(default=(0.5, 0.25, 1.0), min_length=1, max_length=8)
    guide_radius: int = Field(default=4, ge=1, le=64)
    guide_eps: float = Field(default=1e-3, gt=0, le=1)
    snap: Literal["off", "always", "objective"] = "objective"
    judge: bool = True
    acceptance: bool = True
    time_cap_s: float = Field(default=10.0, ge=0, le=86_400)

    @model_validator(mode="after")
    def _goes_together(self) -> F2PADConfig:
        if self.form == "mask" and (self.sparsity != "group" or self.lambda2):
            raise ValueError("sparsity and lambda2 belong to form=free")
        if self.share_window % 2 == 0:
            raise ValueError("share_window must be odd")
        if not all(0 < level <= 10 for level in self.levels):
            raise ValueError("levels must lie above 0 and at most at 10")
        if not all(0 < sigma <= 64 for sigma in self.share_sigmas):
            raise ValueError("share_sigmas must lie above 0 and at most at 64")
        return self


OF_THE_SOLVER = frozenset(
    {
        *("form", "sparsity", "lambda2", "start", "iters", "stop_gain", "eta", "eta_free", "step"),
        *("momentum", "scale_decay", "share", "share_window", "share_contrast", "share_sigmas"),
    }
)
"""Fields without a meaning where no iteration is made."""

PRESETS: dict[str, F2PADConfig] = {
    "default": F2PADConfig(),
    "compact": F2PADConfig(iters=8, share_window=5, max_roi_share=0.25, refs=16, time_cap_s=3),
}
"""By name; "compact" is for two cores and framed pictures of 256 px."""


def make_f2pad_config(preset: str, settings: Mapping[str, object]) -> F2PADConfig:
    """A preset with single fields changed.

    Raises:
        UsageError: no such preset. ConfigError: no such field, or a value that it does not take.
    """
    if preset not in PRESETS:
        raise UsageError(f"F2PAD has no preset '{preset}'.", nearest_name(preset, PRESETS))
    for field in settings:
        if field not in F2PADConfig.model_fields:
            remedy = nearest_name(field, F2PADConfig.model_fields)
            raise ConfigError(f"F2PAD has no field '{field}'.", remedy)
    try:
        return F2PADConfig.model_validate({**PRESETS[preset].model_dump(), **settings})
    except ValidationError as error:
        place, given, why = first_failing(error)
        named = f"Field '{place}' of F2PAD cannot be {given!r}: {why}." if place else f"{why}."
        raise ConfigError(named, "Correct it; lists are written [1,2], and no value is null.") from error


class Lengths:
    """The lengths and areas of a configuration at one framed size.

    Args:
        height, width: of the framed picture, px.
    """

    def __init__(self, config: F2PADConfig, height: int, width: int) -> None:
        scale = min(height, width) / _SIDE
        self.dilate = config.roi_dilate * scale
        self.ring = max(round(config.ring * scale), 1)
        self.margin = round(config.crop_margin * scale)
        self.crop_side = round(config.crop_side * scale)
        self.rim = config.rim * scale
        self.guide_radius = max(round(config.guide_radius * scale), 1)
        self.around = 16 * scale  # of a component: the patches that its checks look at
        self.hole_area = 16 * scale**2  # smaller holes of a mask are filled
        self.speck_area = 9 * scale**2  # smaller components of a mask are dropped
