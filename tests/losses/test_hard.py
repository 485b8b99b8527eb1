"""The hard-label loss against a plain cross-entropy in float64."""

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective

ROWS, VOCAB, WIDTH = 11, 35, 8


def make_inputs(dtype=torch.float64, rows=ROWS, head_rows=40, **of_head):
    """Hidden states and a head that want a gradient, and labels of which every fourth is masked."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, WIDTH), torch.randn(head_rows, WIDTH), torch.randn(head_rows)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    labels = torch.randint(0, VOCAB, (rows,))
    labels[::4] = -100
    return hidden, Head(weight, bias, **of_head), labels


def dense(hidden, head, labels, ce_weight=1.0, num_items=None):
    """The loss from dense float64 logits, their sum and entropy, and the gradients for hidden states, weight, bias."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logits = (leaves[0] @ leaves[1][:VOCAB].T + leaves[2][:VOCAB]) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss = ce_weight * ce / (num_items or len(labels))
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    return loss.item(), ce.item(), entropy.item(), torch.autograd.grad(loss, leaves)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("of_head", [{}, {"logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "scale and soft-cap"])
def test_value_and_gradients_equal_a_plain_cross_entropy(dtype, tolerance, of_head):
    """Chunks of 4 do not divide the 11 rows; the head has a bias and five rows of padding."""
    hidden, head, labels = make_inputs(dtype, **of_head)
    loss, ce, entropy, gradients = dense(hidden, head, labels, ce_weight=0.7, num_items=7)
    for chunk_size in (1, 4, 100):
        objective = Objective(ce_weight=0.7, num_items=7, vocab_size=VOCAB, chunk_size=chunk_size)
        result = hard_label_loss(hidden, head, labels, objective)
        found = torch.autograd.grad(result.loss, [hidden, head.weight, head.bias])
        assert [x.item() for x in result[:3]] == pytest.approx([loss, 0, ce], rel=min(tolerance, 1e-5))
        assert result.student_entropy.item() == pytest.approx(entropy, rel=1e-5)
        for mine, theirs in zip(found, gradients, strict=True):
            assert mine.dtype == dtype
            assert relative(mine, theirs) < tolerance
        assert (found[1][VOCAB:] == 0).all(), "padding rows got a gradient"
        assert (found[2][VOCAB:] == 0).all(), "padding rows got a gradient"


def test_a_frozen_head_gets_no_gradient():
    hidden, head, labels = make_inputs()
    frozen = head._replace(weight=head.weight.detach(), bias=head.bias.detach())
    result = hard_label_loss(hidden, frozen, labels, Objective(kd_weight=0.0, vocab_size=VOCAB))
    result.loss.backward()
    assert relative(hidden.grad, dense(hidden, head, labels)[3][0]) < 1e-11
    assert frozen.weight.grad is None


def test_there_is_no_teacher_to_agree_with():
    result = hard_label_loss(*make_inputs(), Objective(vocab_size=VOCAB))
    assert result.kd == result.agreement == result.num_paired == 0
    assert result.more == {}
    assert not any(value.requires_grad for value in result[1:6])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [4, 100])
def test_it_is_bit_identical_to_a_teacher_without_weight(dtype, chunk_size):
    hidden, head, labels = make_inputs(dtype, softcap=3.0)
    teacher = TeacherSignal(torch.randn(ROWS, 6).to(dtype), Head(torch.randn(VOCAB, 6).to(dtype)))
    objective = Objective(kd_weight=0.0, temperature=2.0, vocab_size=VOCAB, chunk_size=chunk_size)
    results = [hard_label_loss(hidden, head, labels, objective), teacher.loss(hidden, head, labels, objective)]
    for name in ("loss", "ce", "student_entropy"):
        assert torch.equal(*(getattr(result, name) for result in results))
    gradients = [torch.autograd.grad(result.loss, [hidden, head.weight, head.bias]) for result in results]
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_hard_label_gives_zero_loss_and_zero_gradients(rows):
    hidden, head, labels = make_inputs(rows=rows)
    result = hard_label_loss(hidden, head, torch.full_like(labels, -100), Objective(vocab_size=VOCAB))
    gradients = torch.autograd.grad(result.loss, [hidden, head.weight, head.bias])
    assert result.loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(4).long()}, "labels has 4 rows, student_hidden has 11"),
        ({"labels": torch.full((ROWS,), VOCAB)}, r"labels\[0\] is 35; -100 and 0 to 34 are possible"),
        ({"hidden": torch.zeros(ROWS, 9)}, "student_hidden has to be"),
        ({"objective": Objective(vocab_size=41)}, "vocab_size=41 does not fit student_head, which has 40 rows"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, message):
    hidden, head, labels = make_inputs()
    arguments = {"hidden": hidden, "head": head, "labels": labels, "objective": Objective(vocab_size=VOCAB), **change}
    with pytest.raises(ValueError, match=message):
        hard_label_loss(**arguments)
