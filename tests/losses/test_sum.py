"""Weighted sums of signals, those with another tokenizer among them, against the losses of each of them."""

import pytest
import torch

from hf_distill.losses.cross_tokenizer import AlignedSignal
from hf_distill.losses.fused_linear import MixtureSignal, TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.losses.objective import DistillationLoss, Objective
from hf_distill.losses.sum import SumSignal
from tests.losses.test_cross_tokenizer import VOCABULARIES, Case

SUMS = ("loss", "kd", "ce", "agreement", "student_entropy", "num_paired")


@pytest.fixture
def case():
    return Case(VOCABULARIES["both have tokens without a name"], rows=3)


def aligned(case, method="aligned", num_exact=None):
    return AlignedSignal(case.teacher_hidden, case.teacher_head, case.spans, case.shared, method, num_exact)


def dense(case, width=5, weight=1.0):
    hidden, vocab = case.randn(len(case.labels), width), len(case.student_weight)
    return TeacherSignal(hidden, Head(case.randn(vocab, width)), weight)


def losses(case, signal, objective):
    leaves = case.leaves()
    result = signal.loss(leaves[0], Head(*leaves[1:]), case.labels, objective)
    return result, torch.autograd.grad(result.loss, leaves)


def assert_sum(case, members, found, objective):
    """`found` is what `losses` gives of the sum of members."""
    parts = [(weight, *losses(case, signal, objective)) for weight, signal in members]
    for name in SUMS:
        total = sum(weight * getattr(result, name) for weight, result, _ in parts)
        assert getattr(found[0], name).item() == pytest.approx(total.item(), rel=1e-12, abs=1e-12), name
    for i, gradient in enumerate(found[1]):
        total = sum(weight * gradients[i] for weight, _, gradients in parts)
        torch.testing.assert_close(gradient, total, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_every_number_is_the_weighted_sum_of_the_members(case, divergence):
    """One and several members of each kind; their hard labels count once, because the weights sum to 1."""
    signals = {
        "first": dense(case), "second": dense(case, 7), "aligned": aligned(case), "by rank": aligned(case, "uld"),
        "mixture": MixtureSignal([dense(case, 3, 0.25), dense(case, 4, 0.75)]),
    }  # fmt: skip
    objective = Objective(temperature=1.7, divergence=divergence, num_items=5, chunk_size=4)
    for weights in (
        {"first": 1.0},
        {"aligned": 1.0},
        {"first": 0.3, "second": 0.7},
        {"first": 0.3, "aligned": 0.7},
        {"by rank": 0.2, "first": 0.3, "mixture": 0.1, "aligned": 0.4},
    ):
        members = [(weight, signals[name]) for name, weight in weights.items()]
        found = losses(case, SumSignal(members), objective)
        assert_sum(case, members, found, objective)
        assert found[0].ce.item() == pytest.approx(losses(case, signals["first"], objective)[0].ce.item())


def test_a_sum_is_a_signal_like_any_other(case):
    objective = Objective(temperature=1.3, chunk_size=4)
    signals = [dense(case), aligned(case), dense(case, 7)]
    flat = SumSignal([(0.5, signals[0]), (0.2, signals[1]), (0.3, signals[2])])
    nested = SumSignal([(0.5, signals[0]), (0.5, SumSignal([(0.4, signals[1]), (0.6, signals[2])]))])
    (one, gradients), (other, others) = (losses(case, signal, objective) for signal in (flat, nested))
    for name in SUMS:
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), rel=1e-12)
    for mine, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_what_only_some_members_know_is_the_mean_over_these(case):
    first, second = aligned(case, num_exact=torch.tensor(4)), aligned(case, num_exact=torch.tensor(7))
    num_compared = (case.spans.student_groups >= 0).sum()
    result = SumSignal([(0.7, first), (0.2, dense(case)), (0.1, second)])
    more = result.loss(case.student_hidden, Head(case.student_weight), case.labels, Objective()).more
    assert more == {"alignment/exact_fraction": 5.5, "alignment/compared_fraction": num_compared}
    more = losses(case, SumSignal([(1.0, dense(case))]), Objective())[0].more
    assert more == {}


def test_a_member_without_weight_is_not_asked(case):
    class Silent:
        def loss(self, *arguments) -> DistillationLoss:
            raise AssertionError("asked")

    found = losses(case, SumSignal([(0.0, Silent()), (1.0, dense(case))]), Objective())
    assert found[0].loss.isfinite()
    with pytest.raises(ValueError, match="needs one with a weight"):
        losses(case, SumSignal([(0.0, Silent())]), Objective())


def test_token_weights_are_refused_where_groups_are_compared(case):
    objective = Objective(token_weights=torch.ones(len(case.labels)))
    with pytest.raises(ValueError, match="token_weights weigh positions"):
        losses(case, aligned(case), objective)
