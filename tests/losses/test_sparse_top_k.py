"""The K most likely tokens of a teacher against float64 formulas over K + 1 outcomes, value and gradient.

Shapes: N positions, V vocabulary, K entries.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import loop
from hf_distill.losses.divergence import DIVERGENCE_TERMS, DIVERGENCES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.losses.sparse import EXACT_MASS, SparseSignal, TopKSignal
from hf_distill.losses.sum import SumSignal
from tests.losses.oracle import ORACLE
from tests.losses.test_loop import CountProducts
from tests.losses.test_sparse import ROWS, VOCAB, K, dense_logits, leaves_of, make_student, make_target, relative

NAMES = sorted(DIVERGENCES)


def make_teacher(rows=ROWS):
    torch.manual_seed(3)
    return TeacherSignal(torch.randn(rows, 6).double(), Head(torch.randn(VOCAB, 6).double()))


def make_top(num_entries=K, rows=ROWS, dtype=torch.float64, ragged=False, **changes):
    """The likeliest tokens of `make_teacher`, in any order; with `ragged`, one entry or two lack in some rows."""
    teacher = make_teacher(rows)
    log_probs, ids = (teacher.hidden @ teacher.head.weight.T).log_softmax(-1).topk(num_entries)
    order = torch.randperm(num_entries)
    ids, log_probs = ids[:, order], log_probs[:, order]
    if ragged:
        ids[::2, -1] = ids[1, -2:] = -1
    return TopKSignal(ids, log_probs.to(dtype), **changes)


def outcomes(log_probs, signal):
    """Probabilities (N, K + 1) of log-probabilities (N, V), with 0 where an entry lacks."""
    known = signal.ids >= 0
    probs = log_probs.exp().gather(-1, signal.ids.clamp(min=0).long()) * known
    in_top = torch.zeros_like(log_probs).scatter_add(-1, signal.ids.clamp(min=0).long(), known.to(log_probs)) > 0
    return torch.cat([probs, (log_probs.exp() * ~in_top).sum(-1, keepdim=True)], -1)


def formula(student, signal, name, *, kd_weight, token_weights=None, num_items=None, teacher=None, params=None):
    """The loss on dense logits (N, V) in float64, its gradients, and the divergence of each position.

    `teacher` are the probabilities (N, K + 1); by default those that the signal has.
    """
    hidden, head, labels = student
    needed = [x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    leaves = [None if x is None else x.detach().double() for x in (hidden, head.weight, head.bias)]
    leaves = [None if x is None else x.requires_grad_(need) for x, need in zip(leaves, needed, strict=True)]
    logits = dense_logits(leaves[0], head._replace(weight=leaves[1], bias=leaves[2]))
    if teacher is None:
        probs = signal.log_probs.double().exp() * (signal.ids >= 0)
        teacher = torch.cat([probs, 1 - probs.sum(-1, keepdim=True)], -1)
    students = outcomes(logits.log_softmax(-1), signal)
    if params is None:
        kd = torch.stack(
            [ORACLE[name](p[p > 0][None], q[p > 0][None])[0] for p, q in zip(teacher, students, strict=True)]
        )
    else:
        kd = DIVERGENCES[name](students.log(), teacher.log(), **params)
    weighted = kd if token_weights is None else kd * token_weights.double()
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss = (kd_weight * weighted.sum() + (1 - kd_weight) * ce) / (num_items or len(labels))
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None and x.requires_grad])
    return loss.item(), gradients, weighted.detach()


def assert_equals_the_formula(
    student, signal, name="forward_kl", tolerance=1e-10, rounding=1e-10, teacher=None, **settings
):
    hidden, head, labels = student
    known = {key: value for key, value in settings.items() if key not in ("chunk_size", "compiled")}
    expected, gradients, kd = formula(student, signal, name, teacher=teacher, **known)
    objective = Objective(vocab_size=VOCAB, divergence=name, **settings)
    result = signal.loss(hidden, head, labels, objective)
    assert result.loss.item() == pytest.approx(expected, rel=tolerance)
    assert result.kd.item() == pytest.approx(kd.sum().item(), rel=tolerance)
    leaves = leaves_of(hidden, head)
    for leaf, mine, theirs in zip(leaves, torch.autograd.grad(result.loss, leaves), gradients, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative(mine, theirs) < rounding
    return result


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_float64_formula(name, frozen):
    weights = torch.linspace(0.1, 2, ROWS).double()
    for ragged, plain, chunk_size in itertools.product((False, True), (False, True), (1, 4, 11, 100)):
        student, signal = make_student(frozen=frozen, plain=plain), make_top(ragged=ragged)
        settings = {"kd_weight": 0.3, "token_weights": weights, "num_items": 7, "chunk_size": chunk_size}
        assert_equals_the_formula(student, signal, name, **settings)


@pytest.mark.parametrize("num_entries", [1, VOCAB - 1])
@pytest.mark.parametrize("name", NAMES)
def test_one_entry_and_all_tokens_but_one(name, num_entries):
    assert_equals_the_formula(make_student(), make_top(num_entries), name, kd_weight=0.6)


@pytest.mark.parametrize("kd_weight", [1.0, 0.75, 0.0])
def test_the_weights_of_divergence_and_hard_labels(kd_weight):
    assert_equals_the_formula(make_student(), make_top(), kd_weight=kd_weight, compiled=False)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_keeps_float32_sums(name, dtype, rounding):
    signal = make_top(dtype=torch.float32)
    assert_equals_the_formula(make_student(dtype), signal, name, 1e-5, rounding, kd_weight=0.4, chunk_size=4)


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_are_the_dense_loss(name):
    """At any temperature, in any order, and with a mass below 1, which padding of the teacher's vocabulary leaves."""
    hidden, head, labels = make_student()
    teacher, top = make_teacher(), make_top(VOCAB)
    assert (top.ids[:, 1:] < top.ids[:, :-1]).any()
    for temperature, shift in ((1.0, 0.0), (1.7, 0.0), (1.0, -0.3)):
        objective = Objective(
            kd_weight=0.6, temperature=temperature, vocab_size=VOCAB, divergence=name, chunk_size=4,
            token_weights=torch.linspace(0, 2, ROWS).double(),
        )  # fmt: skip
        signal = top._replace(log_probs=top.log_probs + shift)
        found, expected = (x.loss(hidden, head, labels, objective) for x in (signal, teacher))
        for field in ("loss", "kd", "ce", "agreement", "student_entropy", "num_paired"):
            assert getattr(found, field).item() == pytest.approx(getattr(expected, field).item(), rel=1e-10), field
        assert found.more[EXACT_MASS].item() == ROWS
        leaves = leaves_of(hidden, head)
        for mine, theirs in zip(*(torch.autograd.grad(x.loss, leaves) for x in (found, expected)), strict=True):
            assert relative(mine, theirs) < 1e-10


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_the_divergence_grows_with_the_entries_up_to_the_dense_one(name):
    """Tokens that are put together can only look more alike: a lower bound, and never the loss without a tail."""
    hidden, head, labels = make_student()
    objective = Objective(kd_weight=1.0, vocab_size=VOCAB, divergence=name)
    found = [make_top(k).loss(hidden, head, labels, objective).kd.item() for k in (1, 2, 5, 12, 25, VOCAB)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(make_teacher().loss(hidden, head, labels, objective).kd.item())


def test_the_likeliest_token_is_known_at_every_position():
    hidden, head, labels = make_student()
    teacher, objective = make_teacher(), Objective(vocab_size=VOCAB)
    for num_entries in (1, 3, VOCAB):
        result = make_top(num_entries).loss(hidden, head, labels, objective)
        assert result.num_paired.item() == ROWS
        assert result.agreement.item() == teacher.loss(hidden, head, labels, objective).agreement.item()


def test_the_mass_of_the_entries_is_logged():
    signal = make_top(ragged=True)
    expected = (signal.log_probs.exp() * (signal.ids >= 0)).sum().item()
    result = signal.loss(*make_student(), Objective(vocab_size=VOCAB))
    assert result.more == {EXACT_MASS: pytest.approx(expected)}


# ----------------------------------------------------------------------------------------------------- small and large


def peaked(tail, num_entries=3, dtype=torch.float32, vocab=12):
    """Log-probabilities (5, V) of which all but `num_entries` tokens have `tail` together."""
    torch.manual_seed(5)
    top = torch.rand(5, num_entries).double() + 0.1
    others = torch.rand(5, vocab - num_entries).double() + 0.1
    probs = torch.cat([top / top.sum(-1, keepdim=True) * (1 - tail), others / others.sum(-1, keepdim=True) * tail], -1)
    return probs.log().to(dtype)


def of_logits(student, signal, name):
    """The divergence (5,) and the gradient of its sum by the logits (5, V) of a student, in their dtype."""
    logits = student.clone().requires_grad_()
    head = Head(torch.eye(logits.shape[1], dtype=logits.dtype))
    result = signal.loss(logits, head, torch.full((5,), -100), Objective(kd_weight=1.0, divergence=name, num_items=1))
    return result.kd, torch.autograd.grad(result.loss, logits)[0]


@pytest.mark.parametrize("teachers", [1e-9, 1e-4, 0.3, 1 - 1e-4, 1 - 1e-9])
@pytest.mark.parametrize("students", [1e-30, 2e-9, 2e-4, 0.4, 1 - 2e-4, 1 - 2e-9])
@pytest.mark.parametrize("name", NAMES)
def test_a_tail_of_any_size_keeps_its_digits_in_float32(name, students, teachers):
    """Against the same functions in float64, on probabilities of which nobody took a difference."""
    teacher, student = peaked(teachers, dtype=torch.float64), peaked(students, dtype=torch.float64).roll(1, 0)
    ids = torch.arange(3).expand(5, 3)
    exact = TopKSignal(ids, teacher[:, :3], teacher[:, 3:].logsumexp(-1))
    expected, gradient = of_logits(student, exact, name)
    found, mine = of_logits(
        student.float(), TopKSignal(*(x.float() if i else x for i, x in enumerate(exact[:3]))), name
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert relative(mine, gradient) < 1e-4 or (mine - gradient).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences_in_every_corner(name):
    ids = torch.arange(3).expand(5, 3)
    for students, teachers in itertools.product((2e-6, 0.4, 1 - 2e-6), (1e-6, 0.3, 1 - 1e-6)):
        if name in ("taid", "adaptive_kl"):
            continue  # their weights carry no gradient
        teacher, student = peaked(teachers, dtype=torch.float64), peaked(students, dtype=torch.float64).roll(1, 0)
        signal = TopKSignal(ids, teacher[:, :3])
        _, gradient = of_logits(student, signal, name)
        torch.manual_seed(0)
        direction = torch.randn_like(student)
        step = 1e-6 * direction
        above, below = (of_logits(student + sign * step, signal, name)[0] for sign in (1, -1))
        expected = ((above - below) / 2e-6).item()
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_tail_below_the_rounding_of_what_came_decides_nothing(name, dtype):
    """Log-probabilities that sum to 1 up to their rounding, or to a bit more: the student is not punished for that."""
    teacher, student = peaked(1e-12, dtype=torch.float64), peaked(1e-3, dtype=torch.float64)
    signal = TopKSignal(torch.arange(3).expand(5, 3), teacher[:, :3].to(dtype))
    eps = torch.finfo(dtype).eps
    floored = TopKSignal(signal.ids, teacher[:, :3], torch.full((5,), eps).double().log())
    kd, gradient = of_logits(student.float(), signal, name)
    expected, _ = of_logits(student, floored, name)
    assert gradient.isfinite().all()
    assert kd.item() == pytest.approx(expected.item(), rel=20 * eps, abs=20 * eps)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_and_masked_tokens_leave_all_numbers_finite(name):
    bias = torch.zeros(8)
    bias[[1, 3]] = -torch.inf
    for scale in (200.0, 1.0):
        hidden = (scale * torch.eye(4)).requires_grad_()
        head = Head(torch.eye(8)[:, :4].contiguous().requires_grad_(), bias)
        ids = torch.tensor([[3, 1, 0], [2, 0, 3], [7, 6, 5], [0, -1, -1]])
        log_probs = torch.tensor([[-1.0, -2, -torch.inf], [0, -torch.inf, -torch.inf], [-300, -400, -500], [0, 0, 0]])
        result = TopKSignal(ids, log_probs).loss(
            hidden, head, torch.tensor([0, 2, 2, 0]), Objective(kd_weight=1.0, divergence=name)
        )
        result.loss.backward()
        assert all(value.isfinite() for value in result[:6])
        assert hidden.grad.isfinite().all()
        assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("beta", [-0.3, 0.0, 0.5, 1.2])
def test_entries_that_lack_add_nothing_whatever_the_powers(alpha, beta):
    """A row of two entries, padded with one or three more, is the row of two."""
    hidden, head, labels = make_student()
    params = {"alpha": alpha, "beta": beta}
    objective = Objective(kd_weight=1.0, divergence="alpha_beta", divergence_params=params, vocab_size=VOCAB)
    top, results = make_top(2), []
    for width in (0, 1, 3):
        ids, log_probs = F.pad(top.ids, (0, width), value=-1), F.pad(top.log_probs, (0, width), value=5.0)
        result = TopKSignal(ids, log_probs).loss(hidden, head, labels, objective)
        results.append([result.kd, *torch.autograd.grad(result.loss, leaves_of(hidden, head))])
    expected = formula((hidden, head, labels), top, "alpha_beta", kd_weight=1.0, params=params)
    assert results[0][0].item() == pytest.approx(expected[2].sum().item(), rel=1e-9)
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_no_rows_give_zero_loss_and_zero_gradients():
    for num_entries in (K, VOCAB):
        hidden, head, labels = make_student(torch.float32, rows=0)
        signal = make_top(num_entries, rows=0, dtype=torch.float32)
        result = signal.loss(hidden, head, labels, Objective(vocab_size=VOCAB))
        result.loss.backward()
        assert result.loss.item() == result.kd.item() == result.num_paired.item() == result.more[EXACT_MASS].item() == 0
        assert (head.weight.grad == 0).all()


@pytest.mark.parametrize("num_entries", [K, VOCAB])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_products_are_those_of_hard_labels(frozen, num_entries):
    hidden, head, labels = make_student(torch.float32, frozen=frozen)
    signal = make_top(num_entries, dtype=torch.float32)
    with CountProducts() as products:
        signal.loss(hidden, head, labels, Objective(vocab_size=VOCAB)).loss.backward()
    assert products.count == (2 if frozen else 3)


def test_a_sum_of_all_kinds_is_the_sum_of_its_members():
    hidden, head, labels = make_student()
    sampled = SparseSignal(torch.zeros(ROWS, 1).long(), torch.ones(ROWS, 1).double(), num_exact=torch.ones(ROWS).long())
    members = [(0.4, make_top()), (0.3, make_teacher()), (0.2, sampled), (0.1, make_top(VOCAB))]
    objective = Objective(vocab_size=VOCAB, chunk_size=4)
    leaves = leaves_of(hidden, head)
    result = SumSignal(members).loss(hidden, head, labels, objective)
    parts = [(weight, signal.loss(hidden, head, labels, objective)) for weight, signal in members]
    for name in ("loss", "kd", "ce", "student_entropy", "agreement", "num_paired"):
        total = sum(weight * getattr(part, name) for weight, part in parts)
        assert getattr(result, name).item() == pytest.approx(total.item(), rel=1e-12), name
    masses = [part.more[EXACT_MASS].item() for _, part in parts if part.more]
    assert result.more == {EXACT_MASS: pytest.approx(sum(masses) / 3)}
    found = torch.autograd.grad(result.loss, leaves)
    for mine, theirs in zip(found, torch.autograd.grad(sum(w * x.loss for w, x in parts), leaves), strict=True):
        assert relative(mine, theirs) < 1e-12


@pytest.mark.parametrize(
    ("signal", "settings", "message"),
    [
        ({}, {"temperature": 2.0}, "temperature=2.0 needs the log-probabilities of all 35 tokens, and there are 5"),
        ({"vocab_size": 34}, {}, "log_probs are over 34 tokens, and the student has 35"),
        ({}, {"vocab_size": 4}, "ids has 5 entries a row, and there are 4 tokens"),
        ({"ids": torch.arange(K).expand(ROWS, K) + 31}, {}, r"ids\[0, 4\] is 35; -1 and 0 to 34 are possible"),
        ({"ids": torch.arange(K).expand(ROWS, K) - 1}, {}, r"ids\[0, 0\] is -1; a row needs at least one entry"),
        ({"ids": torch.tensor([4, 2, 3, 2, -1]).expand(ROWS, K)}, {}, r"ids\[0\] has 2 twice"),
        ({"log_probs": torch.full((ROWS, K), -1.0)}, {}, r"log_probs\[0\] are the logarithms of .* sum to 1.839"),
        ({"log_probs": torch.full((ROWS, K), torch.nan)}, {}, r"log_probs\[0\] are the logarithms of .* sum to nan"),
        ({"ids": torch.zeros(ROWS, K)}, {}, "ids have to be integers"),
        (
            {"log_probs": torch.zeros(ROWS, 2)},
            {},
            r"ids and log_probs have to be \(N, K\), got \(11, 5\) and \(11, 2\)",
        ),
        ({"log_tail": torch.zeros(ROWS, 1)}, {}, r"log_tail is \(11, 1\), student_hidden has 11 rows"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(signal, settings, message):
    with pytest.raises(ValueError, match=message):
        make_top()._replace(**signal).loss(*make_student(), Objective(**{"vocab_size": VOCAB, **settings}))


def test_where_all_tokens_are_there_none_may_lack():
    signal = make_top(VOCAB)
    signal.ids[3, 1] = -1
    with pytest.raises(ValueError, match=r"ids\[3, 1\] is -1; 0 to 34 are possible"):
        signal.loss(*make_student(), Objective(vocab_size=VOCAB))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make", [make_target, make_top, lambda **kw: make_top(VOCAB, **kw)], ids=["sample", "K", "all"]
)
def test_cuda_equals_the_cpu(make):
    results = []
    for device in ("cpu", "cuda"):
        hidden, head, labels = make_student(torch.float32)
        head = head._replace(
            weight=head.weight.detach().to(device).requires_grad_(), bias=head.bias.detach().to(device)
        )
        result = make(dtype=torch.float32).loss(hidden, head, labels, Objective(vocab_size=VOCAB, chunk_size=4))
        gradients = torch.autograd.grad(result.loss, [hidden, head.weight])
        results.append([x.detach().cpu() for x in (*result[:6], *result.more.values(), *gradients)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_entries", [K, VOCAB])
def test_the_compiled_elementwise_part_equals_plain_torch(num_entries):
    student = Head(torch.empty(VOCAB, 4), logit_scale=0.5, softcap=3.0).with_product_dtype(torch.empty(1, 4))
    signal = make_top(num_entries, dtype=torch.float32)
    step = signal.step(ROWS, VOCAB, torch.device("cpu"), Objective())
    constants = loop.Constants(DIVERGENCE_TERMS["reverse_kl"], {}, 0.5, 0.5, 1.0)
    options = {"student": student, "step": step, "constants": constants}
    for rows in (ROWS, 5):
        labels, weights = torch.randint(0, VOCAB, (rows,)), torch.rand(rows)
        inputs = [step.inputs_(slice(0, rows), [torch.empty(rows, VOCAB)], constants) for _ in range(2)]
        logits = torch.randn(rows, VOCAB)
        plain, compiled = logits.clone(), logits.clone()
        expected = loop._differentiate_(plain, labels, weights, *inputs[0], **options)
        found = loop._compiled_differentiate_()(compiled, labels, weights, *inputs[1], **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
