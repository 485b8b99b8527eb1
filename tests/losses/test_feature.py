"""Distances of features against float64 formulas, row by row, and against known angles.

Shapes: N vectors, F numbers each.
"""

import math

import numpy as np
import pytest
import torch

from hf_distill.losses.feature import (
    FEATURE_LOSSES,
    HIDDEN_LOSSES,
    centered_cosine,
    effective_rank,
    effective_rank_of,
    mercator_loss,
    mse_loss,
    normalized_l1_loss,
)

NAMES = sorted(FEATURE_LOSSES)


def features(*shape, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def some_mask(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def cosine(s, t):
    return np.dot(s, t) / math.sqrt(np.dot(s, s) * np.dot(t, t))


def oracle(name, student, teacher, mask, *, direction_weight=1.0, magnitude_weight=0.01, num_items=None):
    """Loss and mean cosine, one vector at a time."""
    pairs = [
        (student[index].detach().double().numpy(), teacher[index].detach().double().numpy())
        for index in map(tuple, mask.nonzero().tolist())
    ]
    if name == "mercator":
        terms = [
            direction_weight * (1 - cosine(s, t))
            + magnitude_weight * math.log(math.sqrt(np.dot(s, s)) / math.sqrt(np.dot(t, t))) ** 2
            for s, t in pairs
        ]
    elif name == "mse":
        terms = [np.mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]) for s, t in pairs]
    else:
        terms = [np.mean(np.abs(s - t)) / np.std(t) for s, t in pairs]
    return sum(terms) / (num_items or len(pairs)), np.mean([cosine(s, t) for s, t in pairs])


def numeric_gradient(function, x, step=1e-5):
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        ends = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved.view(-1)[i] += sign * step
            ends.append(float(function(moved)))
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


# ------------------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_cosine_are_the_formula_on_the_positions_that_count(name, shape):
    for seed in range(4):
        student, teacher = features(*shape, 5, seed=seed), features(*shape, 5, seed=seed + 9, scale=3.0)
        mask = some_mask(*shape, seed=seed)
        mask.view(-1)[0] = True
        expected, mean = oracle(name, student, teacher, mask)
        loss, found = FEATURE_LOSSES[name](student, teacher, mask)
        assert loss.shape == found.shape == ()
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert found.item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", FEATURE_LOSSES | HIDDEN_LOSSES)
def test_without_a_mask_all_positions_count_to_the_last_bit(name):
    loss = (FEATURE_LOSSES | HIDDEN_LOSSES)[name]
    found, expected = [], []
    for values, mask in ((found, None), (expected, torch.ones(3, 4, dtype=torch.bool))):
        sides = [features(3, 4, 5, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1)]
        values += loss(*sides, mask)
        values[0].backward()
        values += [side.grad for side in sides]
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize(("direction", "magnitude"), [(1.0, 0.01), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_weights_of_direction_and_magnitude(direction, magnitude):
    student, teacher, mask = features(6, 4), features(6, 4, seed=1), some_mask(6)
    weights = {"direction_weight": direction, "magnitude_weight": magnitude}
    expected, _ = oracle("mercator", student, teacher, mask, **weights)
    assert mercator_loss(student, teacher, mask, **weights)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["mercator", "mse"])
def test_gradient_is_the_slope_of_the_formula(name, side):
    sides = {"student": features(2, 3, 4), "teacher": features(2, 3, 4, seed=1)}
    mask = torch.tensor([[True, False, True], [True, True, False]])

    def formula(moved):
        return oracle(name, **{**sides, side: moved}, mask=mask)[0]

    expected = numeric_gradient(formula, sides[side])
    sides[side].requires_grad_()
    FEATURE_LOSSES[name](**{f"{key}_kv": value for key, value in sides.items()}, mask=mask)[0].backward()
    torch.testing.assert_close(sides[side].grad, expected, rtol=1e-6, atol=1e-8)
    assert (sides[side].grad[~mask] == 0).all()


def test_gradient_of_normalized_l1_leaves_the_unit_alone():
    student, teacher = features(5, 4).requires_grad_(), features(5, 4, seed=1).requires_grad_()
    mask = torch.tensor([True, False, True, True, False])
    normalized_l1_loss(student, teacher, mask)[0].backward()
    unit = torch.tensor(np.std(teacher.detach().numpy(), axis=-1, keepdims=True))
    expected = (student - teacher).sign().detach() * mask[:, None] / (unit * 4 * 3)
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(teacher.grad, -expected, rtol=1e-12, atol=1e-15)


def test_mse_and_normalized_l1_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[3.0, -3.0], [3.0, -3.0]])
    mask = torch.tensor([True, True])
    # (4 + 25) / 2 and (4 + 64) / 2; the teacher's standard deviation is 3.
    assert mse_loss(student, teacher, mask)[0].item() == pytest.approx((14.5 + 34) / 2)
    assert normalized_l1_loss(student, teacher, mask)[0].item() == pytest.approx((7 / 6 + 10 / 6) / 2)


# ------------------------------------------------------------------------------------------------------ known angles


def test_direction_costs_0_for_a_multiple_1_for_an_orthogonal_and_2_for_the_opposite_vector():
    teacher = torch.tensor([[3.0, 4.0]])
    for student, expected in (([[300.0, 400.0]], 0), ([[-8.0, 6.0]], 1), ([[-0.3, -0.4]], 2)):
        loss, found = mercator_loss(torch.tensor(student), teacher, torch.tensor([True]), magnitude_weight=0.0)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert found.item() == pytest.approx(1 - expected, abs=1e-6)


def test_length_costs_the_squared_logarithm_of_the_ratio():
    teacher = features(4, 6)
    for factor in (100.0, 0.01, 1.0):
        loss, _ = mercator_loss(factor * teacher, teacher, torch.ones(4, dtype=torch.bool), magnitude_weight=0.5)
        assert loss.item() == pytest.approx(0.5 * math.log(factor) ** 2, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_equal_vectors_cost_nothing(name):
    student = features(5, 3).requires_grad_()
    loss, found = FEATURE_LOSSES[name](student, student.detach().clone(), torch.ones(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert found.item() == pytest.approx(1)
    assert student.grad.abs().max() < 1e-9


# ------------------------------------------------------------------------------------------------- mask, divisor, dtype


@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_leaves_out_changes_nothing(name):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    found = []
    for junk in (0.0, 1e30, math.nan, math.inf):
        student, teacher = features(2, 3, 4), features(2, 3, 4, seed=1)
        student[~mask], teacher[~mask] = junk, -junk
        student.requires_grad_()
        loss, mean = FEATURE_LOSSES[name](student, teacher, mask)
        loss.backward()
        found.append((loss, mean, student.grad))
    for loss, mean, gradient in found:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(mean, found[0][1])
        assert torch.equal(gradient, found[0][2])
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("num_items", [1, 7, 2.5, torch.tensor(7)])
@pytest.mark.parametrize("name", NAMES)
def test_num_items_is_the_divisor_of_the_loss_and_not_of_the_cosine(name, num_items):
    student, teacher, mask = features(9, 4), features(9, 4, seed=1), some_mask(9)
    expected, mean = oracle(name, student, teacher, mask, num_items=float(num_items))
    loss, found = FEATURE_LOSSES[name](student, teacher, mask, num_items=num_items)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert found.item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("num_items", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_no_position_costs_nothing(name, num_items):
    for shape in ((3, 4), (0, 4)):
        student = features(*shape).requires_grad_()
        mask = torch.zeros(shape[0], dtype=torch.bool)
        loss, found = FEATURE_LOSSES[name](student, features(*shape), mask, num_items=num_items)
        loss.backward()
        assert loss.item() == found.item() == 0
        assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_length_zero_have_finite_value_and_gradient(name, dtype):
    for zero in ("student", "teacher", "both"):
        sides = {key: features(4, 6, seed=i, dtype=dtype) for i, key in enumerate(("student", "teacher"))}
        for key in sides:
            if zero in (key, "both"):
                sides[key][1] = 0
            sides[key].requires_grad_()
        loss, found = FEATURE_LOSSES[name](sides["student"], sides["teacher"], torch.ones(4, dtype=torch.bool))
        loss.backward()
        assert loss.isfinite()
        assert found.isfinite()
        assert sides["student"].grad.isfinite().all()
        assert sides["teacher"].grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    student, teacher = (features(40, 16, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    mask = some_mask(40)
    expected, mean = oracle(name, student, teacher, mask)  # of the same rounded numbers
    loss, found = FEATURE_LOSSES[name](student.requires_grad_(), teacher, mask)
    loss.backward()
    assert loss.dtype == found.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.item() == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert student.grad.dtype == torch.bfloat16
    mixed, _ = FEATURE_LOSSES[name](student.detach(), teacher.float(), mask)
    assert mixed.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_cosine_is_detached_and_both_sides_may_have_a_gradient(name):
    student, teacher = features(4, 3).requires_grad_(), features(4, 3, seed=1).requires_grad_()
    loss, found = FEATURE_LOSSES[name](student, teacher, torch.ones(4, dtype=torch.bool))
    assert not found.requires_grad
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad.abs().sum() > 0
    frozen, _ = FEATURE_LOSSES[name](student, teacher.detach(), torch.ones(4, dtype=torch.bool))
    assert frozen.requires_grad


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2), (4,)), ((4, 3), (3, 3), (4,)), ((4, 3), (4, 3), (3,)),
                                    ((2, 2, 3), (2, 2, 3), (2,)), ((4, 3), (4, 3), (4, 3))])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused_in_words(name, shapes):
    student, teacher, mask = shapes
    with pytest.raises(ValueError, match="one shape"):
        FEATURE_LOSSES[name](torch.zeros(student), torch.zeros(teacher), torch.ones(mask, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------------- diagnostics


def test_centered_cosine_takes_the_common_mean_away():
    x, y = features(30, 5), features(30, 5, seed=1)
    expected = np.mean([cosine(a, b) for a, b in zip((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy(), strict=True)])
    assert centered_cosine(x, y).item() == pytest.approx(expected, rel=1e-12)
    # A large mean on both sides makes any two features look alike; not here.
    assert centered_cosine(x + 100, y + 100).item() == pytest.approx(expected, rel=1e-8)
    assert mercator_loss(x + 100, y + 100, torch.ones(30, dtype=torch.bool))[1] > 0.99
    assert centered_cosine(x + 7, x * 3 - 2).item() == pytest.approx(1)
    assert centered_cosine(x, -x).item() == pytest.approx(-1)
    assert centered_cosine(torch.ones(4, 3), torch.ones(4, 3)).isfinite()


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_of_equal_singular_values_is_their_number(rank):
    # Orthonormal columns, each with mean 0, turned into 8 dimensions.
    basis = np.linalg.qr(np.concatenate([np.ones((40, 1)), features(40, rank).numpy()], 1))[0][:, 1:]
    turned = np.linalg.qr(features(8, 8, seed=1).numpy())[0][:rank]
    found = effective_rank(torch.from_numpy(basis @ turned) * 3 + 5)
    assert found.item() == pytest.approx(rank, rel=1e-6)


def test_effective_rank_is_the_exponential_of_the_entropy():
    x = features(20, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.0])
    values = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    shares = [value / values.sum() for value in values if value > 1e-12]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(x).item() == pytest.approx(expected, rel=1e-9)
    assert effective_rank(torch.ones(5, 3)).isfinite()


def test_effective_rank_of_singular_values_is_each_rows_own_and_zero_without_any():
    values = torch.tensor([[3.0, 3.0, 0.0], [5.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    assert effective_rank_of(values).tolist() == pytest.approx([2, 1, 3, 0])
    assert effective_rank_of(values[0]).item() == pytest.approx(2)
