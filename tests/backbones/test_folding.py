"""Batch norm folded into convolutions: the same features, made anew whenever weights change."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fettle.backbones.folding import fold_batch_norm
from fettle.backbones.networks import ConvPyramid
from fettle.backbones.registry import load_backbone


class Block(nn.Module):
    """Two convolutions with a norm each; `swapped` runs the first norm after the second convolution."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.swapped = swapped
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6)
        for norm in (self.bn1, self.bn2):
            for values in (norm.weight, norm.running_var):
                assert values is not None
                values.data.uniform_(0.5, 2)
            assert norm.running_mean is not None
            norm.running_mean.uniform_(-1, 1)
            norm.bias.data.uniform_(-1, 1)
        self.eval()

    def forward(self, pictures: Tensor) -> list[Tensor]:
        first, second = (self.bn2, self.bn1) if self.swapped else (self.bn1, self.bn2)
        fine = first(self.conv1(pictures)).relu()
        return [fine, second(self.conv2(fine))]


def num_norms(net: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())


@torch.no_grad()
def test_features_stay_and_norms_go() -> None:
    net = Block()
    folded = fold_batch_norm(net, 16)
    assert num_norms(net) == 2 and num_norms(folded) == 0
    pictures = torch.rand(2, 3, 16, 16)
    for one, other in zip(net(pictures), folded(pictures), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_a_network_that_runs_its_parts_in_another_order_is_left_alone() -> None:
    net = Block(swapped=True)
    assert fold_batch_norm(net, 16) is net


def test_a_gradient_may_be_asked_after_a_first_pass_in_inference_mode() -> None:
    backbone = load_backbone("efficientnet_lite0", ["stride8"], weights="random")
    with torch.inference_mode():
        backbone(torch.rand(1, 3, 64, 64), ["stride8"])
    pictures = torch.rand(1, 3, 64, 64, requires_grad=True)
    backbone(pictures, ["stride8"])["stride8"].sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0


@torch.no_grad()
def test_backbone_runs_folded_and_keeps_its_own_weights() -> None:
    backbone = load_backbone("efficientnet_lite0", ["stride8"], weights="random")
    assert isinstance(backbone, ConvPyramid)
    names = set(backbone.state_dict())
    pictures = torch.rand(1, 3, 64, 64)
    before = backbone(pictures, ["stride8"])["stride8"]
    plain = backbone.net((pictures - backbone.mean) / backbone.std)[0]
    torch.testing.assert_close(before, plain, rtol=1e-3, atol=1e-4)
    assert set(backbone.state_dict()) == names and num_norms(backbone) > 0
    other = copy.deepcopy(backbone)
    changed = {name: 1.5 * value for name, value in backbone.state_dict().items()}
    other.load_state_dict(changed)
    assert not torch.allclose(other(pictures, ["stride8"])["stride8"], before)
    assert torch.equal(backbone(pictures, ["stride8"])["stride8"], before)
    doubled = backbone.double()
    assert doubled(pictures.double(), ["stride8"])["stride8"].dtype == torch.float64
