"""A tiny method that compares with a template, and says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.layers.energy_scale import EnergyScale
from fettle.methods import registry
from fettle.protocols import (
    Backbone,
    Explanation,
    FeatureStream,
    FitRecord,
    FramedPicture,
    Level,
    Maps,
    Preset,
    Run,
    Template,
    Traits,
)

STRIDE = 8
FIT: dict[str, object] = {"method": "comparing", "backbone": "tiny", "weights": "random", "size": 64}


class ComparingConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Comparing(nn.Module):
    """The map is the distance to the mean good picture, and a tenth of that to the nearest template: of each
    product the good picture with the smallest path."""

    name: ClassVar[str] = "comparing"
    Config: ClassVar[type[ComparingConfig]] = ComparingConfig
    traits: ClassVar[Traits] = Traits(
        trained=False,
        multi_class=True,
        few_shot=True,
        fixed_grid=False,
        square_grid=False,
        leave_one_out=False,
    )
    presets: ClassVar[dict[str, Preset]] = {"compact": Preset(ComparingConfig(), None, "auto", 64)}

    mean: Tensor
    pixels: Tensor
    valid: Tensor
    words: Tensor

    def __init__(self, backbone: Backbone, config: ComparingConfig, levels: Sequence[str]) -> None:
        super().__init__()
        self.backbone, self.config, self.levels = backbone, config, tuple(levels)
        self.register_buffer("mean", torch.zeros(0, 0, 0))
        self.register_buffer("pixels", torch.zeros(0, 3, 0, 0))
        self.register_buffer("valid", torch.zeros(0, 1, 0, 0, dtype=torch.bool))
        self.register_buffer("words", torch.zeros(0, dtype=torch.uint8))
        self.scale = EnergyScale()

    @staticmethod
    def choose_levels(offered: Sequence[Level], config: Any) -> tuple[str, ...]:
        return ("stride8",)

    def features(self, pictures: Tensor, valid: Tensor) -> dict[str, Tensor]:
        return {"pixels": pictures}

    @torch.no_grad()
    def prepare(self, good: FeatureStream, run: Run) -> FitRecord:
        first: dict[str, str] = {}
        total, number = torch.tensor(0.0), 0
        for batch in good:
            total = total + batch.features["pixels"].sum(dim=0)
            number += len(batch.paths)
            for path, product in zip(batch.paths, batch.products, strict=True):
                first[product] = min(first.get(product, path), path)
        self.mean = total / number
        found = {product: good.framed(path) for product, path in sorted(first.items())}
        self.pixels = torch.cat([picture.pixels for picture in found.values()])
        self.valid = torch.cat([picture.valid for picture in found.values()])
        self._say([[first[p].rsplit("/")[-1], own.sha256, p] for p, own in found.items()])
        return FitRecord(warnings=["Unusual template: said by the toy."])

    def _say(self, words: list[list[str]]) -> None:
        self.words = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)

    def _said(self) -> list[list[str]]:
        said: list[list[str]] = json.loads(bytes(self.words.tolist()))
        return said

    def settle(self, energies: Tensor) -> None:
        self.scale.settle(energies)

    def forward(self, pictures: Tensor, valid: Tensor) -> Maps:
        away = (pictures[:, None] - self.pixels[None]).abs().mean(dim=2)  # (B, M, H, W)
        distance, nearest = away.mean(dim=(2, 3)).min(dim=1)
        own = away[torch.arange(len(pictures)), nearest]
        anomaly_map = (pictures - self.mean).abs().mean(dim=1) + 0.1 * own
        remarks = torch.stack([nearest.float(), distance], dim=1)
        return Maps(anomaly_map * valid[:, 0], anomaly_map.mean(dim=(1, 2)), remarks)

    def patch_energy(self, pictures: Tensor, valid: Tensor) -> Tensor:
        energy: Tensor = self.scale(F.avg_pool2d(self(pictures, valid).anomaly_map, STRIDE))
        return energy

    def remark(self, numbers: Sequence[float]) -> tuple[str, ...]:
        return (f"compared with {self._said()[int(numbers[0])][0]}",)

    def explain(self, pictures: Tensor, valid: Tensor) -> Explanation:
        error = self(pictures, valid).anomaly_map
        return Explanation({"error": error}, {}, "A toy.", {"template": self.pixels[:1]})

    def templates(self) -> list[Template]:
        rows = zip(self._said(), self.pixels, self.valid, strict=True)
        return [Template(*words, pixels, valid) for words, pixels, valid in rows]

    def set_template(self, picture: FramedPicture, name: str, product: str = "") -> None:
        said = self._said()
        places = [i for i, (_, _, own) in enumerate(said) if product in ("", own)]
        if len(places) != 1:
            raise ConfigError(f"There are {len(places)} templates of '{product}'.", "Name another product.")
        said[places[0]] = [name, picture.sha256, said[places[0]][2]]
        self._say(said)
        self.pixels, self.valid = self.pixels.clone(), self.valid.clone()
        self.pixels[places[0]], self.valid[places[0]] = picture.pixels[0], picture.valid[0]


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `comparing` a method of this test."""
    monkeypatch.setitem(registry._HOME, "comparing", "templated_toys:Comparing")
