import math

import pytest
import torch

from hf_distill.losses.divergence import DIVERGENCES, check_divergence, check_temperature
from tests.losses.oracle import ORACLE, alpha_beta, kl

NAMES = sorted(DIVERGENCES)


def log_probs(rows=6, vocab=11, seed=0, scale=1.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).log_softmax(-1).to(dtype)


def test_every_divergence_has_an_oracle():
    assert set(DIVERGENCES) == set(ORACLE)


@pytest.mark.parametrize("name", NAMES)
def test_value_equals_the_definition(name):
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    expected = ORACLE[name](teacher.exp(), student.exp())
    torch.testing.assert_close(DIVERGENCES[name](student, teacher), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_logit_gradient_equals_autograd_of_the_definition(name):
    logits, teacher = torch.randn(6, 11, dtype=torch.float64, requires_grad=True), log_probs(seed=2)
    (expected,) = torch.autograd.grad(ORACLE[name](teacher.exp(), logits.softmax(-1)).sum(), logits)
    (found,) = torch.autograd.grad(DIVERGENCES[name](logits.log_softmax(-1), teacher).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_is_zero_with_zero_gradient_for_equal_distributions(name):
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    value = DIVERGENCES[name](logits.log_softmax(-1), logits.detach().log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_is_never_negative_and_never_nan_in_low_precision(name, dtype):
    """Nearly equal, equal and far apart distributions; far apart means probabilities that underflow."""
    base = torch.randn(64, 257) * 4
    for noise in (0.0, 1e-3, 1.0, 60.0):
        student = (base + noise * torch.randn(64, 257)).log_softmax(-1).to(dtype).requires_grad_()
        teacher = base.log_softmax(-1).to(dtype)
        value = DIVERGENCES[name](student, teacher)
        assert value.dtype == torch.float32
        # Log-probabilities rounded to 8 bits no longer sum to 1, which is worth up to the rounding itself.
        assert value.min() >= -8 * torch.finfo(dtype).eps, (noise, value.min())
        value.sum().backward()
        assert student.grad.isfinite().all(), noise


@pytest.mark.parametrize("name", NAMES)
def test_ids_masked_to_minus_infinity_on_both_sides_change_nothing(name):
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    masked = torch.full((6, 3), -math.inf, dtype=torch.float64)
    padded_student = torch.cat([student, masked], -1).requires_grad_()
    value = DIVERGENCES[name](padded_student, torch.cat([teacher, masked], -1))
    torch.testing.assert_close(value, DIVERGENCES[name](student, teacher), rtol=1e-12, atol=1e-12)
    value.sum().backward()
    assert padded_student.grad.isfinite().all()


def test_kl_of_two_known_coins():
    student, teacher = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    assert DIVERGENCES["forward_kl"](student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert DIVERGENCES["reverse_kl"](student, teacher).item() == pytest.approx(reverse, rel=1e-6)
    assert DIVERGENCES["total_variation"](student, teacher).item() == pytest.approx(0.25)


def test_agrees_with_torch_kl_div_given_log_probabilities():
    """`F.kl_div` takes log-probabilities first; fed probabilities it returns something else without a word."""
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    expected = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(DIVERGENCES["forward_kl"](student, teacher), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_mixture_weighted_by_beta_on_the_teacher(beta):
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    p, q = teacher.exp(), student.exp()
    mixture = beta * p + (1 - beta) * q
    expected = beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    torch.testing.assert_close(DIVERGENCES["jensen_shannon"](student, teacher, beta=beta), expected)


def test_jensen_shannon_divided_by_beta_tends_to_forward_kl():
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    limit = DIVERGENCES["jensen_shannon"](student, teacher, beta=1e-7) / 1e-7
    torch.testing.assert_close(limit, DIVERGENCES["forward_kl"](student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["forward", "reverse"])
def test_skew_zero_is_the_plain_kl(side):
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    skewed = DIVERGENCES[f"skew_{side}_kl"](student, teacher, skew=0.0)
    torch.testing.assert_close(skewed, DIVERGENCES[f"{side}_kl"](student, teacher))


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 1.0), (2.0, -0.5), (-0.5, 1.2)])
def test_alpha_beta_equals_the_definition(alpha, beta):
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    found = DIVERGENCES["alpha_beta"](student, teacher, alpha=alpha, beta=beta)
    torch.testing.assert_close(found, alpha_beta(teacher.exp(), student.exp(), alpha, beta))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.4, 0.0), (0.0, 0.4), (0.7, -0.7), (0.0, 0.0)])
def test_alpha_beta_limits_continue_the_definition(alpha, beta):
    student, teacher = log_probs(seed=1).requires_grad_(), log_probs(seed=2)
    near = 1e-6
    expected = alpha_beta(teacher.exp(), student.exp(), alpha + near, beta + 2 * near)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    found = DIVERGENCES["alpha_beta"](student, teacher, alpha=alpha, beta=beta)
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-3, atol=1e-3)


def test_alpha_beta_holds_the_kl_divergences():
    student, teacher = log_probs(seed=1), log_probs(seed=2)
    for params, name in (((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")):
        found = DIVERGENCES["alpha_beta"](student, teacher, alpha=params[0], beta=params[1])
        torch.testing.assert_close(found, DIVERGENCES[name](student, teacher))


def test_adaptive_kl_is_forward_kl_where_only_the_head_differs():
    teacher = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    student = torch.tensor([0.3, 0.5, 0.1, 0.1], dtype=torch.float64)
    found = DIVERGENCES["adaptive_kl"](student.log(), teacher.log(), head=0.8 - 1e-9)
    torch.testing.assert_close(found, kl(teacher, student))


@pytest.mark.parametrize("divergence", ["jensen_shannon", "total_variation"])
def test_bounded_divergences_keep_their_bounds(divergence):
    student, teacher = log_probs(rows=200, scale=30, seed=3), log_probs(rows=200, scale=30, seed=4)
    bound = math.log(2) if divergence == "jensen_shannon" else 1.0
    assert DIVERGENCES[divergence](student, teacher).max() <= bound + 1e-12


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("kl", {}, "choose one of"),
        ("forward_kl", {"beta": 0.5}, "has no parameters"),
        ("jensen_shannon", {"gamma": 0.5}, "has only beta"),
        ("jensen_shannon", {"beta": 0.0}, "beta in \\(0, 1\\)"),
        ("jensen_shannon", {"beta": 1.0}, "beta in \\(0, 1\\)"),
        ("jensen_shannon", {"beta": "0.5"}, "has to be a number"),
        ("skew_forward_kl", {"skew": 1.0}, "skew in \\[0, 1\\)"),
        ("skew_reverse_kl", {"skew": -0.1}, "skew in \\[0, 1\\)"),
        ("adaptive_kl", {"head": 1.0}, "head in \\(0, 1\\)"),
        ("alpha_beta", {"alpha": math.inf}, "finite"),
    ],
)
def test_unknown_names_and_values_out_of_range_are_refused_in_words(name, params, message):
    with pytest.raises(ValueError, match=message):
        check_divergence(name, params)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", NAMES)
def test_float32_keeps_its_digits_at_any_temperature(name, temperature):
    """At 1000 both distributions are nearly uniform: a sum of first-order terms would leave nothing of the value."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 50) * 3
    logits = student.double().requires_grad_()
    expected = ORACLE[name]((teacher.double() / temperature).softmax(-1), (logits / temperature).softmax(-1))
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    leaf = student.clone().requires_grad_()
    found = DIVERGENCES[name]((leaf / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    (found_gradient,) = torch.autograd.grad(found.sum(), leaf)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-3, atol=0)
    # Where both are sure, at 0.1, gradients are differences of next to nothing.
    assert (found_gradient.double() - gradient).norm() < 2e-3 * gradient.norm() + 1e-5 * (temperature < 1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"taid"}))
def test_nearly_equal_distributions_have_a_nearly_right_divergence(name):
    """A student that has learned, in float32; the naive sum is off by as much as its value."""
    torch.manual_seed(0)
    teacher = torch.randn(6, 50) * 3
    student = teacher + 1e-3 * torch.randn(6, 50)
    expected = ORACLE[name](teacher.double().softmax(-1), student.double().softmax(-1))
    found = DIVERGENCES[name](student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=0)
    assert found.min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_far_below_any_number_are_no_zeros(dtype):
    """Logits of 100 and -100 at a temperature of 0.01: the divergence is 20,000 nats, not what stands for log(0)."""
    logits = torch.tensor([[100.0, -100.0]], dtype=dtype) / 0.01
    found = DIVERGENCES["forward_kl"](logits.flip(-1).log_softmax(-1), logits.log_softmax(-1))
    assert found.item() == pytest.approx(2e4, rel=1e-4)  # less the masses, which differ by 0


def test_adaptive_kl_weighs_gaps_that_lie_beside_a_probability_of_one():
    """Where both are sure of one token, its gap is that of all the others; in float32 it would be 0."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 20)
    student[:, 0] += 25
    teacher[:, 0] += 25
    logits = student.double().requires_grad_()
    probs, teacher_probs = logits.softmax(-1), teacher.double().softmax(-1)
    (expected,) = torch.autograd.grad(ORACLE["adaptive_kl"](teacher_probs, probs).sum(), logits)
    leaf = student.clone().requires_grad_()
    value = DIVERGENCES["adaptive_kl"](leaf.log_softmax(-1), teacher.log_softmax(-1)).sum()
    (found,) = torch.autograd.grad(value, leaf)
    assert (found.double() - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("alpha", "beta"), [(2.0, -0.5), (-0.5, 1.2), (0.7, -0.7), (0.3, -0.5), (2.0, -3.0), (-1.0, 0.0)]
)
def test_negative_powers_are_right_as_far_as_numbers_reach_and_finite_beyond(alpha, beta):
    torch.manual_seed(0)
    for scale in (0.1, 3.0, 200.0):
        student, teacher = torch.randn(2, 6, 11) * scale
        leaf = student.clone().requires_grad_()
        value = DIVERGENCES["alpha_beta"](leaf.log_softmax(-1), teacher.log_softmax(-1), alpha=alpha, beta=beta)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if scale < 200:
            wide = DIVERGENCES["alpha_beta"](
                student.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha=alpha, beta=beta
            )
            torch.testing.assert_close(value.detach().double(), wide, rtol=1e-3, atol=0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-30, 1e30, math.inf, math.nan])
def test_a_temperature_at_which_nothing_is_left_is_refused(temperature):
    with pytest.raises(ValueError, match="above 0 and finite"):
        check_temperature(temperature)
