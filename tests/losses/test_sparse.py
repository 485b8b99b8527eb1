"""Sparse targets against float64 formulas on dense logits, value and gradient.

Shapes: N positions, V vocabulary, K entries of a target.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_distill.losses import loop
from hf_distill.losses.divergence import DIVERGENCE_TERMS, DIVERGENCES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.losses.sparse import EXACT_MASS, SparseSignal
from hf_distill.losses.sum import SumSignal
from tests.losses.live import Live
from tests.losses.test_loop import CountProducts

ROWS, VOCAB, WIDTH, K = 11, 35, 8, 5


def make_student(dtype=torch.float64, rows=ROWS, frozen=False, plain=False):
    """Hidden states, a head of 40 rows (5 of them padding) and labels."""
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(shape).double().to(dtype) for shape in ((rows, WIDTH), (40, WIDTH), (40,)))
    labels = torch.randint(0, VOCAB, (rows,))
    labels[::4] = -100
    head = Head(weight) if plain else Head(weight, bias, 0.5, 4.0)
    for x in (hidden, head.weight, head.bias):
        if x is not None:
            x.requires_grad_(x is hidden or not frozen)
    return hidden, head, labels


def make_target(rows=ROWS, dtype=torch.float64, **changes):
    """Entries of which 0 to 3 are exact; the last two of the second row are none."""
    torch.manual_seed(1)
    ids = torch.stack([torch.randperm(VOCAB)[:K] for _ in range(rows)]) if rows else torch.empty(0, K).long()
    weights = torch.rand(rows, K).double().sort(-1, descending=True).values
    weights = weights / weights.sum(-1, keepdim=True)
    if rows > 1:
        ids[1, -2:], weights[1, -2:] = 0, 0.0
    num_exact = torch.arange(rows) % 4
    entropy = torch.rand(rows).double()
    return SparseSignal(ids, weights.to(dtype), entropy.to(dtype), num_exact, **changes)


def dense_logits(hidden, head):
    logits = hidden @ head.weight[:VOCAB].T
    logits = logits if head.bias is None else logits + head.bias[:VOCAB]
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def leaves_of(hidden, head):
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def formula(hidden, head, labels, signal, *, kd_weight, ce_weight=None, token_weights=None, num_items=None):
    """The loss on dense logits (N, V) in float64, its gradients, and the divergence of each position."""
    leaves = [None if x is None else x.detach().double() for x in (hidden, head.weight, head.bias)]
    needed = [x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    for x, need in zip(leaves, needed, strict=True):
        if x is not None:
            x.requires_grad_(need)
    logits = dense_logits(leaves[0], head._replace(weight=leaves[1], bias=leaves[2]))
    target = torch.zeros_like(logits).scatter_add(-1, signal.ids.long(), signal.weights.double())  # (N, V)
    log_probs = (logits / signal.temperature).log_softmax(-1)
    kd = -(target * log_probs).sum(-1)
    kd = kd if signal.entropy is None else kd - signal.entropy.double()
    kd = kd if token_weights is None else kd * token_weights.double()
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    ce_weight = 1 - kd_weight if ce_weight is None else ce_weight
    loss = (kd_weight * signal.temperature**2 * kd.sum() + ce_weight * ce) / max(num_items or len(labels), 1)
    return loss.item(), torch.autograd.grad(loss, [x for x in leaves if x is not None and x.requires_grad]), kd.detach()


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def assert_equals_the_formula(student, signal, tolerance=1e-11, rounding=1e-11, vocab_size=VOCAB, **settings):
    hidden, head, labels = student
    known = {name: value for name, value in settings.items() if name not in ("chunk_size", "compiled")}
    expected, gradients, kd = formula(hidden, head, labels, signal, **known)
    objective = Objective(vocab_size=vocab_size, temperature=signal.temperature, **settings)
    result = signal.loss(hidden, head, labels, objective)
    assert result.loss.item() == pytest.approx(expected, rel=tolerance)
    assert result.kd.item() == pytest.approx(kd.sum().item(), rel=tolerance)
    leaves = leaves_of(hidden, head)
    for leaf, mine, theirs in zip(leaves, torch.autograd.grad(result.loss, leaves), gradients, strict=True):
        assert mine.dtype == leaf.dtype
        assert relative(mine, theirs) < rounding
    return result


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("plain", [False, True], ids=["bias, scale and soft-cap", "weight alone"])
def test_value_and_gradient_equal_the_float64_formula(frozen, plain):
    weights = torch.linspace(0.1, 2, ROWS).double()
    for temperature, chunk_size in itertools.product((1.0, 2.0, 0.7), (1, 4, 11, 100)):
        student, signal = make_student(frozen=frozen, plain=plain), make_target(temperature=temperature)
        assert_equals_the_formula(
            student, signal, kd_weight=0.3, token_weights=weights, num_items=7, chunk_size=chunk_size
        )


@pytest.mark.parametrize("changes", [{"kd_weight": 0.0}, {"kd_weight": 1.0}, {"kd_weight": 1.0, "ce_weight": 0.5}])
def test_the_weights_of_divergence_and_hard_labels(changes):
    assert_equals_the_formula(make_student(), make_target(), **changes)


def test_a_weight_that_changes_is_the_weight_of_that_step():
    """As a schedule makes it: the same signal with another objective each time."""
    signal = make_target()
    for kd_weight in (1.0, 0.75, 0.5, 0.0):
        assert_equals_the_formula(make_student(), signal, kd_weight=kd_weight, compiled=False)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_lower_precision_keeps_float32_sums(dtype, rounding, stored):
    """The inputs are exact in bf16; what is left is the rounding of the result itself (2^-9)."""
    signal = make_target(dtype=stored)
    assert_equals_the_formula(make_student(dtype), signal, 1e-5, rounding, kd_weight=0.4, chunk_size=4)


def test_ids_may_be_any_integers():
    signal = make_target()
    assert_equals_the_formula(make_student(), signal._replace(ids=signal.ids.int()), kd_weight=0.4)


def test_no_rows_give_zero_loss_and_zero_gradients():
    hidden, head, labels = make_student(torch.float32, rows=0)
    result = make_target(rows=0, dtype=torch.float32).loss(hidden, head, labels, Objective(vocab_size=VOCAB))
    result.loss.backward()
    assert result.loss.item() == result.kd.item() == result.num_paired.item() == result.more[EXACT_MASS].item() == 0
    assert (head.weight.grad == 0).all()


def test_a_target_of_all_probabilities_is_the_dense_loss():
    """K = V, every entry exact: the teacher's distribution itself."""
    hidden, head, labels = make_student()
    teacher = TeacherSignal(torch.randn(ROWS, 6).double(), Head(torch.randn(VOCAB, 6).double()))
    probs = (teacher.hidden @ teacher.head.weight.T / 1.7).softmax(-1)
    entropy = torch.distributions.Categorical(probs).entropy()
    weights, ids = probs.sort(-1, descending=True)
    signal = SparseSignal(ids, weights, entropy, torch.full((ROWS,), VOCAB), temperature=1.7, vocab_size=VOCAB)
    objective = Objective(kd_weight=0.6, temperature=1.7, vocab_size=VOCAB, token_weights=torch.rand(ROWS).double())
    found, expected = (x.loss(hidden, head, labels, objective) for x in (signal, teacher))
    for name in ("loss", "kd", "ce", "agreement", "student_entropy", "num_paired"):
        assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-11), name
    assert found.more[EXACT_MASS].item() == pytest.approx(ROWS)
    leaves = leaves_of(hidden, head)
    for mine, theirs in zip(*(torch.autograd.grad(x.loss, leaves) for x in (found, expected)), strict=True):
        assert relative(mine, theirs) < 1e-11


def test_agreement_is_counted_where_an_entry_is_exact():
    """There the first entry is the teacher's most likely token; elsewhere nobody knows it."""
    hidden, head, labels = make_student()
    signal = make_target()
    predicted = dense_logits(hidden, head).argmax(-1)
    ids = signal.ids.clone()
    ids[:6, 0] = predicted[:6]  # right in rows 0 to 5, and known in rows 1, 2, 3 and 5
    ids[6:, 0] = (predicted[6:] + 1) % VOCAB
    result = signal._replace(ids=ids).loss(hidden, head, labels, Objective(vocab_size=VOCAB))
    assert result.num_paired.item() == (signal.num_exact > 0).sum().item() == 8
    assert result.agreement.item() == 4
    result = signal._replace(num_exact=None).loss(hidden, head, labels, Objective(vocab_size=VOCAB))
    assert result.num_paired.item() == result.agreement.item() == 0


def test_the_exact_mass_is_logged_where_it_is_known():
    student, signal = make_student(), make_target()
    expected = sum(signal.weights[row, : signal.num_exact[row]].sum().item() for row in range(ROWS))
    assert signal.loss(*student, Objective(vocab_size=VOCAB)).more == {EXACT_MASS: pytest.approx(expected)}
    assert signal._replace(num_exact=None).loss(*student, Objective(vocab_size=VOCAB)).more == {}


def test_without_an_entropy_the_divergence_is_the_cross_entropy():
    signal = make_target()._replace(entropy=None)
    assert_equals_the_formula(make_student(), signal, kd_weight=0.4)


def test_a_divergence_below_zero_is_left_as_it_is():
    """The target is the student's likeliest token, and its entropy the teacher's: a sample below its mean."""
    hidden, head, labels = make_student()
    ids = dense_logits(hidden, head).argmax(-1, keepdim=True)
    signal = SparseSignal(ids, torch.ones(ROWS, 1).double(), torch.full((ROWS,), 3.5).double())
    result = assert_equals_the_formula((hidden, head, labels), signal, kd_weight=1.0)
    assert result.kd.item() < 0


def test_entries_of_no_weight_may_name_any_token():
    student, signal = make_student(), make_target()
    weights = signal.weights.clone()
    weights[:, -2:] = 0
    one, other = signal._replace(weights=weights), signal._replace(weights=weights, ids=signal.ids.clone())
    other.ids[:, -2:] = other.ids[:, :1]
    first, second = (x.loss(*student, Objective(vocab_size=VOCAB)) for x in (one, other))
    leaves = leaves_of(*student[:2])
    assert first.loss.item() == second.loss.item()
    for mine, theirs in zip(*(torch.autograd.grad(x.loss, leaves) for x in (first, second)), strict=True):
        assert torch.equal(mine, theirs)


def test_a_sum_with_a_dense_member_is_the_sum_of_both_and_shares_the_students_products():
    hidden, head, labels = make_student()
    teacher = TeacherSignal(torch.randn(ROWS, 6).double(), Head(torch.randn(VOCAB, 6).double()))
    objective = Objective(vocab_size=VOCAB, chunk_size=4)
    members = [(0.7, make_target()), (0.3, teacher)]
    leaves = leaves_of(hidden, head)
    with CountProducts() as products:
        result = SumSignal(members).loss(hidden, head, labels, objective)
        found = torch.autograd.grad(result.loss, leaves)
    assert products.count == 3 * (3 + 1)
    parts = [(weight, signal.loss(hidden, head, labels, objective)) for weight, signal in members]
    for name in ("loss", "kd", "ce", "student_entropy", "agreement", "num_paired"):
        total = sum(weight * getattr(part, name) for weight, part in parts)
        assert getattr(result, name).item() == pytest.approx(total.item(), rel=1e-12)
    assert result.more == parts[0][1].more
    for mine, theirs in zip(found, torch.autograd.grad(sum(w * x.loss for w, x in parts), leaves), strict=True):
        assert relative(mine, theirs) < 1e-12


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_the_products_are_those_of_hard_labels(frozen):
    for loss in (make_target(dtype=torch.float32).loss, hard_label_loss):
        hidden, head, labels = make_student(torch.float32, frozen=frozen)
        with CountProducts() as products:
            loss(hidden, head, labels, Objective(vocab_size=VOCAB)).loss.backward()
        assert products.count == (2 if frozen else 3)


def test_no_more_than_the_students_chunk_of_logits_is_alive():
    """One buffer of logits, and the blocks of the element-wise part; with a teacher's logits there are two buffers."""
    torch.manual_seed(0)
    rows, vocab, chunk_size = 300, 1000, 128
    signal = SparseSignal(torch.randint(0, vocab, (rows, K)), torch.full((rows, K), 1 / K), num_exact=torch.ones(rows))
    head = Head(torch.randn(vocab, 4, requires_grad=True), softcap=3.0)
    with Live(vocab) as live:
        hidden = torch.randn(rows, 4, requires_grad=True)
        objective = Objective(chunk_size=chunk_size, compiled=False)
        signal.loss(hidden, head, torch.zeros(rows).long(), objective).loss.backward()
    assert live.most_bytes < 2 * chunk_size * vocab * 4


def test_extreme_logits_and_masked_tokens_leave_all_numbers_finite():
    bias = torch.zeros(8)
    bias[[1, 3]] = -torch.inf
    hidden = (200 * torch.eye(4)).requires_grad_()
    head = Head(torch.eye(8)[:, :4].contiguous().requires_grad_(), bias)
    ids = torch.tensor([[3, 1, 0], [2, 0, 3], [7, 6, 5], [0, 1, 2]])
    signal = SparseSignal(ids, torch.tensor([0.5, 0.5, 0.0]).expand(4, 3), torch.zeros(4), torch.ones(4).long())
    result = signal.loss(hidden, head, torch.tensor([0, 2, 2, 0]), Objective())
    result.loss.backward()
    assert all(value.isfinite() for value in result[:6])
    assert hidden.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"forward_kl"}))
def test_a_divergence_that_would_be_biased_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' cannot be computed from a sparse target.*unbiased for forward_kl"):
        make_target().loss(*make_student(), Objective(vocab_size=VOCAB, divergence=name))


@pytest.mark.parametrize(
    ("signal", "settings", "message"),
    [
        ({}, {"temperature": 2.0}, "temperature=2.0 differs from that of the sparse target, 1.0"),
        ({"temperature": 2.0}, {}, "temperature=1.0 differs from that of the sparse target, 2.0"),
        ({"vocab_size": 34}, {}, "probabilities of the sparse target are over 34 tokens, and the student has 35"),
        ({"ids": torch.full((ROWS, K), VOCAB)}, {}, r"ids\[0, 0\] is 35; 0 to 34 are possible"),
        ({"ids": torch.full((ROWS, K), -1)}, {}, r"ids\[0, 0\] is -1"),
        ({"ids": torch.zeros(ROWS, K)}, {}, "ids have to be integers, got torch.float32"),
        ({"ids": torch.zeros(ROWS, K + 1).long()}, {}, r"have to be \(N, K\), got \(11, 6\) and \(11, 5\)"),
        ({"ids": torch.zeros(ROWS, 0).long(), "weights": torch.zeros(ROWS, 0)}, {}, r"have to be \(N, K\)"),
        ({"ids": torch.zeros(4, K).long(), "weights": torch.zeros(4, K)}, {}, "ids has 4 rows, student_hidden has 11"),
        ({"entropy": torch.zeros(ROWS, 1)}, {}, r"entropy is \(11, 1\), student_hidden has 11 rows"),
        ({"num_exact": torch.zeros(3)}, {}, r"num_exact is \(3,\), student_hidden has 11 rows"),
    ],
)
def test_what_a_target_cannot_follow_is_refused_in_words(signal, settings, message):
    with pytest.raises(ValueError, match=message):
        make_target()._replace(**signal).loss(*make_student(), Objective(vocab_size=VOCAB, **settings))


def test_ids_are_looked_at_once():
    """Whoever knows them to be right says so, as with labels: on a GPU to look is to wait."""
    signal = make_target()
    ids = signal.ids.clone()
    ids[0, 0] = VOCAB
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):  # from the loop, which would use them
        signal._replace(ids=ids).loss(*make_student(), Objective(vocab_size=VOCAB, checked=True))


@pytest.mark.slow
def test_the_compiled_elementwise_part_equals_plain_torch():
    student = Head(torch.empty(VOCAB, 4), logit_scale=0.5, softcap=3.0).with_product_dtype(torch.empty(1, 4))
    signal = make_target(dtype=torch.float32)
    step = signal.step(ROWS, VOCAB, torch.device("cpu"), Objective())
    constants = loop.Constants(DIVERGENCE_TERMS["forward_kl"], {}, 0.5, 0.5, 1.0)
    options = {"student": student, "step": step, "constants": constants}
    for rows in (ROWS, 5):
        inputs = torch.randint(0, VOCAB, (rows,)), torch.rand(rows), *step.inputs_(slice(0, rows), [], constants)
        logits = torch.randn(rows, VOCAB)
        plain, compiled = logits.clone(), logits.clone()
        expected = loop._differentiate_(plain, *inputs, **options)
        found = loop._compiled_differentiate_()(compiled, *inputs, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
