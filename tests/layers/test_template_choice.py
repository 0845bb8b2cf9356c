"""Which pictures are templates, how odd one is, and which of several is the nearest."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.layers.template_choice import by_centrality, mean_over, medoids, nearest, oddness, pooled


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(number: int, seed: int = 0, width: int = 8) -> Tensor:
    return F.normalize(torch.randn(number, width, generator=seeded(seed)), dim=1)


def at(*degrees: float) -> Tensor:
    """Unit vectors in a plane."""
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def around(*centres: float, each: int = 5) -> Tensor:
    """Groups of vectors, five degrees apart from each other; the middle one of each is its medoid."""
    return at(*(centre + 5 * (i - each // 2) for centre in centres for i in range(each)))


# --- pooling


def test_a_mean_is_over_valid_places_alone() -> None:
    features, valid = torch.rand(2, 3, 4, 4, generator=seeded()), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    found = mean_over(features, valid)
    torch.testing.assert_close(found[0], features[0, :, :2].mean(dim=(1, 2)))
    torch.testing.assert_close(found[1], features[1].mean(dim=(1, 2)))


def test_a_pooled_vector_has_unit_length() -> None:
    found = pooled(5 * torch.rand(2, 3, 4, 4, generator=seeded()) - 2, torch.ones(2, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_a_picture_without_valid_places_gives_numbers() -> None:
    assert not bool(pooled(torch.rand(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)).any())


# --- the medoid


def test_the_medoid_has_the_least_summed_distance() -> None:
    vectors = unit(50)
    sums = (1 - vectors.double() @ vectors.double().T).sum(dim=1)
    assert int(by_centrality(vectors)[0]) == int(sums.argmin())
    assert by_centrality(vectors).tolist() == sums.argsort().tolist()


@pytest.mark.parametrize("number", [1, 4])
def test_shuffling_leaves_the_medoids(number: int) -> None:
    vectors, order = unit(50), torch.randperm(50, generator=seeded(1))
    chosen = medoids(vectors, number)
    assert sorted(order[medoids(vectors[order], number)].tolist()) == chosen


def test_of_equal_pictures_the_first_is_the_medoid() -> None:
    vectors = at(0, 10, 10, 20)
    assert medoids(vectors, 1) == [1] and by_centrality(vectors)[:2].tolist() == [1, 2]


def test_a_medoid_is_never_the_odd_one() -> None:
    for odd in range(21):
        vectors = F.normalize(torch.ones(21, 8) + 0.05 * unit(21, seed=odd), dim=1)
        vectors[odd] = F.normalize(-torch.arange(8.0), dim=0)
        assert medoids(vectors, 1) != [odd]


def test_each_group_gets_its_own_medoid() -> None:
    assert medoids(around(0, 90, 200), 3) == [2, 7, 12]


def test_medoids_move_from_the_farthest_to_the_middle_of_their_group() -> None:
    vectors = around(0, 60, each=5)
    farthest = int((vectors @ vectors[medoids(vectors, 1)[0]]).argmin())
    assert farthest in (0, 9) and medoids(vectors, 2) == [2, 7]


def test_no_more_medoids_than_different_pictures() -> None:
    assert medoids(at(0, 90), 5) == [0, 1]
    assert medoids(at(30, 30, 30), 2) == [0]


# --- oddness


def test_oddness_is_a_robust_deviation_and_a_rank() -> None:
    vectors = unit(30) + 2
    vectors = F.normalize(vectors, dim=1)
    centre = F.normalize(vectors.sum(dim=0), dim=0)
    distances = 1 - vectors.double() @ centre.double()
    middle = distances.median()
    spread = 1.4826 * (distances - middle).abs().median()
    found = oddness(vectors, vectors[7])
    assert found.z == pytest.approx(float((distances[7] - middle) / spread), rel=1e-4)
    assert found.rank == pytest.approx(float((distances < distances[7]).double().mean()), abs=0.034)


def test_one_far_picture_stands_out_and_the_medoid_does_not() -> None:
    vectors = torch.cat([at(*torch.linspace(-5, 5, 20).tolist()), at(80)])
    odd, usual = oddness(vectors, vectors[20]), oddness(vectors, vectors[medoids(vectors, 1)[0]])
    assert odd.z > 3 and odd.rank > 0.95
    assert usual.z < 0 and usual.rank == 0


def test_a_picture_that_is_none_of_the_good_ones_can_be_odd() -> None:
    found = oddness(at(*range(-10, 11)), at(120)[0])
    assert found.z > 3 and found.rank == 1


# --- the nearest template


def test_the_nearest_and_its_lead_over_the_next() -> None:
    chosen, margin = nearest(at(10, 85), at(0, 90, 60))
    assert chosen.tolist() == [0, 1]
    cosine = [math.cos(math.radians(d)) for d in (10, 50, 5, 25)]
    assert margin.tolist() == pytest.approx([cosine[0] - cosine[1], cosine[2] - cosine[3]], abs=1e-6)


def test_of_equal_templates_the_lowest_number_wins_by_nothing() -> None:
    chosen, margin = nearest(at(20, 130), at(90, 20, 20))
    assert chosen.tolist() == [1, 0] and float(margin[0]) == 0


def test_a_template_alone_is_the_nearest_by_any_margin() -> None:
    chosen, margin = nearest(unit(3), unit(1, seed=4))
    assert chosen.tolist() == [0, 0, 0] and bool(margin.isinf().all())


def test_the_order_of_templates_changes_their_numbers_alone() -> None:
    vectors, templates, order = unit(20), unit(6, seed=1), torch.tensor([3, 1, 5, 0, 2, 4])
    straight, moved = nearest(vectors, templates), nearest(vectors, templates[order])
    assert torch.equal(order[moved[0]], straight[0])
    torch.testing.assert_close(moved[1], straight[1])


def test_only_allowed_templates_are_chosen_and_counted() -> None:
    allowed = torch.tensor([[False, True, True], [True, False, False]])
    chosen, margin = nearest(at(0, 60), at(0, 60, 90), allowed)
    assert chosen.tolist() == [1, 0]
    assert float(margin[0]) == pytest.approx(0.5, abs=1e-6) and math.isinf(float(margin[1]))


def test_where_none_is_allowed_all_are() -> None:
    allowed = torch.zeros(1, 2, dtype=torch.bool)
    assert nearest(at(80), at(0, 90), allowed)[0].tolist() == [1]
