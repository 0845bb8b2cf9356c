"""The neighbour mask's counts and refusals, and attention against torch's own and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fettle.errors import ConfigError
from fettle.layers.attention import MultiHeadAttention, neighbour_mask, sees_nobody, visible

CPU = torch.device("cpu")


def mask_of(height: int, width: int, high: int, wide: int) -> Tensor:
    return neighbour_mask((height, width), (high, wide), CPU)


@pytest.mark.parametrize(
    ("side", "window", "forbidden"), [(14, 7, 7396), (16, 7, 10_000), (16, 9, 15_376), (4, 3, 100)]
)
def test_number_of_forbidden_pairs(side: int, window: int, forbidden: int) -> None:
    assert int((~mask_of(side, side, window, window)).sum()) == forbidden


@pytest.mark.parametrize(
    ("side", "window", "corner", "inner"), [(14, 7, 16, 49), (16, 8, 25, 81), (16, 9, 25, 81), (4, 3, 4, 9)]
)
def test_forbidden_in_a_row_from_corner_to_middle(side: int, window: int, corner: int, inner: int) -> None:
    hidden = (~mask_of(side, side, window, window)).sum(dim=1)
    assert int(hidden.min()) == int(hidden[0]) == corner
    assert int(hidden.max()) == int(hidden[side * (side // 2) + side // 2]) == inner


def test_visible_tokens_of_a_small_grid() -> None:
    """4 x 4 with window 3: corner, edge and inner token."""
    seen = mask_of(4, 4, 3, 3).sum(dim=1)
    assert [int(seen[token]) for token in (0, 1, 5)] == [12, 10, 7]


def test_even_window_acts_as_the_next_odd_one() -> None:
    assert torch.equal(mask_of(16, 16, 8, 8), mask_of(16, 16, 9, 9))


@pytest.mark.parametrize(
    ("height", "width", "high", "wide"), [(8, 20, 7, 5), (20, 8, 5, 7), (3, 12, 7, 7), (9, 9, 4, 1)]
)
def test_mask_of_a_rectangle_equals_four_loops(height: int, width: int, high: int, wide: int) -> None:
    expected = torch.ones(height * width, height * width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            for other_y in range(height):
                for other_x in range(width):
                    if abs(y - other_y) <= high // 2 and abs(x - other_x) <= wide // 2:
                        expected[y * width + x, other_y * width + other_x] = False
    assert torch.equal(mask_of(height, width, high, wide), expected)


def test_mask_is_symmetric_and_hides_each_token_from_itself() -> None:
    mask = mask_of(10, 8, 7, 5)
    assert torch.equal(mask, mask.T)
    assert not mask.diagonal().any()


@pytest.mark.parametrize(
    ("height", "width", "window"), [(7, 7, 7), (5, 5, 5), (4, 4, 5), (6, 6, 7), (7, 3, 7)]
)
def test_window_that_hides_everything_is_refused(height: int, width: int, window: int) -> None:
    with pytest.raises(ConfigError, match=f"{height} x {width} tokens a window of {window} x {window}"):
        mask_of(height, width, window, window)


@pytest.mark.parametrize(("height", "width", "window"), [(8, 8, 7), (6, 6, 5), (4, 4, 3), (8, 3, 7)])
def test_window_that_leaves_everyone_something_is_accepted(height: int, width: int, window: int) -> None:
    assert bool(mask_of(height, width, window, window).any(dim=1).all())


@pytest.mark.parametrize("grid", [(7, 7), (6, 9), (4, 4), (2, 2), (1, 5)])
def test_refusal_names_the_largest_window_that_fits(grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError) as refused:
        neighbour_mask(grid, (99, 99), CPU)
    words = str(refused.value)
    largest = int(words.split("largest that fits is ")[1].split(" ")[0])
    assert bool(neighbour_mask(grid, (largest, largest), CPU).any(dim=1).all())
    with pytest.raises(ConfigError):
        neighbour_mask(grid, (largest + 2, largest + 2), CPU)


def test_grid_of_one_token_has_no_window() -> None:
    with pytest.raises(ConfigError, match="No window fits"):
        mask_of(1, 1, 1, 1)


def test_padding_is_never_looked_at() -> None:
    allowed = mask_of(4, 4, 3, 3)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    mask = visible(allowed, valid)
    assert mask.shape == (2, 1, 16, 16)
    assert torch.equal(mask[0, 0], allowed)
    assert not mask[1, 0, :, 12:].any()
    assert torch.equal(mask[1, 0, :, :12], allowed[:, :12])


def test_token_with_no_valid_token_left_looks_at_what_the_window_allows() -> None:
    allowed = mask_of(4, 4, 3, 3)
    valid = torch.zeros(1, 16, dtype=torch.bool)
    valid[0, :2] = True  # two neighbours, hidden from each other; token 2 sees the first
    assert sees_nobody(allowed, valid)[0, :3].tolist() == [True, True, False]
    mask = visible(allowed, valid)[0, 0]
    assert torch.equal(mask[:2], allowed[:2])
    assert mask[2].nonzero().flatten().tolist() == [0]


def weighted(width: int, heads: int) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).eval()
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    ours = MultiHeadAttention(width, heads, dropout=0.1).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 80, width, generator=generator) for _ in range(3)]


def test_attention_equals_that_of_torch() -> None:
    ours, theirs = weighted(64, 8)
    query, key, value = inputs(64)
    mask = mask_of(8, 10, 7, 5)
    additive = torch.zeros(80, 80).masked_fill(~mask, -math.inf)
    expected, _ = theirs(query, key, value, attn_mask=additive, need_weights=False)
    torch.testing.assert_close(ours(query, key, value, mask), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_equals_plain_loops() -> None:
    ours, _ = weighted(8, 2)
    query, key, value = (x[:1, :20].double() for x in inputs(8))
    ours = ours.double()
    mask = mask_of(4, 5, 3, 3)
    weight, bias = ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3)
    expected = torch.zeros(20, 8, dtype=torch.float64)
    for i in range(20):
        joined = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            q = weight[0][part] @ query[0, i] + bias[0][part]
            scores, values = [], []
            for j in range(20):
                if mask[i, j]:
                    k = weight[1][part] @ key[0, j] + bias[1][part]
                    scores.append(math.exp(float(q @ k) / math.sqrt(4)))
                    values.append(weight[2][part] @ value[0, j] + bias[2][part])
            joined.append(sum(s * v for s, v in zip(scores, values, strict=True)) / sum(scores))
        expected[i] = ours.out_proj.weight @ torch.cat(joined) + ours.out_proj.bias
    torch.testing.assert_close(ours(query, key, value, mask)[0], expected, rtol=0, atol=1e-10)


def test_dropout_acts_in_training_only() -> None:
    ours, _ = weighted(64, 8)
    query, key, value = inputs(64)
    mask = mask_of(8, 10, 7, 5)
    plain = ours(query, key, value, mask)
    assert torch.equal(ours(query, key, value, mask), plain)
    assert not torch.allclose(ours.train()(query, key, value, mask), plain)
