import itertools

import pytest
import torch

from hf_distill.losses import loop
from hf_distill.losses.divergence import DIVERGENCE_TERMS, DIVERGENCES
from hf_distill.losses.fused_linear import MixtureSignal, TeacherSignal, fused_linear_distillation_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.losses.sum import SumSignal
from tests.losses.live import Live
from tests.losses.oracle import distillation_loss

NAMES = sorted(DIVERGENCES)
ROWS, VOCAB = 11, 35
SETTINGS = {"kd_weight": 0.3, "token_weights": torch.linspace(0.1, 2, ROWS), "num_items": 7}


def make_inputs(dtype=torch.float64, rows=ROWS, student_rows=40, teacher_rows=37, seed=0):
    torch.manual_seed(seed)
    shapes = {
        "student_hidden": (rows, 8),
        "student_head": (student_rows, 8),
        "teacher_hidden": (rows, 6),
        "teacher_head": (teacher_rows, 6),
    }
    inputs = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(0, VOCAB, (rows,))
    labels[::4] = -100
    return inputs, labels


def dense_logits(hidden, head, bias=None, scale=1.0, softcap=None):
    logits = hidden @ head[:VOCAB].T
    logits = logits if bias is None else logits + bias[:VOCAB]
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def oracle_and_gradients(inputs, labels, student_bias=None, teacher_bias=None, heads=None, **settings):
    """Loss and gradients (hidden, head, bias) of the float64 formula on dense logits."""
    heads = heads or ({}, {})
    leaves = [inputs["student_hidden"], inputs["student_head"], student_bias]
    leaves = [x if x is None else x.double().detach().requires_grad_() for x in leaves]
    student_logits = dense_logits(*leaves, **heads[0])
    teacher_logits = dense_logits(
        inputs["teacher_hidden"].double(),
        inputs["teacher_head"].double(),
        None if teacher_bias is None else teacher_bias.double(),
        **heads[1],
    )
    loss = distillation_loss(student_logits, teacher_logits, labels, **settings)
    gradients = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return loss.item(), gradients


def combined(teachers, combination):
    """One signal of several: a "mixture", or a "sum" by their weights."""
    if combination == "mixture":
        return MixtureSignal(teachers)
    return SumSignal([(teacher.weight, teacher) for teacher in teachers])


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_float64_formula(name, frozen):
    """Every divergence x temperature x chunk size; chunk 4 does not divide the 11 rows; heads are padded."""
    inputs, labels = make_inputs()
    for temperature, chunk_size in itertools.product((1.0, 2.0, 0.7), (1, 4, 11, 100)):
        settings = {**SETTINGS, "temperature": temperature, "divergence": name}
        expected, (hidden_gradient, head_gradient) = oracle_and_gradients(inputs, labels, **settings)
        hidden = inputs["student_hidden"].clone().requires_grad_()
        head = inputs["student_head"].clone().requires_grad_(not frozen)
        result = fused_linear_distillation_loss(
            hidden, head, inputs["teacher_hidden"], inputs["teacher_head"], labels,
            vocab_size=VOCAB, chunk_size=chunk_size, **settings,
        )  # fmt: skip
        result.loss.backward()
        assert result.loss.item() == pytest.approx(expected, rel=1e-12)
        assert relative(hidden.grad, hidden_gradient) < 1e-10
        if frozen:
            assert head.grad is None
        else:
            assert relative(head.grad, head_gradient) < 1e-10
            assert (head.grad[VOCAB:] == 0).all(), "padding rows got a gradient"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", NAMES)
def test_lower_precision_keeps_float32_sums(name, dtype, tolerance):
    """The inputs are exact in bf16; what is left is the rounding of the result itself (2^-9)."""
    inputs, labels = make_inputs(dtype)
    settings = {**SETTINGS, "temperature": 2.0, "divergence": name}
    expected, gradients = oracle_and_gradients(inputs, labels, **settings)
    leaves = [inputs["student_hidden"].requires_grad_(), inputs["student_head"].requires_grad_()]
    result = fused_linear_distillation_loss(
        *leaves, inputs["teacher_hidden"], inputs["teacher_head"], labels, vocab_size=VOCAB, chunk_size=4, **settings
    )
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)  # no rounding of logits or sums to bf16
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == dtype
        assert relative(leaf.grad, gradient) < tolerance


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_bias_logit_scale_and_softcap_on_both_sides(temperature):
    inputs, labels = make_inputs()
    student_bias, teacher_bias = torch.randn(40).double(), torch.randn(37).double()
    settings = {**SETTINGS, "temperature": temperature, "divergence": "jensen_shannon"}
    heads = ({"scale": 0.5, "softcap": 2.0}, {"scale": 1.5, "softcap": 3.0})
    expected, gradients = oracle_and_gradients(inputs, labels, student_bias, teacher_bias, heads, **settings)
    leaves = [inputs["student_hidden"], inputs["student_head"], student_bias]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    result = fused_linear_distillation_loss(
        *leaves[:2], inputs["teacher_hidden"], inputs["teacher_head"], labels,
        vocab_size=VOCAB, student_bias=leaves[2], teacher_bias=teacher_bias, chunk_size=3,
        student_logit_scale=0.5, student_softcap=2.0, teacher_logit_scale=1.5, teacher_softcap=3.0, **settings,
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative(leaf.grad, gradient) < 1e-10


def test_by_products_equal_plain_sums():
    inputs, labels = make_inputs()
    weights = torch.rand(ROWS)
    result = fused_linear_distillation_loss(
        *inputs.values(), labels, vocab_size=VOCAB, temperature=2.0, token_weights=weights, chunk_size=4
    )
    student = dense_logits(inputs["student_hidden"], inputs["student_head"])
    teacher = dense_logits(inputs["teacher_hidden"], inputs["teacher_head"])
    kl = DIVERGENCES["forward_kl"]((student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1))
    entropy = torch.distributions.Categorical(logits=student).entropy()
    assert result.kd.item() == pytest.approx((kl * weights).sum().item())  # without the factor T^2
    assert result.ce.item() == pytest.approx(torch.nn.functional.cross_entropy(student, labels, reduction="sum").item())
    assert result.agreement.item() == (student.argmax(-1) == teacher.argmax(-1)).sum()
    assert result.student_entropy.item() == pytest.approx(entropy.sum().item())
    assert not any(value.requires_grad for value in result[1:6])


@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_one_term_alone_ignores_the_other(kd_weight):
    inputs, labels = make_inputs()
    settings = {"kd_weight": kd_weight, "temperature": 1.5, "divergence": "reverse_kl"}
    expected, (gradient, _) = oracle_and_gradients(inputs, labels, **settings)
    hidden = inputs.pop("student_hidden").requires_grad_()
    result = fused_linear_distillation_loss(hidden, *inputs.values(), labels, vocab_size=VOCAB, **settings)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert relative(hidden.grad, gradient) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_give_zero_loss_and_zero_gradients(name):
    inputs, _ = make_inputs(torch.float32, rows=0)
    leaves = [inputs["student_hidden"].requires_grad_(), inputs["student_head"].requires_grad_()]
    labels = torch.empty(0, dtype=torch.long)
    result = fused_linear_distillation_loss(
        *leaves, inputs["teacher_hidden"], inputs["teacher_head"], labels, vocab_size=VOCAB, divergence=name
    )
    result.loss.backward()
    assert result.loss.item() == 0
    assert leaves[0].grad.shape == (0, 8)
    assert (leaves[1].grad == 0).all()


def test_one_row_and_labels_all_masked():
    for rows in (1, 5):
        inputs, _ = make_inputs(rows=rows)
        labels = torch.full((rows,), -100)
        settings = {"kd_weight": 0.4, "temperature": 1.0, "divergence": "forward_kl"}
        expected, (gradient, _) = oracle_and_gradients(inputs, labels, **settings)
        hidden = inputs.pop("student_hidden").requires_grad_()
        result = fused_linear_distillation_loss(hidden, *inputs.values(), labels, vocab_size=VOCAB, **settings)
        result.loss.backward()
        assert result.ce.item() == 0
        assert result.loss.item() == pytest.approx(expected, rel=1e-12)
        assert relative(hidden.grad, gradient) < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_give_finite_gradients(name):
    """One-hot distributions far apart, whose small probabilities underflow in float32."""
    hidden, head = torch.eye(4) * 200, torch.eye(4)
    student_hidden, student_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    result = fused_linear_distillation_loss(
        student_hidden, student_head, hidden.flip(0), head, torch.arange(4), divergence=name
    )
    result.loss.backward()
    assert result.loss.isfinite()
    assert student_hidden.grad.isfinite().all()
    assert student_head.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_equal_student_and_teacher_in_bf16_have_no_negative_divergence(name):
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16).bfloat16(), torch.randn(500, 16).bfloat16()
    result = fused_linear_distillation_loss(hidden, head, hidden, head, torch.zeros(50).long(), divergence=name)
    assert abs(result.kd.item()) < 50 * 1e-6
    assert result.agreement.item() == 50


def test_differently_padded_heads_give_the_same_update():
    inputs, labels = make_inputs(student_rows=VOCAB, teacher_rows=VOCAB)
    gradients = []
    for student_rows, teacher_rows in ((35, 35), (40, 64), (64, 40)):
        garbage = torch.full((64, 8), 7.0).double()
        head = torch.cat([inputs["student_head"], garbage])[:student_rows].requires_grad_()
        teacher_head = torch.cat([inputs["teacher_head"], garbage[:, :6]])[:teacher_rows]
        result = fused_linear_distillation_loss(
            inputs["student_hidden"], head, inputs["teacher_hidden"], teacher_head, labels, vocab_size=VOCAB
        )
        result.loss.backward()
        gradients.append(head.grad[:VOCAB])
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_a_global_divisor_makes_chunks_of_a_batch_add_up_to_the_batch():
    inputs, labels = make_inputs()
    whole = fused_linear_distillation_loss(*inputs.values(), labels, vocab_size=VOCAB).loss
    parts = sum(
        fused_linear_distillation_loss(
            inputs["student_hidden"][part], inputs["student_head"], inputs["teacher_hidden"][part],
            inputs["teacher_head"], labels[part], vocab_size=VOCAB, num_items=torch.tensor(ROWS),
        ).loss
        for part in (slice(0, 3), slice(3, 11))
    )  # fmt: skip
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)


def test_cpu_autocast_leaves_the_products_in_float32():
    inputs, labels = make_inputs(torch.float32)
    plain = fused_linear_distillation_loss(*inputs.values(), labels, vocab_size=VOCAB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = fused_linear_distillation_loss(*inputs.values(), labels, vocab_size=VOCAB)
    assert torch.equal(plain.loss, under_autocast.loss)


@pytest.mark.parametrize("combination", ["mixture", "sum"])
def test_products_of_both_sides_are_in_the_dtype_of_autocast(product_dtypes, combination):
    inputs, labels = make_inputs(torch.float32)
    hidden, weight = inputs["student_hidden"].requires_grad_(), inputs["student_head"].requires_grad_()
    teacher = TeacherSignal(inputs["teacher_hidden"], Head(inputs["teacher_head"]), 0.5)
    signal = combined([teacher] * 2, combination)
    signal.loss(hidden, Head(weight), labels, Objective(vocab_size=VOCAB)).loss.backward()
    assert product_dtypes == {8: {torch.float64}, 6: {torch.float64}}
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_no_gradient_is_computed_under_no_grad():
    inputs, labels = make_inputs(torch.float32)
    hidden = inputs.pop("student_hidden").requires_grad_()
    with torch.no_grad():
        result = fused_linear_distillation_loss(hidden, *inputs.values(), labels, vocab_size=VOCAB)
    assert not result.loss.requires_grad


def test_no_tensor_of_all_logits_is_ever_made():
    """The largest tensor that any operation returns is one chunk of logits, or the head's gradient."""
    torch.manual_seed(0)
    rows, vocab, chunk_size = 300, 1000, 16
    hidden, head = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    with Live() as live:
        loss = fused_linear_distillation_loss(
            hidden, head, hidden, head, torch.zeros(rows).long(), chunk_size=chunk_size
        ).loss
        loss.backward()
    assert live.largest <= chunk_size * vocab


@pytest.mark.parametrize("name", NAMES)
def test_three_chunks_of_logits_are_alive_at_most(name):
    """Those of both sides, and all that the element-wise part holds of its blocks, when it is not compiled."""
    torch.manual_seed(0)
    rows, vocab, chunk_size = 300, 1000, 128
    head = Head(torch.randn(vocab, 4, requires_grad=True), softcap=3.0)
    teacher = TeacherSignal(torch.randn(rows, 3), Head(torch.randn(vocab, 3), softcap=3.0))
    objective = Objective(divergence=name, temperature=2.0, chunk_size=chunk_size, compiled=False)
    with Live(vocab) as live:
        hidden = torch.randn(rows, 4, requires_grad=True)
        teacher.loss(hidden, head, torch.zeros(rows).long(), objective).loss.backward()
    assert live.most_bytes < 3 * chunk_size * vocab * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_high_temperature_leaves_the_digits_of_value_and_gradient(name):
    inputs, labels = make_inputs(torch.float32)
    settings = {**SETTINGS, "kd_weight": 1.0, "temperature": 1000.0, "divergence": name}
    expected, gradients = oracle_and_gradients(inputs, labels, **settings)
    leaves = [inputs["student_hidden"].requires_grad_(), inputs["student_head"].requires_grad_()]
    result = fused_linear_distillation_loss(
        *leaves, inputs["teacher_hidden"], inputs["teacher_head"], labels, vocab_size=VOCAB, **settings
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=2e-3)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative(leaf.grad, gradient) < 5e-3


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_ids_masked_by_a_bias_of_minus_infinity_leave_all_numbers_finite(name, masked, temperature):
    torch.manual_seed(0)
    bias = torch.zeros(20)
    bias[[3, 7]] = -torch.inf
    biases = {f"{side}_bias": bias for side in ("student", "teacher") if masked in (side, "both")}
    leaves = [torch.randn(5, 4, requires_grad=True), torch.randn(20, 4, requires_grad=True)]
    teacher = torch.randn(5, 3), torch.randn(20, 3)
    labels = torch.arange(5).masked_fill(torch.arange(5) == 3, 0)
    result = fused_linear_distillation_loss(
        *leaves, *teacher, labels, divergence=name, temperature=temperature, **biases
    )
    result.loss.backward()
    assert all(value.isfinite() for value in result[:6])
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    if masked == "both":
        keep = [i for i in range(20) if i not in (3, 7)]
        places = torch.tensor([keep.index(label) for label in labels.tolist()])
        rest = fused_linear_distillation_loss(
            leaves[0], leaves[1][keep], teacher[0], teacher[1][keep], places, divergence=name, temperature=temperature
        )
        assert result.kd.item() == pytest.approx(rest.kd.item(), rel=1e-5)
        assert result.student_entropy.item() == pytest.approx(rest.student_entropy.item(), rel=1e-5)


def test_a_second_backward_is_refused():
    inputs, labels = make_inputs(torch.float32)
    hidden = inputs.pop("student_hidden").requires_grad_()
    loss = fused_linear_distillation_loss(hidden, *inputs.values(), labels, vocab_size=VOCAB).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_gradient_follows_what_is_done_with_the_loss():
    inputs, labels = make_inputs()
    hidden = inputs.pop("student_hidden")
    gradients = []
    for factor in (1.0, -3.0):
        leaf = hidden.clone().requires_grad_()
        (factor * fused_linear_distillation_loss(leaf, *inputs.values(), labels, vocab_size=VOCAB).loss).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], -3 * gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_elementwise_part_equals_plain_torch(name):
    """On CUDA the element-wise part is compiled; here the same function is compiled for the CPU."""
    torch.manual_seed(0)
    student = Head(torch.empty(50, 4), logit_scale=0.5, softcap=3.0).with_product_dtype(torch.empty(1, 4))
    teacher = TeacherSignal(torch.empty(5, 4), Head(torch.empty(50, 4)))
    constants = loop.Constants(DIVERGENCE_TERMS[name], {}, 0.5, 0.5, 2.0)
    options = {
        "student": student,
        "step": teacher.step(5, 50, torch.device("cpu"), Objective()),
        "constants": constants,
    }
    labels = torch.tensor([3, -100, 7, 0, 49])
    for rows in (5, 3):
        logits = torch.randn(2, rows, 50)
        arguments = (labels[:rows], torch.rand(rows))
        plain, compiled = logits[0].clone(), logits[0].clone()
        expected = loop._differentiate_(plain, *arguments, logits[1].clone(), **options)
        found = loop._compiled_differentiate_()(compiled, *arguments, logits[1].clone(), **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_cuda_equals_the_float64_formula(name, dtype):
    inputs, labels = make_inputs(dtype)
    settings = {**SETTINGS, "temperature": 2.0, "divergence": name}
    expected, gradients = oracle_and_gradients(inputs, labels, **settings)
    inputs = {key: value.cuda() for key, value in inputs.items()}
    leaves = [inputs["student_hidden"].requires_grad_(), inputs["student_head"].requires_grad_()]
    settings["token_weights"] = settings["token_weights"].cuda()
    result = fused_linear_distillation_loss(
        *leaves, inputs["teacher_hidden"], inputs["teacher_head"], labels.cuda(), vocab_size=VOCAB, **settings
    )
    result.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert result.loss.item() == pytest.approx(expected, rel=tolerance)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative(leaf.grad.cpu(), gradient) < tolerance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kd_weight": 1.5}, "kd_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"divergence": "kl"}, "choose one of"),
        ({"divergence_params": {"beta": 1}}, "no parameters"),
        ({"vocab_size": 38}, "teacher_head, which has 37 rows"),
        ({"vocab_size": None}, "pass vocab_size"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"token_weights": torch.ones(3)}, "token_weights has 3 rows"),
        ({"student_hidden": torch.randn(11, 9)}, "student_hidden has to be"),
        ({"labels": torch.zeros(4).long()}, "labels has 4 rows"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(change, message):
    inputs, labels = make_inputs(torch.float32)
    arguments = {**inputs, "labels": labels, "vocab_size": VOCAB, **change}
    with pytest.raises(ValueError, match=message):
        fused_linear_distillation_loss(**arguments)
