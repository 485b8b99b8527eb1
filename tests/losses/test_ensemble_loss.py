"""Several teachers in one fused loss, against dense float64 formulas; and TAID, whose target lies between two sides.

Shapes: N positions, V vocabulary, K teachers.
"""

import itertools

import pytest
import torch

from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from tests.losses.live import Live
from tests.losses.oracle import distillation_loss, kl, taid
from tests.losses.test_fused_linear import ROWS, VOCAB, combined, dense_logits, relative

NAMES = sorted(DIVERGENCES)
COMBINATIONS = ("mixture", "sum")
# Width, rows (the rest is padding), logit scale and soft-cap of each teacher; the second has no bias.
TEACHERS = ((6, 37, 1.0, None), (5, VOCAB, 1.5, 3.0), (9, 41, 0.7, None))
WEIGHTS = {1: [1.0], 2: [0.7, 0.3], 3: [0.5, 0.2, 0.3]}
OPTIONS = {"kd_weight": 0.3, "token_weights": torch.linspace(0.1, 2, ROWS), "num_items": 7}


# ------------------------------------------------------------------------------------------------ what the tests share


def make_student(dtype=torch.float64, rows=ROWS):
    """Hidden states (N, 8) and a head with bias, scale and soft-cap: leaves that want a gradient; and labels."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, 8), torch.randn(40, 8), torch.randn(40)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    labels = torch.randint(0, VOCAB, (rows,))
    labels[::4] = -100
    return hidden, Head(weight, bias, 0.5, 4.0), labels


def make_teachers(number: int, dtype=torch.float64, rows=ROWS, weights=None) -> list[TeacherSignal]:
    torch.manual_seed(1)
    signals = []
    for (width, head_rows, scale, softcap), weight in zip(TEACHERS, weights or WEIGHTS[number], strict=False):
        bias = None if softcap else torch.randn(head_rows).to(dtype)
        head = Head(torch.randn(head_rows, width).to(dtype), bias, scale, softcap)
        signals.append(TeacherSignal(torch.randn(rows, width).to(dtype), head, weight))
    return signals


def logits_of(hidden, head: Head):
    """Dense float64 logits (N, V)."""
    bias = None if head.bias is None else head.bias.double()
    return dense_logits(hidden.double(), head.weight.double(), bias, head.logit_scale, head.softcap)


def dense(student_logits, teachers, labels, combination, *, temperature, **settings):
    """The loss from dense logits: to the mixture of the teachers' probabilities, or summed over the teachers."""
    logits = [logits_of(teacher.hidden, teacher.head) for teacher in teachers]
    weights = [torch.as_tensor(teacher.weight, dtype=torch.float64).reshape(-1, 1) for teacher in teachers]
    if combination == "mixture":
        probs = sum(w * (z / temperature).softmax(-1) for w, z in zip(weights, logits, strict=True))
        return distillation_loss(student_logits, temperature * probs.log(), labels, temperature=temperature, **settings)
    losses = [distillation_loss(student_logits, z, labels, temperature=temperature, **settings) for z in logits]
    return sum(w.item() * loss for w, loss in zip(weights, losses, strict=True))


def dense_gradients(student, teachers, combination, **settings):
    """The dense loss and its gradients for hidden states, head and bias."""
    hidden, head, labels = student
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    loss = dense(
        logits_of(leaves[0], head._replace(weight=leaves[1], bias=leaves[2])), teachers, labels, combination, **settings
    )
    return loss.item(), torch.autograd.grad(loss, leaves)


def fused(student, teachers, combination="mixture", **settings):
    """The fused loss, all five numbers, and its gradients for hidden states, head and bias."""
    hidden, head, labels = student
    objective = Objective(**{"vocab_size": VOCAB, **OPTIONS, **settings})
    result = combined(teachers, combination).loss(hidden, head, labels, objective)
    return result, torch.autograd.grad(result.loss, [hidden, head.weight, head.bias])


def assert_same(found, expected, tolerance=1e-10):
    """Both are a result and gradients of `fused`."""
    for mine, theirs in zip(found[0][:6], expected[0][:6], strict=True):
        assert mine.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert relative(mine, theirs.double()) < tolerance


# ------------------------------------------------------------------------------------------- the loss is the formula


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_value_and_gradients_equal_the_float64_formula(combination, number):
    """Every divergence, at temperatures and chunk sizes of which 4 does not divide the 11 rows."""
    student, teachers = make_student(), make_teachers(number)
    for name, (temperature, chunk_size) in itertools.product(NAMES, ((1.0, 100), (2.0, 4), (0.7, 1))):
        settings = {"divergence": name, "temperature": temperature}
        expected, gradients = dense_gradients(student, teachers, combination, **{**OPTIONS, **settings})
        result, found = fused(student, teachers, combination, chunk_size=chunk_size, **settings)
        assert result.loss.item() == pytest.approx(expected, rel=1e-11), settings
        for mine, theirs in zip(found, gradients, strict=True):
            assert relative(mine, theirs) < 1e-10, settings
        assert (found[1][VOCAB:] == 0).all(), "padding rows got a gradient"
        assert (found[2][VOCAB:] == 0).all(), "padding rows got a gradient"


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_and_mixed_precision_keeps_float32_sums(combination, dtype, tolerance):
    """A student in `dtype` with a bfloat16 and a float32 teacher: what is left is the rounding of the results."""
    student = make_student(dtype)
    teachers = [make_teachers(2, other)[i] for i, other in enumerate((torch.bfloat16, torch.float32))]
    settings = {"divergence": "reverse_kl", "temperature": 2.0}
    expected, gradients = dense_gradients(student, teachers, combination, **{**OPTIONS, **settings})
    result, found = fused(student, teachers, combination, chunk_size=4, **settings)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    for mine, theirs in zip(found, gradients, strict=True):
        assert mine.dtype == dtype
        assert relative(mine, theirs) < tolerance


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_by_products_are_plain_sums(combination):
    rows = 200  # so that some of them agree by chance
    student, teachers = make_student(rows=rows), make_teachers(3, rows=rows)
    result, _ = fused(student, teachers, combination, temperature=2.0, chunk_size=64, token_weights=None)
    logits = logits_of(*student[:2]).detach()
    each = [logits_of(teacher.hidden, teacher.head) for teacher in teachers]
    mixture = sum(w * (z / 2).softmax(-1) for w, z in zip(WEIGHTS[3], each, strict=True))
    targets = [(1.0, mixture)] if combination == "mixture" else list(zip(WEIGHTS[3], each, strict=True))
    agreement = sum(w * (logits.argmax(-1) == target.argmax(-1)).sum() for w, target in targets)
    assert 0 < agreement < rows
    assert result.agreement.item() == pytest.approx(agreement.item())
    ce = torch.nn.functional.cross_entropy(logits, student[2], reduction="sum")
    assert result.ce.item() == pytest.approx(ce.item())
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    assert result.student_entropy.item() == pytest.approx(entropy.item())


# ------------------------------------------------------------------------------------------------ what has to be equal


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_two_equal_teachers_are_one(combination, name):
    student, (teacher,) = make_student(), make_teachers(1)
    settings = {"divergence": name, "temperature": 1.7, "chunk_size": 4}
    twice = [teacher._replace(weight=0.25), teacher._replace(weight=0.75)]
    assert_same(fused(student, twice, combination, **settings), fused(student, [teacher], **settings))


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_without_weight_changes_nothing(combination, name):
    student, (first, second) = make_student(), make_teachers(2)
    settings = {"divergence": name, "temperature": 1.7, "chunk_size": 4}
    expected = fused(student, [first], **settings)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        teachers = [first, second] if weights[0] else [second, first]
        teachers = [teacher._replace(weight=weight) for teacher, weight in zip(teachers, weights, strict=True)]
        assert_same(fused(student, teachers, combination, **settings), expected)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_order_of_the_teachers_does_not_matter(combination):
    student, teachers = make_student(), make_teachers(3)
    settings = {"divergence": "jensen_shannon", "temperature": 2.0, "chunk_size": 4}
    expected = fused(student, teachers, combination, **settings)
    for order in itertools.permutations(teachers):
        assert_same(fused(student, list(order), combination, **settings), expected)


def test_mixture_and_sum_of_forward_kl_have_one_gradient_and_differ_by_what_the_teachers_differ():
    student, teachers = make_student(), make_teachers(3)
    options = {"kd_weight": 1.0, "token_weights": None, "num_items": 1}
    (mixture, gradients), (total, others) = (
        fused(student, teachers, combination, **options) for combination in COMBINATIONS
    )
    for one, other in zip(gradients, others, strict=True):
        assert relative(one, other) < 1e-10
    each = [logits_of(teacher.hidden, teacher.head).softmax(-1) for teacher in teachers]
    mean = sum(w * p for w, p in zip(WEIGHTS[3], each, strict=True))
    spread = sum(w * kl(p, mean).sum() for w, p in zip(WEIGHTS[3], each, strict=True))
    assert (total.loss - mixture.loss).item() == pytest.approx(spread.item(), rel=1e-10)
    # No other divergence has this property.
    one, other = (fused(student, teachers, way, **options, divergence="reverse_kl")[1][0] for way in COMBINATIONS)
    assert relative(one, other) > 1e-2


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_one_hot_weights_of_positions_are_routing(name, chunk_size):
    """The second teacher has no position in most chunks."""
    student, teachers = make_student(), make_teachers(3)
    route = torch.tensor([0, 0, 2, 2, 0, 2, 0, 0, 2, 1, 0])
    settings = {"divergence": name, "temperature": 2.0}
    routed = [teacher._replace(weight=(route == i).float()) for i, teacher in enumerate(teachers)]
    result, found = fused(student, routed, chunk_size=chunk_size, **settings)
    hidden, head, labels = student
    parts = []
    for i, teacher in enumerate(teachers):
        mine = route == i
        signal = teacher._replace(hidden=teacher.hidden[mine], weight=1.0)
        options = {**OPTIONS, "token_weights": OPTIONS["token_weights"][mine], **settings}
        objective = Objective(vocab_size=VOCAB, **options)
        parts.append(signal.loss(hidden[mine], head, labels[mine], objective))
    loss = sum(part.loss for part in parts)
    assert_same(
        (result, found),
        (
            [loss, *(sum(values) for values in zip(*(part[1:6] for part in parts), strict=True))],
            torch.autograd.grad(loss, [hidden, head.weight, head.bias]),
        ),
    )


def test_weights_that_change_from_position_to_position_are_the_formula():
    student, teachers = make_student(), make_teachers(3)
    torch.manual_seed(2)
    weights = torch.rand(ROWS, 3).double()
    weights[torch.arange(ROWS), torch.arange(ROWS) % 3] = 0  # one of them has no say
    weights = (weights / weights.sum(1, keepdim=True)).unbind(1)
    teachers = [teacher._replace(weight=w) for teacher, w in zip(teachers, weights, strict=True)]
    settings = {"divergence": "skew_reverse_kl", "temperature": 1.5}
    expected, gradients = dense_gradients(student, teachers, "mixture", **{**OPTIONS, **settings})
    result, found = fused(student, teachers, chunk_size=4, **settings)
    assert result.loss.item() == pytest.approx(expected, rel=1e-11)
    for mine, theirs in zip(found, gradients, strict=True):
        assert relative(mine, theirs) < 1e-10


# ------------------------------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_teachers_that_are_sure_of_different_tokens_give_finite_gradients(combination, name):
    hidden, head = torch.eye(4) * 200, Head(torch.eye(4))
    student = hidden.clone().requires_grad_()
    teachers = [TeacherSignal(hidden.roll(i, 0), head, 0.5) for i in (1, 2)]
    objective = Objective(divergence=name, temperature=0.5)
    result = combined(teachers, combination).loss(student, head, torch.arange(4), objective)
    result.loss.backward()
    assert result.loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_no_rows_give_zero_loss_and_zero_gradients(combination):
    student, teachers = make_student(rows=0), make_teachers(3, rows=0)
    result, (hidden, weight, bias) = fused(student, teachers, combination, token_weights=None)
    assert result.loss.item() == 0
    assert hidden.shape == (0, 8)
    assert weight.abs().sum() == bias.abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 36}, "vocab_size=36 does not fit teacher_head, which has 35 rows"),
        ({"teachers": make_teachers(2, rows=3)}, "teacher_hidden has 3 rows, student_hidden has 11"),
    ],
)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_what_does_not_fit_is_refused_in_words(combination, change, message):
    settings = {"teachers": make_teachers(2), **change}
    with pytest.raises(ValueError, match=message):
        fused(make_student(), combination=combination, **settings)


# ---------------------------------------------------------------------------------------------------------- the memory


@pytest.mark.parametrize(("combination", "chunks"), [("mixture", 4), ("sum", 4), ("route", 5)])
def test_memory_does_not_grow_with_the_number_of_teachers(monkeypatch, combination, chunks):
    """Chunks of logits alive at one time: buffers, and one or two more while a teacher is added to the mixture."""
    rows, vocab, chunk_size = 96, 1000, 16
    monkeypatch.setattr("hf_distill.losses.head.CACHE_BLOCK", vocab)  # the element-wise part works on one row at a time
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    most = []
    for number in (1, 2, 3, 6):
        teachers = [TeacherSignal(torch.randn(rows, 3), Head(torch.randn(vocab, 3)), 1 / number) for _ in range(number)]
        if combination == "route":
            weights = torch.arange(rows) % number
            teachers = [teacher._replace(weight=(weights == i).float()) for i, teacher in enumerate(teachers)]
        with Live(chunk_size * vocab // 2) as live:
            signal = combined(teachers, "sum" if combination == "sum" else "mixture")
            objective = Objective(chunk_size=chunk_size)
            signal.loss(hidden, Head(weight), torch.zeros(rows).long(), objective).loss.backward()
        assert live.largest <= chunk_size * vocab
        most.append(live.most)
    assert most[0] == 2  # one teacher: student and teacher
    assert max(most[2:]) <= most[1] <= chunks, most


# -------------------------------------------------------------------------------------------------------------- TAID


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_taid_is_its_formula_at_any_t(t, temperature):
    """The target is the softmax of `(1 - t) * student + t * teacher` logits, and carries no gradient."""
    student, (teacher,) = make_student(), make_teachers(1)
    options = {"kd_weight": 1.0, "temperature": temperature, "token_weights": None, "num_items": 1}
    result, (found, *_) = fused(student, [teacher], divergence="taid", divergence_params={"t": t}, **options)
    leaf = student[0].detach().clone().requires_grad_()
    ours, theirs = logits_of(leaf, student[1]) / temperature, logits_of(teacher.hidden, teacher.head) / temperature
    target = ((1 - t) * ours.detach() + t * theirs).softmax(-1)
    expected = temperature**2 * kl(target, ours.softmax(-1)).sum()
    (gradient,) = torch.autograd.grad(expected, leaf)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10)
    assert (found - gradient).norm() <= 1e-10 * max(gradient.norm(), 1)
    if t == 0:
        assert found.abs().max() < 1e-14
    if t == 1:
        assert_same((result, [found]), (lambda r: (r[0], r[1][:1]))(fused(student, [teacher], **options)))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_taid_with_several_teachers_is_the_formula(combination):
    student, teachers = make_student(), make_teachers(3)
    options = {"kd_weight": 1.0, "token_weights": None, "num_items": 1}
    result, _ = fused(student, teachers, combination, divergence="taid", divergence_params={"t": 0.3}, **options)
    q = logits_of(*student[:2]).detach().softmax(-1)
    each = [logits_of(teacher.hidden, teacher.head).softmax(-1) for teacher in teachers]
    mixture = sum(w * p for w, p in zip(WEIGHTS[3], each, strict=True))
    targets = [(1.0, mixture)] if combination == "mixture" else zip(WEIGHTS[3], each, strict=True)
    expected = sum(weight * taid(target, q, 0.3).sum() for weight, target in targets)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combination", [*COMBINATIONS, "route"])
def test_cuda_equals_the_float64_formula(combination, dtype):
    student, teachers = make_student(dtype), make_teachers(3, dtype)
    if combination == "route":
        route = torch.arange(ROWS) % 3
        teachers = [teacher._replace(weight=(route == i).float()) for i, teacher in enumerate(teachers)]
        combination = "mixture"
    settings = {"divergence": "jensen_shannon", "temperature": 2.0}
    expected, gradients = dense_gradients(student, teachers, combination, **{**OPTIONS, **settings})

    def to_cuda(x):
        return x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    student = to_cuda(student[0]), Head(*map(to_cuda, student[1])), student[2].cuda()
    teachers = [TeacherSignal(to_cuda(t.hidden), Head(*map(to_cuda, t.head)), to_cuda(t.weight)) for t in teachers]
    weights = OPTIONS["token_weights"].cuda()
    result, found = fused(student, teachers, combination, chunk_size=4, token_weights=weights, **settings)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert result.loss.item() == pytest.approx(expected, rel=tolerance)
    for mine, theirs in zip(found, gradients, strict=True):
        assert relative(mine.cpu(), theirs) < tolerance
