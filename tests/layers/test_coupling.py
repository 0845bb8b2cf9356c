"""The flow of coupling blocks: inverse, stretch of the volume, sizes, start; and the position code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fettle.layers.coupling import ConditionalCoupling, ConditionalFlow, Mixing, random_rotation
from fettle.layers.position_code import position_code

CPU = torch.device("cpu")
each_mixing = pytest.mark.parametrize("mixing", ["rotation", "permutation"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturbed_flow(channels: int, mixing: Mixing, *, condition: int = 8, blocks: int = 8) -> ConditionalFlow:
    """A flow far from its start, in double precision."""
    flow = ConditionalFlow(channels, condition, blocks, 2, mixing)
    flow.initialise(seeded())
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    return flow.double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@each_mixing
@pytest.mark.parametrize("channels", [6, 7])
@torch.no_grad()
def test_inverse_gives_back_what_came_in(channels: int, mixing: Mixing) -> None:
    flow = perturbed_flow(channels, mixing)
    x, condition = drawn(50, channels), drawn(50, 8, seed=2)
    z, _ = flow(x, condition)
    assert float((z - x).abs().max()) > 1  # it does something
    torch.testing.assert_close(flow.inverse(z, condition), x, rtol=0, atol=1e-6)


@each_mixing
@pytest.mark.parametrize("channels", [6, 7])
def test_stretch_is_the_jacobians_determinant(channels: int, mixing: Mixing) -> None:
    flow = perturbed_flow(channels, mixing)
    for x, condition in zip(drawn(3, channels), drawn(3, 8, seed=2), strict=True):

        def normal(x: Tensor, condition: Tensor = condition) -> Tensor:
            z: Tensor = flow(x[None], condition[None])[0][0]
            return z

        jacobian = torch.autograd.functional.jacobian(normal, x)  # type: ignore[no-untyped-call]  # torch
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(flow(x[None], condition[None])[1][0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_density_integrates_to_one() -> None:
    """Two channels, summed over a fine grid."""
    flow = ConditionalFlow(2, 4, 2, 2, "rotation")
    flow.initialise(seeded())
    for parameter in flow.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(parameter.numel()))
    flow.double()
    step = 0.05
    side = torch.arange(-20, 20, step, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    likelihood = flow.log_likelihood(x, drawn(1, 4).expand(len(x), -1))
    assert float((2 * likelihood).exp().sum() * step**2) == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_block_by_hand() -> None:
    """C = 3: two channels stay, the third becomes x exp(s) + t; then gain and offset, no mixing yet."""
    block = ConditionalCoupling(3, 1, 1, "permutation")
    first, last = block.net[0], block.net[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    assert first.weight.shape == (3, 3) and last.weight.shape == (2, 3)
    first.weight.copy_(torch.eye(3))
    first.bias.zero_()
    last.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 1]]))  # s from the first, t from second + condition
    last.bias.zero_()
    block.gain.copy_(torch.tensor([block.gain[0], block.gain[0], 0.0]))
    block.offset.copy_(torch.tensor([0.0, 0.0, 5.0]))
    z, stretch = block(torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[7.0]]))
    s, gain = 1.9 * math.tanh(0.1 * 2), 0.2 * math.log(2)
    assert z[0].tolist() == pytest.approx([2, 3, gain * (4 * math.exp(s) + 0.1 * (3 + 7)) + 5], rel=1e-6)
    assert float(stretch) == pytest.approx(s + math.log(gain), rel=1e-6)


@torch.no_grad()
def test_start_has_gain_one_and_a_small_networks_usual_weights() -> None:
    flow = ConditionalFlow(32, 32, 1, 2, "permutation")
    flow.initialise(seeded())
    (block,) = flow.blocks
    assert isinstance(block, ConditionalCoupling) and isinstance(block.net[0], nn.Linear)
    assert float(block.gain[0]) == pytest.approx(9.986478501101022, rel=1e-7)
    assert float(0.1 * nn.functional.softplus(block.gain, beta=0.5)[0]) == pytest.approx(1, rel=1e-6)
    assert not block.offset.any()
    largest = float(block.net[0].weight.abs().max())
    assert (
        0.99 / math.sqrt(48) < largest <= 1 / math.sqrt(48)
    )  # 16 channels that stay and 32 of the condition


def test_a_plain_normal_vector_at_the_middle_has_the_known_density() -> None:
    class Still(ConditionalFlow):
        def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            return x, x.new_zeros(len(x))

    likelihood = Still(6, 4, 1, 1, "permutation").log_likelihood(torch.zeros(2, 6), torch.zeros(2, 4))
    assert likelihood.tolist() == pytest.approx([-0.9189385332046727] * 2, rel=1e-7)


@pytest.mark.parametrize(
    ("channels", "number"), [(128, 989_184), (256, 2_107_392), (512, 5_523_456), (1024, 17_074_176)]
)
def test_published_sizes(channels: int, number: int) -> None:
    with torch.device("meta"):
        assert count(ConditionalFlow(channels, 128, 8, 2, "permutation")) == number


@each_mixing
def test_a_seed_repeats_weights_and_mixing(mixing: Mixing) -> None:
    flows = [ConditionalFlow(9, 8, 3, 1, mixing) for _ in range(3)]
    for flow, seed in zip(flows, (5, 5, 6), strict=True):
        flow.initialise(seeded(seed))
    first, same, other = (flow.state_dict() for flow in flows)
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    name = "order" if mixing == "permutation" else "rotation"
    assert not torch.equal(first[f"blocks.0.{name}"], other[f"blocks.0.{name}"])
    assert not torch.equal(first[f"blocks.0.{name}"], first[f"blocks.1.{name}"])


@pytest.mark.parametrize("size", [2, 5, 64])
def test_rotation_is_orthogonal_and_turns_nothing_inside_out(size: int) -> None:
    for seed in range(4):
        rotation = random_rotation(size, seeded(seed)).double()
        eye = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(rotation @ rotation.T, eye, rtol=0, atol=1e-6)
        assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-5)


def test_rotations_are_uniform() -> None:
    """Every entry of a uniform rotation has mean 0 and mean square 1 / n."""
    generator = seeded()
    many = torch.stack([random_rotation(3, generator) for _ in range(4000)])
    assert float(many.mean(dim=0).abs().max()) < 0.04
    assert float((many.square().mean(dim=0) - 1 / 3).abs().max()) < 0.03


# --- the position code


def test_code_of_known_places() -> None:
    code = position_code((64, 64), 128, CPU)
    expected = {
        (0, 1, 0): 0.841471,
        (0, 1, 1): 0.540302,
        (0, 1, 2): 0.681561,
        (1, 0, 64): 0.841471,
        (1, 0, 65): 0.540302,
        (5, 31, 62): 0.004134,
        (31, 7, 127): 0.999991,
    }
    for place, value in expected.items():
        assert float(code[place]) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(code.norm(dim=2), torch.full((64, 64), 8.0))


def test_code_depends_on_row_and_column_alone() -> None:
    whole = position_code((9, 7), 12, CPU)
    assert torch.equal(position_code((4, 5), 12, CPU), whole[:4, :5])
    assert torch.equal(whole[2, 3, :6], whole[8, 3, :6])  # x
    assert torch.equal(whole[2, 3, 6:], whole[2, 0, 6:])  # y
