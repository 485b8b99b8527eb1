"""Live bytes and FLOPs of code on fake tensors, against what is known of plain operations."""

import pytest
import torch

from hf_distill.planning.ledger import GRADIENTS, LiveBytes
from hf_distill.planning.models import no_memory
from tests.planning.peaks import peak_of


def test_storages_count_while_they_are_alive_and_views_do_not():
    with no_memory(), LiveBytes() as ledger:
        first = torch.empty(10, 10)
        view = first.t()[:5]
        second = first + 1
        assert ledger.live["other"] == 800
        del first
        assert ledger.live["other"] == 800  # the view keeps it
        del view
        assert ledger.live["other"] == 400
        del second
    assert ledger.live["other"] == 0
    assert ledger.peak.total == 800


def test_the_peak_says_what_was_alive_at_it():
    with no_memory(), LiveBytes() as ledger:
        with ledger.labelled("kept"):
            kept = torch.empty(100)
        with ledger.labelled("passing"):
            torch.empty(50)
        torch.empty(10)
    assert ledger.peak.parts == {"kept": 400, "passing": 200}
    del kept


def test_what_is_freed_after_the_backward_is_what_autograd_kept():
    with no_memory():
        x, weight = torch.empty(8, 16, requires_grad=True), torch.empty(16, 4, requires_grad=True)
        with LiveBytes() as ledger:
            ledger.add([x, weight], "weights")
            y = (x @ weight).exp().sum()  # exp keeps its result, (8, 4); the sum is a number
            assert ledger.live["other"] == 4 * 8 * 4 + 4
            y.backward()
            ledger.add([x.grad, weight.grad], GRADIENTS)
            assert ledger.live["other"] == 4 + 0
            assert ledger.live[GRADIENTS] == 4 * (8 * 16 + 16 * 4)
    assert ledger.flops["other"] == 3 * 2 * 8 * 16 * 4


def test_allocations_of_cuda_are_multiples_of_512_bytes():
    with no_memory(), LiveBytes(512) as ledger:
        kept = torch.empty(1), torch.empty(129)
        assert ledger.live["other"] == 512 + 1024
    del kept


HELD = []


def lone(x):
    return (2 * x).sum() + (3 * x).sum()


def expanded(x):
    return (2 * x).sum() + x.sum()


def held(x):
    doubled = (2 * x).sum()
    view = x.view(64, 1000)
    view.register_hook(HELD.append)
    return doubled + (3 * view).sum()


@pytest.mark.parametrize("loss_of", [lone, expanded, held], ids=lambda function: function.__name__)
def test_gradients_are_summed_in_place_where_real_ones_are(loss_of):
    with no_memory():
        x = torch.empty(1000, 64, requires_grad=True)
        with LiveBytes() as ledger:
            ledger.add([x], "weights")
            loss_of(x).backward()
    HELD.clear()
    real = torch.ones(1000, 64, requires_grad=True)
    measured = peak_of(lambda: loss_of(real).backward())
    HELD.clear()
    assert ledger.peak.total - x.nbytes == pytest.approx(measured, rel=0.001)
