"""Hidden states as bytes: against the same numbers in float64, whatever their size, device and batch."""

import numpy as np
import pytest
import torch

from hf_distill import hidden_bytes
from hf_distill.hidden_bytes import (
    CANDIDATES,
    Rounding,
    choose_rounding,
    fidelity,
    folded_head,
    random_rotation,
    restore_hidden,
    round_hidden,
)
from hf_distill.losses import head as losses_head
from hf_distill.losses.head import Head

HALF = Rounding("float16", "token")


def random_hidden(rows=40, width=48, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def restored(hidden, rounding, dtype=torch.float64):
    values, scales = round_hidden(hidden, rounding)
    assert values.dtype == rounding.dtype
    assert scales.dtype == np.float32
    return restore_hidden(torch.from_numpy(values), torch.from_numpy(scales), dtype)


@pytest.mark.parametrize("size", [1e-35, 1e-3, 1.0, 1e8, 1e36])
def test_half_precision_keeps_eleven_bits_of_any_size(size):
    hidden = size * random_hidden()
    hidden[:, 0] *= 40  # a massive activation
    found = restored(hidden, HALF)
    assert ((found - hidden.double()).abs() <= 2**-11 * hidden.double().abs() + 2**-40 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_half_precision_is_exact(dtype):
    hidden = random_hidden().to(dtype)
    hidden[:, 0] *= 2**8
    assert torch.equal(restored(hidden, HALF, dtype), hidden)


def test_a_position_of_zeros_stays_one():
    hidden = random_hidden()
    hidden[3] = 0
    for rounding in (HALF, Rounding("int8", "token")):
        values, scales = round_hidden(hidden, rounding)
        assert not values[3].any()
        assert scales[3] == 0
        assert np.isfinite(values[2]).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_hidden_states_that_are_not_finite_are_refused(value, dtype):
    hidden = random_hidden().double()
    hidden[[3, 5], 7] = value
    message = "not finite in float32 at 2 of 40 positions: load it in another dtype"
    with pytest.raises(ValueError, match=message):
        round_hidden(hidden, Rounding(dtype, "token"))
    with pytest.raises(ValueError, match=message):
        choose_rounding(hidden, Head(random_hidden(9).double()), dtype, vocab_size=9, seed=0)


def uneven_model(rows=400, vocab=300, width=48, dtype=torch.float32):
    """Hidden states with large channels and a direction that all share, and a head that looks at the small ones."""
    scale = torch.logspace(0, 1.5, width)
    hidden = random_hidden(rows, width) * scale + 3 * random_hidden(rows, 1, seed=1) * random_hidden(1, width, seed=2)
    weight = random_hidden(vocab, width, seed=3) / scale / 3
    return hidden.to(dtype), Head(weight.to(dtype), bias=random_hidden(vocab, 1, seed=4)[:, 0].to(dtype))


def balanced(hidden, head, vocab_size=300):
    rounding, _ = choose_rounding(hidden, head, "int8", vocab_size=vocab_size, seed=0)
    assert rounding.name == "balanced"
    return rounding


def true_fidelity(hidden, head, rounding, vocab_size):
    """Over positions one by one, in float64, of logits that are undone without the folded head."""
    stored = restored(hidden, rounding)
    if rounding.transform is not None:
        stored = torch.linalg.solve(rounding.transform.double().t(), stored.t()).t()
    head = Head(head.weight.double(), None if head.bias is None else head.bias.double(), *head[2:])
    t, s = (head.logits(x.double())[:, :vocab_size].softmax(-1) for x in (hidden, stored))
    kl = (t * (t / s).log()).sum(-1)
    centred = t - 1 / vocab_size, s - 1 / vocab_size
    return {
        "kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "angle": torch.cosine_similarity(*centred).clamp(max=1).acos().rad2deg().mean().item(),
        "agreement": (t.argmax(-1) == s.argmax(-1)).double().mean().item(),
    }


def test_half_precision_loses_next_to_nothing():
    hidden, head = uneven_model()
    head = head._replace(logit_scale=0.5, softcap=20.0)
    rounding, loss = choose_rounding(hidden, head, "float16", vocab_size=290, seed=0)
    assert rounding.dtype == "float16"
    assert 0 <= loss["kl"] < 1e-6
    assert loss["agreement"] == 1
    assert folded_head(head, rounding) is head


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)],
)
def test_the_folded_head_gives_the_logits_of_what_is_stored(dtype, tolerance):
    hidden, head = uneven_model(dtype=dtype)
    head = head._replace(logit_scale=0.5, softcap=20.0)
    rounding = balanced(hidden, head)
    folded = folded_head(head, rounding)
    assert folded.weight.dtype == dtype
    assert folded.weight.shape == head.weight.shape
    assert folded[1:] == head[1:]
    products = hidden.double() @ rounding.transform.double() @ folded.weight.double().t()
    expected = hidden.double() @ head.weight.double().t()
    assert (products - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_fidelity_is_that_of_every_position_by_itself(dtype, monkeypatch):
    hidden, head = uneven_model()
    head = head._replace(logit_scale=0.5, softcap=20.0)
    rounding = balanced(hidden, head)._replace(dtype=dtype)
    found = fidelity(hidden, head, rounding, vocab_size=290)
    expected = true_fidelity(hidden, head, rounding, 290)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-2, abs=1e-8)
    assert found["largest_kl"] == pytest.approx(expected["largest_kl"], rel=1e-2, abs=1e-7)
    assert found["angle"] == pytest.approx(expected["angle"], rel=1e-2, abs=1e-4)
    assert found["agreement"] == expected["agreement"]
    monkeypatch.setitem(losses_head.CHUNK_BYTES, "cpu", 4 * 4 * 290 * 7)  # chunks of 7 positions
    assert fidelity(hidden, head, rounding, vocab_size=290) == pytest.approx(found, rel=1e-4, abs=1e-9)


def test_the_rounding_with_the_smallest_divergence_is_taken():
    hidden, head = uneven_model()
    whole = hidden.div(hidden.abs().amax(-1, keepdim=True) / 127).round()  # of int8, but for a scale
    for states, best in ((hidden, "balanced"), (whole, "token")):
        rounding, loss = choose_rounding(states, head, "int8", vocab_size=300, seed=0)
        assert rounding.name == best
        assert loss == fidelity(states[1::2], head, rounding, vocab_size=300)
        for name, candidate in CANDIDATES["int8"].items():
            other = Rounding("int8", name, *candidate(states[::2], head, 0))
            assert loss["kl"] <= fidelity(states[1::2], head, other, vocab_size=300)["kl"]


def test_the_balanced_basis_reaches_the_smallest_cost_of_all_bases(monkeypatch):
    """tr(A^T C A) tr(A^-1 F A^-T) against its lower bound, with the F that automatic differentiation finds."""
    monkeypatch.setattr(hidden_bytes, "HIDDEN_SHRINKAGE", 1e-9)
    monkeypatch.setattr(hidden_bytes, "HESSIAN_SHRINKAGE", 1e-9)
    hidden, head = uneven_model(rows=60, vocab=40, width=12, dtype=torch.float64)
    hessian = torch.zeros(12, 12, dtype=torch.float64)
    for row in hidden[::2]:
        teacher = torch.log_softmax(head.weight @ row + head.bias, -1)

        def divergence(x, teacher=teacher):
            return (teacher.exp() * (teacher - torch.log_softmax(head.weight @ x + head.bias, -1))).sum()

        hessian += torch.autograd.functional.hessian(divergence, row) / 30
    moment = hidden[::2].t() @ hidden[::2] / 30
    basis = balanced(hidden, head, 40).transform.double()
    inverse = torch.linalg.inv(basis)
    cost = (basis.t() @ moment @ basis).trace() * (inverse @ hessian @ inverse.t()).trace()
    factor = torch.linalg.cholesky(moment)
    bound = torch.linalg.eigvalsh(factor.t() @ hessian @ factor).clamp(min=0).sqrt().sum().square()
    assert bound * (1 - 1e-5) <= cost <= bound * 1.001


def test_the_balanced_basis_loses_much_less_than_a_scale_per_position():
    hidden, head = uneven_model()
    _, loss = choose_rounding(hidden, head, "int8", vocab_size=300, seed=0)
    alone = fidelity(hidden[1::2], head, Rounding("int8", "token"), vocab_size=300)
    assert loss["kl"] < alone["kl"] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_position_do_not_depend_on_the_batch(dtype):
    hidden, head = uneven_model(rows=700, dtype=dtype)
    for rounding in (HALF, balanced(hidden, head), balanced(hidden, head)._replace(dtype="float16")):
        values, scales = round_hidden(hidden, rounding)
        for rows in (slice(0, 1), slice(3, 4), slice(255, 258), slice(100, 700), slice(0, 0)):
            found = round_hidden(hidden[rows], rounding)
            assert found[0].shape == (len(hidden[rows]), 48)
            np.testing.assert_array_equal(found[0], values[rows])
            np.testing.assert_array_equal(found[1], scales[rows])


@pytest.mark.parametrize("rows", [1, 2, 20, 400])
@pytest.mark.parametrize("kind", ["few tokens", "rank 2", "zeros", "channels without use"])
def test_heads_and_probes_without_full_rank_have_a_basis(rows, kind):
    hidden, head = uneven_model(rows, vocab=5 if kind == "few tokens" else 300)
    if kind == "rank 2":
        head = Head(head.weight[:, :2] @ random_hidden(2))
    elif kind == "zeros":
        hidden, head = torch.zeros_like(hidden), Head(torch.zeros_like(head.weight))
    elif kind == "channels without use":
        hidden[:, 5:20] = 0
        head.weight[:, 10:30] = 0
    transform, inverse = CANDIDATES["int8"]["balanced"](hidden, head, 0)
    torch.testing.assert_close(transform @ inverse.t(), torch.eye(48), atol=1e-4, rtol=0)
    assert torch.linalg.cond(transform.double()) < 1e3
    _, loss = choose_rounding(hidden, head, "int8", vocab_size=len(head.weight), seed=0)
    assert 0 <= loss["kl"] < 0.01


@pytest.mark.parametrize("width", [1, 2, 3, 48, 65])
def test_a_random_rotation_keeps_lengths_and_depends_on_the_seed(width):
    rotation = random_rotation(width, 0)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    assert rotation.abs().max() <= (2 / width) ** 0.5 + 1e-12
    assert torch.equal(rotation, random_rotation(width, 0))
    if width > 3:
        assert not torch.equal(rotation, random_rotation(width, 1))


def test_other_dtypes_and_empty_probes_are_refused():
    hidden, head = uneven_model(4)
    with pytest.raises(ValueError, match="stored in float16 or int8, got 'int4'"):
        choose_rounding(hidden, head, "int4", vocab_size=300, seed=0)
    with pytest.raises(ValueError, match="of some positions, got none"):
        choose_rounding(hidden[:0], head, "int8", vocab_size=300, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_rounds_as_the_cpu_does(dtype):
    hidden, head = uneven_model(dtype=dtype)
    device = torch.device("cuda")
    rounding, loss = choose_rounding(hidden.to(device), head.to(device), "int8", vocab_size=300, seed=0)
    assert loss == pytest.approx(fidelity(hidden[1::2], head, rounding, vocab_size=300), rel=0.1)
    values, scales = round_hidden(hidden.to(device), rounding)
    expected = round_hidden(hidden, rounding.to(torch.device("cpu")))
    assert (values != expected[0]).mean() < 1e-2
    np.testing.assert_allclose(scales, expected[1], rtol=1e-3)
    np.testing.assert_array_equal(round_hidden(hidden[7:9].to(device), rounding)[0], values[7:9])
