"""TFA-Net on real pictures and real weights: its levels, and the template that it chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.backbones import load_backbone
from fettle.backbones.registry import found_offline
from fettle.datasets.open import open_dataset
from fettle.errors import WeightsError
from fettle.feature_stream import GoodFeatures, GoodPicture
from fettle.images.decode import file_sha256
from fettle.images.framing import Frame
from fettle.methods.tfanet import TFANet, TFANetConfig
from fettle.protocols import Run, no_progress

NUM = 16
FRAME = Frame(mode="stretch", height=256, width=256)
HEAD = {"width": 32, "depth": 1, "rebuild_width": 16, "rebuild_depth": 1}


def fabric(root: Path) -> list[GoodPicture]:
    paths = [record.path for record in open_dataset(root / "fabric").good_for_training()][:NUM]
    return [GoodPicture(path, key := file_sha256(path), key) for path in paths]


def method_on(name: str | None, config: TFANetConfig, levels: tuple[str, ...]) -> TFANet:
    return TFANet(load_backbone(name, levels), config, levels).eval()


def striped(side: int = 256) -> Tensor:
    """A picture without seams, (1, 3, side, side) in 0..1."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([(7 * y + 11 * x + 50 * c + x * y // 16) % 256 for c in range(3)])[None] / 255


def everywhere(views: Tensor) -> Tensor:
    return torch.ones(len(views), 1, *views.shape[-2:], dtype=torch.bool)


@torch.no_grad()
def test_the_first_level_is_what_the_resnets_own_pooling_gives(real_weights: Path) -> None:
    config = TFANetConfig.model_validate(
        {**HEAD, "taps": ("stride2", "stride4"), "grid_stride": 4, "align": "corners"}
    )
    method = method_on("resnet18", config, ("stride2", "stride4"))
    pooled: list[Tensor] = []
    net = cast(Any, method.backbone).net
    net.maxpool.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    fused = method.features(striped(), everywhere(striped()))["fused"]
    assert fused.shape == (1, 128, 64, 64)
    assert torch.equal(fused[:, :64], pooled[-1])  # before it came the probe of the folded network


@torch.no_grad()
def test_published_levels_of_a_wide_resnet(real_weights: Path) -> None:
    preset = TFANet.presets["paper"]
    name = str(preset.backbone)
    if found_offline(name) is None:
        pytest.skip(f"weights of {name} are not at hand")
    config = cast(TFANetConfig, preset.config).model_copy(update={**HEAD, "heads": 4, "rebuild_heads": 4})
    method = method_on(name, config, cast("tuple[str, ...]", config.taps))
    fused = method.features(striped(), everywhere(striped()))["fused"]
    assert fused.shape == (1, 1856, 64, 64)
    coarsest = method.backbone(striped(), ("stride16",))["stride16"]
    expected = F.interpolate(coarsest, (64, 64), mode="bilinear", align_corners=True)
    assert torch.equal(fused[:, -1024:], expected)


def test_the_template_of_fabric_is_one_of_its_pictures(real_data: Path) -> None:
    config = TFANetConfig.model_validate(HEAD)
    try:
        method = method_on(None, config, ("stride4", "stride8", "stride16"))
    except WeightsError:
        pytest.skip("weights of the default backbone are not at hand")
    good = fabric(real_data)
    stream = GoodFeatures(method, good, FRAME, device="cpu", progress=no_progress, what="learning")
    record = method.prepare(stream, Run())
    (template,) = method.templates()
    (chosen,) = [picture for picture in good if picture.path.name == template.name]
    assert template.sha256 == chosen.key
    framed = stream.framed(str(chosen.path))
    torch.testing.assert_close(template.pixels, framed.pixels[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert record.facts["grid"] == [32, 32] and record.facts["channels"] == 24 + 48 + 120
    assert cast(float, record.facts["template_rank"]) <= 0.95
    with torch.no_grad():
        found = method.eval()(framed.pixels, framed.valid)
    assert bool(found.anomaly_map.isfinite().all()) and float(found.score) > 0
