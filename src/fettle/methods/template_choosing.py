"""Which good pictures TFA-Net compares with, and whether they look like the others (section 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator
from torch import Tensor

from fettle.errors import ConfigError
from fettle.layers.feature_statistics import FeatureStatistics
from fettle.layers.template_choice import Oddness, by_centrality, medoids, oddness
from fettle.methods.template_bank import NewTemplate, TemplateBank
from fettle.protocols import UNUSUAL_TEMPLATE, FeatureStream, FitRecord, FramedPicture

FEWEST = 8  # good pictures, below which no template is called unusual

_ASPECT = 0.02  # by which a given template may differ
_MOST_SIZES = 64  # pictures whose sizes are looked at
_FAR, _FARTHEST = 3.0, 0.95  # robust deviations from the middle; share of the pictures that are nearer
_LOCALLY_FAR, _LOCAL_SHARE = 6.0, 0.01  # deviations at one place; share of the places
_UNALIGNED = 0.5  # share of the variance, more than a mean of aligned parts would leave


class TemplateConfig(BaseModel):
    """What a picture is compared with.

    Attributes:
        template: the "medoid" of the good pictures' pooled features, the "first" by its path, the "mean" of
            all, a "file"; and for ablations a picture of "noise", or "learned" tokens without a picture.
        template_file: for template "file"; the model keeps its name alone.
        template_normalised: whether the backbone sees it normalised like any picture; in the published code
            it does not.
        template_bank: "per_product" has templates for each product, where these are named; "one" for all.
        bank_size: templates each, by k-medoids; for template "medoid".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: Literal["medoid", "first", "mean", "file", "noise", "learned"] = "medoid"
    template_file: Path | None = None
    template_normalised: bool = True
    template_bank: Literal["per_product", "one"] = "per_product"
    bank_size: int = Field(default=1, ge=1, le=1024)

    @model_validator(mode="after")
    def _template_is_told(self) -> Self:
        if (self.template == "file") != (self.template_file is not None):
            raise ValueError("template 'file' and template_file go together: give both or none")
        if self.bank_size > 1 and self.template != "medoid":
            raise ValueError(f"bank_size {self.bank_size} is for template 'medoid': set bank_size=1")
        return self

    @field_serializer("template_file")
    def _name_alone(self, path: Path | None) -> str | None:
        return None if path is None else path.name


@dataclass(frozen=True)
class Gathered:
    """Good pictures in the order of their stream.

    Attributes:
        seen: statistics of their fused features. vectors: means over valid places, normalised, (n, C).
        aspects: least and largest width over height of the pictures themselves.
    """

    seen: FeatureStatistics
    vectors: Tensor
    keys: Sequence[str]
    paths: Sequence[str]
    products: Sequence[str]
    aspects: tuple[float, float]


class MakesTemplates(Protocol):
    """Gives a picture its features, unless it comes with some (1, C, h, w)."""

    def __call__(
        self, picture: FramedPicture, name: str, product: str, fused: Tensor | None = None
    ) -> NewTemplate: ...


def choose_templates(
    good: FeatureStream,
    gathered: Gathered,
    config: TemplateConfig,
    make: MakesTemplates,
    generator: torch.Generator,
    record: FitRecord,
) -> list[NewTemplate]:
    """The templates of a fit; none where they are learned tokens.

    Args:
        generator: of the noise that may be one. record: gets facts and warnings.
    """
    first = good.framed(gathered.paths[0])
    if config.template == "learned":
        return []
    if config.template == "noise":
        pixels = torch.rand(first.pixels.shape, generator=generator).to(first.pixels)
        return [make(first._replace(pixels=pixels, sha256=""), "noise", "")]
    if config.template == "mean":
        return [_mean_template(good, gathered, make, record)]
    if config.template_file is not None:
        name = config.template_file.name
        picture = good.framed(str(config.template_file))
        check_aspect(picture, name, gathered.aspects)
        return [make(picture, name, "")]
    chosen = []
    for product in sorted(set(gathered.products)) if config.template_bank == "per_product" else [""]:
        own = [i for i, p in enumerate(gathered.products) if config.template_bank == "one" or p == product]
        if config.template == "first":
            numbers = [min(own, key=lambda i: gathered.paths[i])]
        else:
            numbers = [own[i] for i in medoids(gathered.vectors[own], config.bank_size)]
        for path in (gathered.paths[i] for i in numbers):
            chosen.append(make(good.framed(path), Path(path).name, product))
    return chosen


def _mean_template(
    good: FeatureStream, gathered: Gathered, make: MakesTemplates, record: FitRecord
) -> NewTemplate:
    """The mean of all good pictures' features at each position; shown is that of their pixels."""
    seen, number = gathered.seen, len(gathered.paths)
    shown = good.framed(gathered.paths[0])
    parts = (good.framed(path).pixels.double() / number for path in gathered.paths)
    pixels = torch.zeros_like(shown.pixels, dtype=torch.float64)
    for part in parts:
        pixels += part
    mean = seen.sums / seen.counts.clamp_min(1)  # (C, h, w)
    tokens = max(seen.num_tokens, 1)
    middle = seen.sums.sum(dim=(1, 2)) / tokens
    total = (seen.squares / tokens - middle.square()).sum()
    kept = ((mean - middle[:, None, None]).square() * seen.counts).sum() / tokens
    left = 1 - float(kept / total.clamp_min(1e-24))
    record.facts["variance_left_by_mean"] = round(left, 4)
    if left > _UNALIGNED:
        record.warnings.append(
            f"{UNUSUAL_TEMPLATE}: the mean of {number} pictures leaves {left:.0%} of their features' "
            "variance: the parts are not aligned. Use --set template=medoid."
        )
    shown = shown._replace(pixels=pixels.to(shown.pixels), sha256="")
    return make(shown, f"mean of {number}", "", mean.to(gathered.vectors)[None])


def aspects_of(good: FeatureStream, paths: Sequence[str]) -> tuple[float, float]:
    """The least and the largest width over height of good pictures; of some, where there are many."""
    some = sorted(set(paths))
    sizes = [good.framed(path).size for path in some[:: -(-len(some) // _MOST_SIZES)]]
    aspects = [width / height for height, width in sizes]
    return min(aspects), max(aspects)


def check_aspect(picture: FramedPicture, name: str, usual: tuple[float, float]) -> None:
    """Refuse a picture that the frame would stretch otherwise than any good one: places then differ.

    Args:
        usual: least and largest width over height of the good pictures.
    """
    aspect, (least, largest) = picture.size[1] / picture.size[0], usual
    if not picture.keeps_aspect and not (1 - _ASPECT) * least <= aspect <= (1 + _ASPECT) * largest:
        known = f"{least:.2f}" if largest - least < 0.01 else f"{least:.2f} to {largest:.2f}"
        raise ConfigError(
            f"The template '{name}' is {aspect:.2f} wide for 1 high, the good pictures are {known}.",
            "Crop it to their shape, or fit with --frame pad.",
        )


class PlaceSpread:
    """How the tokens of some good pictures differ at each place; sums in double precision."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (C, H, W)
        self.squares: Tensor | None = None  # (H, W)
        self.counts: Tensor | None = None  # (H, W), valid ones

    def add(self, tokens: Tensor, valid: Tensor) -> None:
        """Take in tokens (B, C, H, W), valid (B, H, W)."""
        inside = tokens.double() * valid[:, None]
        parts = inside.sum(dim=0), inside.square().sum(dim=(0, 1)), valid.double().sum(dim=0)
        if self.sums is None or self.squares is None or self.counts is None:
            self.sums, self.squares, self.counts = parts
        else:
            self.sums, self.squares, self.counts = (
                self.sums + parts[0],
                self.squares + parts[1],
                self.counts + parts[2],
            )

    def deviations(self, token: Tensor, member: bool) -> Tensor:
        """Of one picture's tokens (C, H, W) from the mean at their place, in usual distances from it, (H, W).

        A member is compared with the others, since it would widen their spread itself. 0 where there are too
        few to tell.
        """
        assert self.sums is not None and self.squares is not None and self.counts is not None
        own = token.double()
        sums, squares, others = self.sums, self.squares, self.counts
        if member:
            sums, squares, others = sums - own, squares - own.square().sum(dim=0), others - 1
        others = others.clamp_min(1)
        mean = sums / others
        usual = (squares / others - mean.square().sum(dim=0)).clamp_min(1e-12)
        away = ((own - mean).square().sum(dim=0) / usual).sqrt()
        return away.where(others >= FEWEST - 1, 0.0)


def look_at_templates(
    bank: TemplateBank,
    tokens: Tensor,
    vectors: Tensor,
    spreads: Mapping[str, PlaceSpread],
    gathered: Gathered,
    record: FitRecord,
) -> None:
    """Warn of templates that are unlike the good pictures of their product (section 9, checks 1 and 2).

    Args:
        tokens: of the templates, (M, C, H, W). vectors: means over their valid places, (M, C).
        spreads: by product, "" for all good pictures.
    """
    known = bank.known()
    for number, label in enumerate(known):
        own = [i for i, p in enumerate(gathered.products) if label.product in ("", p)]
        if len(own) < FEWEST:
            record.facts["template_check"] = "not enough pictures"
            continue
        away = spreads[label.product].deviations(tokens[number], label.sha256 in gathered.keys)
        record.warnings += _odd_places(bank.label(number), away)
        if sum(other.product == label.product for other in known) == 1:
            found = oddness(gathered.vectors[own], vectors[number])
            if len(known) == 1:
                record.facts["template_z"] = round(found.z, 3)
                record.facts["template_rank"] = round(found.rank, 3)
            usual = [own[i] for i in by_centrality(gathered.vectors[own])[:3].tolist()]
            names = [Path(gathered.paths[i]).name for i in usual]
            record.warnings += _odd_as_a_whole(bank.label(number), found, names)


def _odd_places(label: str, away: Tensor) -> list[str]:
    places = away > _LOCALLY_FAR
    share = float(places.double().mean())
    if share <= _LOCAL_SHARE:
        return []
    row, column = divmod(int(away.argmax()), away.shape[1])
    return [
        f"{UNUSUAL_TEMPLATE}: {share:.1%} of {label} is unlike the good pictures at the same place, most of "
        f"all {row / away.shape[0]:.0%} from its top and {column / away.shape[1]:.0%} from its left. Look "
        "at it."
    ]


def _odd_as_a_whole(label: str, found: Oddness, usual: Sequence[str]) -> list[str]:
    if found.z <= _FAR and found.rank <= _FARTHEST:
        return []
    best = ", ".join(f"'{name}'" for name in usual)
    return [
        f"{UNUSUAL_TEMPLATE}: {label} is farther from the good pictures' middle than {found.rank:.0%} of "
        f"them. Use --set template=medoid; the most usual are {best}."
    ]
