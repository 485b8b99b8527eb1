"""Layer mappings against brute force, and centred kernel alignment against its definition by kernels.

Shapes: N tokens, F and G widths.
"""

import numpy as np
import pytest
import torch

from hf_distill.layer_mapping import cka_mapping, layer_mapping, linear_cka


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=0):
    return torch.linalg.qr(features(width, width, seed=seed))[0]


# --------------------------------------------------------------------------------------------------------- by position


def test_last_is_the_last_of_both():
    assert layer_mapping("last", 3, 7) == {2: {6: 1.0}}
    assert layer_mapping("last", 1, 1) == {0: {0: 1.0}}


@pytest.mark.parametrize(("student", "teacher"), [(24, 28), (2, 5), (3, 2), (1, 9), (9, 1), (6, 6), (12, 48), (2, 2)])
def test_uniform_keeps_the_share_of_the_depth_and_ends_on_the_last(student, teacher):
    mapping = layer_mapping("uniform", student, teacher)
    assert list(mapping) == list(range(student))
    assert mapping[student - 1] == {teacher - 1: 1.0}
    chosen = []
    for layer, weights in mapping.items():
        ((other, weight),) = weights.items()
        assert weight == 1.0
        assert 0 <= other < teacher
        # No teacher layer is at a share of the depth that is nearer.
        share = (layer + 1) / student
        nearest = min(abs((i + 1) / teacher - share) for i in range(teacher))
        assert abs((other + 1) / teacher - share) == pytest.approx(nearest, abs=1e-12)
        chosen.append(other)
    assert chosen == sorted(chosen)


def test_uniform_by_hand():
    assert layer_mapping("uniform", 2, 4) == {0: {1: 1.0}, 1: {3: 1.0}}
    assert layer_mapping("uniform", 3, 3) == {0: {0: 1.0}, 1: {1: 1.0}, 2: {2: 1.0}}
    assert layer_mapping("uniform", 4, 2) == {0: {0: 1.0}, 1: {0: 1.0}, 2: {1: 1.0}, 3: {1: 1.0}}


def test_pairs_negative_ones_from_the_end_and_several_teachers_share_the_weight():
    assert layer_mapping([[0, 1], [-1, -1]], 3, 5) == {0: {1: 1.0}, 2: {4: 1.0}}
    assert layer_mapping([(1, 0), (0, 3), (1, -2)], 2, 4) == {0: {3: 1.0}, 1: {0: 0.5, 2: 0.5}}
    assert layer_mapping([(0, 1), (0, -1)], 1, 2) == {0: {1: 1.0}}  # twice the same
    assert list(layer_mapping([(2, 0), (0, 0), (1, 0)], 3, 1)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(2, 0)], "the student has 2 layers, there is no layer 2"),
        ([(-3, 0)], "the student has 2 layers, there is no layer -3"),
        ([(0, 4)], "the teacher has 4 layers, there is no layer 4"),
        ([(0, -5)], "the teacher has 4 layers, there is no layer -5"),
        ([(0, 1, 2)], "pairs"),
        ("every", "one of uniform, last, cka"),
    ],
)
def test_layers_that_do_not_exist_are_refused_in_words(pairs, message):
    with pytest.raises(ValueError, match=message):
        layer_mapping(pairs, 2, 4)


# --------------------------------------------------------------------------------------------------------- by likeness


def hsic(x, y):
    """The Hilbert-Schmidt independence criterion of two linear kernels (Gretton et al., 2005), by brute force."""
    count = len(x)
    centring = np.eye(count) - np.ones((count, count)) / count
    return np.trace(x @ x.T @ centring @ y @ y.T @ centring) / (count - 1) ** 2


def test_linear_cka_is_the_ratio_of_kernels():
    for seed in range(3):
        x, y = features(12, 5, seed=seed) + 3, features(12, 7, seed=seed + 50)
        y[:, :3] += 2 * x[:, :3]
        left, right = x.numpy(), y.numpy()
        expected = hsic(left, right) / np.sqrt(hsic(left, left) * hsic(right, right))
        assert 0 < expected < 1
        assert linear_cka(x, y).item() == pytest.approx(expected, rel=1e-10)
        assert linear_cka(y, x).item() == pytest.approx(expected, rel=1e-10)


def test_linear_cka_is_1_for_a_rotation_at_any_scale_from_anywhere():
    x = features(40, 6)
    for scale in (1e-3, 1.0, -2.0, 1e3):
        assert linear_cka(x, scale * x @ rotation(6) + 5).item() == pytest.approx(1, abs=1e-9)
    wider = torch.cat([x, torch.zeros(40, 3)], 1) @ rotation(9)
    assert linear_cka(x, wider).item() == pytest.approx(1, abs=1e-9)


def test_linear_cka_does_not_change_with_rotations_and_scales_of_either_side():
    x, y = features(40, 6), features(40, 4, seed=1)
    y[:, 0] += x[:, 0]
    expected = linear_cka(x, y).item()
    assert 0.05 < expected < 0.9
    assert linear_cka(x @ rotation(6, seed=2) * 50 + 1, y @ rotation(4, seed=3) / 50).item() == pytest.approx(expected)
    # A linear map that is no rotation does change it.
    assert linear_cka(x * torch.tensor([9.0, 1, 1, 1, 1, 1]), y).item() != pytest.approx(expected, rel=0.05)


def test_linear_cka_of_small_features_is_that_of_large_ones():
    x = features(40, 6)
    y = x + features(40, 6, seed=1)
    assert linear_cka(1e-5 * x, 1e-5 * y).item() == pytest.approx(linear_cka(x, y).item(), rel=1e-6)


def test_linear_cka_takes_half_precision_and_constants():
    x = features(30, 4)
    assert linear_cka(x.bfloat16(), x.bfloat16()).item() == pytest.approx(1)
    assert linear_cka(torch.ones(5, 3), x[:5]).item() == 0


def test_independent_features_have_little_in_common():
    x, y = features(4000, 4), features(4000, 4, seed=1)
    assert 0 <= linear_cka(x, y).item() < 0.01


def test_cka_mapping_finds_planted_layers():
    teacher = [features(200, 8, seed=seed) for seed in range(6)]
    planted = [4, 0, 3]
    student = [
        2 * teacher[layer] @ rotation(8, seed=layer)[:, :6] + 0.1 * features(200, 6, seed=90 + layer)
        for layer in planted
    ]
    mapping = cka_mapping(student, teacher, top=1)
    assert {i: list(weights) for i, weights in mapping.items()} == {0: [4], 1: [0], 2: [3]}
    assert all(sum(weights.values()) == pytest.approx(1) for weights in mapping.values())


def test_cka_mapping_weighs_the_best_two_by_their_likeness():
    teacher = [features(100, 5, seed=seed) for seed in range(5)]
    student = [teacher[3] + 0.5 * teacher[1] + 0.01 * features(100, 5, seed=9), teacher[0] + teacher[4]]
    mapping = cka_mapping(student, teacher)
    assert [set(weights) for weights in mapping.values()] == [{1, 3}, {0, 4}]
    assert next(iter(mapping[0])) == 3  # the most like it comes first
    for layer, weights in mapping.items():
        assert sum(weights.values()) == pytest.approx(1)
        likeness = {i: linear_cka(student[layer], teacher[i]).item() for i in weights}
        for i, weight in weights.items():
            assert weight == pytest.approx(likeness[i] / sum(likeness.values()))


def test_cka_mapping_of_a_teacher_with_one_layer():
    assert cka_mapping([features(20, 3)] * 2, [features(20, 4, seed=1)]) == {0: {0: 1.0}, 1: {0: 1.0}}
