"""TokenMeans: every token counts the same, and nothing is read before it is asked for."""

import pytest
import torch

from hf_distill.metrics import TokenMeans


def test_mean_is_over_tokens_and_not_over_batches():
    torch.manual_seed(0)
    batches = [torch.rand(size) for size in (1, 7, 100)]
    means = TokenMeans()
    for batch in batches:
        means.add(len(batch), value=batch.sum(), square=batch.square().sum())
    everything = torch.cat(batches)
    found = means.pop()
    assert found["value"] == pytest.approx(everything.mean().item(), rel=1e-6)
    assert found["square"] == pytest.approx(everything.square().mean().item(), rel=1e-6)
    assert set(found) == {"value", "square"}


def test_reading_starts_afresh():
    means = TokenMeans()
    means.add(2, value=torch.tensor(10.0))
    assert means.pop() == {"value": 5.0}
    assert means.pop() == {}
    means.add(1, value=torch.tensor(3.0))
    assert means.pop() == {"value": 3.0}


def test_no_token_gives_no_mean_instead_of_nan():
    means = TokenMeans()
    means.add(0, value=torch.tensor(0.0))
    assert means.pop() == {}


def test_small_values_survive_beside_a_large_sum():
    means = TokenMeans()
    means.add(1, value=torch.tensor(1e8))
    for _ in range(1000):
        means.add(1, value=torch.tensor(1.0))
    assert means.pop()["value"] == pytest.approx((1e8 + 1000) / 1001, rel=1e-12)


def test_processes_are_reduced_once_into_the_mean_over_all_tokens():
    mine, theirs = TokenMeans(), TokenMeans()
    mine.add(3, kd=torch.tensor(6.0), ce=torch.tensor(3.0))
    theirs.add(1, kd=torch.tensor(10.0), ce=torch.tensor(5.0))
    totals = []
    theirs.pop(lambda total: totals.append(total) or total)
    calls = []

    def reduce(total):
        calls.append(total)
        return total + totals[0]

    assert mine.pop(reduce) == {"kd": 4.0, "ce": 2.0}
    assert len(calls) == 1


def test_a_process_without_tokens_still_takes_part():
    means = TokenMeans()
    means.add(0, value=torch.tensor(0.0))
    assert means.pop(lambda total: total + torch.tensor([2.0, 8.0])) == {"value": 4.0}


def test_adding_keeps_no_graph_and_does_not_touch_the_tensor():
    value = torch.tensor(2.0, requires_grad=True)
    means = TokenMeans()
    means.add(torch.tensor(4), value=value * 3)
    assert not any(total.requires_grad for total in means._sums.values())
    means.add(4, value=value)
    assert value.item() == 2.0
    assert means.pop() == {"value": 1.0}


def test_adding_reads_nothing_back_to_python(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: reads.append(name))
    means = TokenMeans()
    means.add(torch.tensor(3), value=torch.tensor(1.0))
    means.add(torch.tensor(3), value=torch.tensor(1.0))
    assert reads == []
