"""The loop and what a signal brings to it: a step written here, matrix products, compilations.

Shapes: N positions, V vocabulary, K ids of a sparse target.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill.losses import loop
from hf_distill.losses.divergence import DIVERGENCE_TERMS
from hf_distill.losses.fused_linear import MixtureSignal, TeacherSignal
from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head, even_chunks
from hf_distill.losses.loop import ChunkedSignal, StepResult, agreeing, chunked_loss
from hf_distill.losses.objective import Objective
from hf_distill.losses.sum import SumSignal

ROWS, VOCAB, WIDTH, K = 11, 35, 8, 4


class Sparse(NamedTuple):
    """A target of K ids and weights; its divergence is the cross-entropy. Signal and step are one class."""

    ids: Tensor  # (N, K)
    weights: Tensor  # (N, K)

    num_buffers = num_paired = 0
    more = {}

    def loss(self, hidden, head, labels, objective):
        return chunked_loss(hidden, head, labels, objective, [(1.0, self)])

    def step(self, num_rows, vocab_size, device, objective):
        return self

    def inputs_(self, chunk, buffers, constants):
        return self.ids[chunk], self.weights[chunk]

    def differentiate_(self, student, inputs, token_weights, constants):
        ids, weights = inputs
        kd = -(weights * student.log_probs.gather(-1, ids)).sum(-1)
        scale = (token_weights * (constants.kd_factor / constants.temperature)).unsqueeze(-1)
        gradient = student.probs * (scale * weights.sum(-1, keepdim=True))
        gradient.scatter_add_(-1, ids, -scale * weights)
        return StepResult(gradient, (kd * token_weights).sum(), None)


def make_student(dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(40, WIDTH), torch.randn(40)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[::4] = -100
    return hidden, Head(weight, bias, 0.5, 4.0), labels


def make_sparse(dtype=torch.float64):
    torch.manual_seed(2)
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(ROWS)])
    return Sparse(ids, torch.rand(ROWS, K).to(dtype))


def make_teacher(dtype=torch.float64, weight=1.0, width=6):
    torch.manual_seed(width)
    return TeacherSignal(torch.randn(ROWS, width).to(dtype), Head(torch.randn(VOCAB, width).to(dtype)), weight)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_a_signal_of_one_small_class_equals_autograd(chunk_size, temperature):
    hidden, head, labels = make_student()
    signal, weights = make_sparse(), torch.linspace(0.1, 2, ROWS).double()
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logits = 4 * torch.tanh(0.5 * (leaves[0] @ leaves[1][:VOCAB].T + leaves[2][:VOCAB]) / 4)
    kd = -(signal.weights * (logits / temperature).log_softmax(-1).gather(-1, signal.ids)).sum(-1)
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss = (0.3 * temperature**2 * (kd * weights).sum() + 0.6 * ce) / 7
    expected = torch.autograd.grad(loss, leaves)

    objective = Objective(
        kd_weight=0.3, ce_weight=0.6, temperature=temperature, token_weights=weights, num_items=torch.tensor(7),
        vocab_size=VOCAB, chunk_size=chunk_size,
    )  # fmt: skip
    result = signal.loss(hidden, head, labels, objective)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert result.kd.item() == pytest.approx((kd * weights).sum().item(), rel=1e-12)
    assert result.num_paired == 0  # it does not know the teacher's most likely token
    for mine, theirs in zip(torch.autograd.grad(result.loss, [hidden, head.weight, head.bias]), expected, strict=True):
        assert relative(mine, theirs) < 1e-11


def test_a_sum_of_different_signals_shares_the_students_products_and_is_the_sum():
    hidden, head, labels = make_student()
    signals = [(0.5, make_sparse()), (0.3, make_teacher()), (0.2, make_teacher(width=5))]
    objective = Objective(vocab_size=VOCAB, chunk_size=4, temperature=2.0)
    with CountProducts() as products:
        result = SumSignal(signals).loss(hidden, head, labels, objective)
        found = torch.autograd.grad(result.loss, [hidden, head.weight, head.bias])
    assert products.count == 3 * (3 + 2)  # three chunks
    parts = [(weight, signal.loss(hidden, head, labels, objective)) for weight, signal in signals]
    for name in ("loss", "kd", "ce", "student_entropy", "agreement", "num_paired"):
        total = sum(weight * getattr(part, name) for weight, part in parts)
        assert getattr(result, name).item() == pytest.approx(total.item(), rel=1e-12)
    assert result.num_paired.item() == pytest.approx(0.5 * ROWS)
    total = sum(weight * part.loss for weight, part in parts)
    for mine, theirs in zip(found, torch.autograd.grad(total, [hidden, head.weight, head.bias]), strict=True):
        assert relative(mine, theirs) < 1e-12


class Counting(NamedTuple):
    """A teacher that knows what is most likely at some positions only, and one number of its own. Signal and step."""

    sparse: Sparse
    num_paired: Tensor
    more: dict[str, Tensor]

    loss = Sparse.loss
    num_buffers = 0
    inputs_ = property(lambda self: self.sparse.inputs_)
    differentiate_ = property(lambda self: self.sparse.differentiate_)

    def step(self, *arguments):
        return self


def test_a_step_says_where_it_knows_the_likeliest_token_and_what_else_is_logged():
    hidden, head, labels = make_student()
    objective = Objective(vocab_size=VOCAB, chunk_size=4)
    counting = Counting(make_sparse(), torch.tensor(3), {"own/number": torch.tensor(7.0)})
    result = counting.loss(hidden, head, labels, objective)
    assert result.num_paired == 3
    assert result.more == {"own/number": 7}

    other = counting._replace(more={"own/number": torch.tensor(8.0), "another": torch.tensor(1)})
    members = [(0.5, counting), (0.2, make_teacher()), (0.3, other)]
    result = SumSignal(members).loss(hidden, head, labels, objective)
    assert result.num_paired.item() == pytest.approx(0.8 * 3 + 0.2 * ROWS)
    assert result.more == {"own/number": 7.5, "another": 1}  # means over those that know it


# ------------------------------------------------------------------------------------------------------- the products


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


def dense(*weights):
    return [make_teacher(torch.float32, weight, width) for width, weight in enumerate(weights, 5)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize(
    ("signal", "of_teachers"),
    [
        (None, 0),
        (make_sparse(torch.float32), 0),
        (make_teacher(torch.float32), 1),
        (MixtureSignal(dense(0.5, 0.3, 0.2)), 3),
        (SumSignal([(0.5, teacher) for teacher in dense(1.0, 1.0)]), 2),
        (SumSignal([(0.5, make_sparse(torch.float32)), (0.5, MixtureSignal(dense(0.5, 0.5)))]), 2),
        (SumSignal([(1.0, make_teacher(torch.float32)), (0.0, make_teacher(torch.float32))]), 1),
    ],
    ids=["hard labels", "sparse", "one teacher", "mixture of 3", "sum of 2", "sparse and mixture", "no weight"],
)
def test_the_student_has_three_products_whatever_the_number_of_signals(signal, of_teachers, frozen):
    hidden, head, labels = make_student(torch.float32)
    head = head._replace(weight=head.weight.detach().requires_grad_(not frozen), bias=None)
    loss = hard_label_loss if signal is None else signal.loss
    with CountProducts() as products:
        loss(hidden, head, labels, Objective(vocab_size=VOCAB)).loss.backward()
    assert products.count == (2 if frozen else 3) + of_teachers


# --------------------------------------------------------------------------------------------------- the compilations


@pytest.mark.parametrize("make", [make_sparse, make_teacher, None], ids=["sparse", "dense", "hard labels"])
def test_a_step_is_compiled_anew_for_other_numbers_only(make):
    """Once for the first number of rows, once for any number; not for each batch, whose tensors are others."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(loop._differentiate_, backend=counter, fullgraph=True)
    for length in (11, 9, 7, 5, 3):
        hidden, head, labels = make_student(torch.float32)
        student = head.truncated(VOCAB).with_product_dtype(hidden)
        step, inputs = None, ()
        constants = loop.Constants(DIVERGENCE_TERMS["reverse_kl"], {}, 0.5, 0.5, 2.0)
        if make is not None:
            signal = make(torch.float32)
            signal = signal._replace(**{signal._fields[0]: signal[0][:length]})
            step = signal.step(length, VOCAB, torch.device("cpu"), Objective())
            inputs = step.inputs_(slice(0, length), [torch.empty(length, VOCAB)], constants)
            inputs = [x[:length] for x in inputs]
        with torch.no_grad():
            rows = torch.randn(length, VOCAB), labels[:length], torch.ones(length)
            compiled(*rows, *inputs, student=student, step=step, constants=constants)
    assert 1 <= counter.frame_count <= 2


def test_each_setting_has_a_graph_however_many_there_are_and_wherever_rows_begin(monkeypatch):
    """By default, 8 are allowed, numbers that change become symbols, and views into tensors are one more."""
    counter = CompileCounter()
    torch._dynamo.reset()
    loop._compiled_differentiate_.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    hidden, head, labels = make_student(torch.float32)
    head = head.truncated(VOCAB)
    settings = [("forward_kl", {}, 1.0), ("forward_kl", {}, 2.0), ("reverse_kl", {}, 1.0)]
    settings += [("taid", {"t": t}, 1.0) for t in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)]
    for number, (divergence, params, temperature) in enumerate(settings, start=1):
        constants = loop.Constants(DIVERGENCE_TERMS[divergence], params, 0.5, 0.5, temperature)
        step = make_teacher(torch.float32).step(len(hidden), VOCAB, torch.device("cpu"), Objective())
        for chunk in (slice(0, 8), slice(3, 9), slice(0, 5), slice(1, 5), slice(9, 11)):
            found = []
            for function in (loop._compiled_differentiate_(), loop._differentiate_):
                torch.manual_seed(0)
                size = chunk.stop - chunk.start
                inputs = step.inputs_(chunk, [torch.empty(size, VOCAB)], constants)
                rows = logits, _, _ = torch.randn(size, VOCAB), labels[chunk], torch.ones(len(hidden))[chunk]
                with torch.no_grad():
                    found.append((function(*rows, *inputs, student=head, step=step, constants=constants), logits))
            torch.testing.assert_close(*found)
        assert counter.frame_count == number + 1  # one for the first number of rows, then one for any
    loop._compiled_differentiate_.cache_clear()


def test_signals_of_the_loop_are_known_by_their_step():
    assert isinstance(make_teacher(), ChunkedSignal)
    assert isinstance(MixtureSignal([make_teacher()]), ChunkedSignal)
    assert not isinstance(SumSignal([]), ChunkedSignal)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_sparse, make_teacher, None], ids=["sparse", "dense", "hard labels"])
def test_cuda_equals_the_cpu_whatever_device_the_tensors_come_on(make):
    hidden, head, labels = make_student(torch.float32)
    objective = Objective(temperature=2.0, vocab_size=VOCAB, chunk_size=4, num_items=torch.tensor(7))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (head.weight, head.bias)]
        on_device = head._replace(weight=leaves[0], bias=leaves[1])
        signal = make and make(torch.float32)
        if isinstance(signal, Sparse):
            signal = Sparse(*(x.to(device) for x in signal))
        loss = hard_label_loss if signal is None else signal.loss
        result = loss(hidden, on_device, labels, objective)
        results.append([x.cpu() for x in (*result[:6], *torch.autograd.grad(result.loss, [hidden, *leaves]))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_rows", "largest", "size"),
    [(200, 192, 112), (1024, 192, 176), (192, 192, 192), (60, 9999, 64), (5, 3, 3), (0, 7, 7)],
)
def test_chunks_are_about_even_and_no_larger_than_asked(num_rows, largest, size):
    assert even_chunks(num_rows, largest) == size


def test_few_positions_of_a_small_vocabulary_are_one_block(monkeypatch):
    """Evenly divided chunks must not make smaller blocks."""
    calls, differentiate = [], loop._differentiate_
    monkeypatch.setattr(
        loop, "_differentiate_", lambda *rows, **more: calls.append(len(rows[0])) or differentiate(*rows, **more)
    )
    torch.manual_seed(0)
    hard_label_loss(torch.randn(60, 8), Head(torch.randn(384, 8)), torch.randint(384, (60,)), Objective(kd_weight=0.0))
    assert calls == [60]


def test_agreement_is_that_of_the_places_of_the_maxima():
    torch.manual_seed(0)
    student, teacher = torch.randn(400, 5), torch.randn(400, 5)
    student[:, 2] = teacher[::2, 3] = teacher[5] = -torch.inf
    teacher[5, 1] = 1.0
    assert agreeing(student, teacher) == (student.argmax(-1) == teacher.argmax(-1)).sum()
    # Sums of logits would round these two together.
    assert agreeing(torch.tensor([[1e8, 1e8 - 8]]), torch.tensor([[0.0, 1.0]])) == 0
