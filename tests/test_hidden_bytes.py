"""Hidden states as bytes: against the same numbers in float64, whatever their size, device and batch."""

import numpy as np
import pytest
import torch

from hf_distill.hidden_bytes import Rounding, choose_rounding, fidelity, folded_head, restore_hidden, round_hidden
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


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_hidden_states_that_are_not_finite_are_refused(value):
    hidden = random_hidden()
    hidden[[3, 5], 7] = value
    with pytest.raises(ValueError, match="not finite at 2 of 40 positions"):
        round_hidden(hidden, HALF)


def test_half_precision_loses_next_to_nothing():
    hidden = 3 * random_hidden()
    head = Head(random_hidden(300, seed=1), bias=torch.randn(300), logit_scale=0.5, softcap=20.0)
    rounding, loss = choose_rounding(hidden, head, "float16", vocab_size=290, seed=0)
    assert rounding.dtype == "float16"
    assert 0 <= loss["kl"] < 1e-6
    assert loss["kl"] <= loss["largest_kl"]
    assert loss["agreement"] == 1
    assert folded_head(head, rounding) is head
    assert loss == fidelity(hidden, head, rounding, vocab_size=290)
