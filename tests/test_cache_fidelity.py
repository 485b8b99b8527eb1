"""The benchmark of stored teachers: angles that are known, and gradients against autograd on the library's losses.

Shapes: n positions, V vocabulary.
"""

import json
import math

import pytest
import torch

from benchmarks import cache_fidelity, gradient_angles
from benchmarks.cache_fidelity import EXACT, main
from benchmarks.gradient_angles import OBJECTIVE, compare, head_gradients, parameter_gradients
from benchmarks.stored_targets import (
    Sizes,
    draws_for,
    make_stores,
    sizes_for,
    squared_error,
    write_multinomial,
    write_renormalised,
    write_threshold,
    write_top_k,
)
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.sparse import SparseSignal
from hf_distill.modeling import head_of, last_hidden_states
from tests.conftest import SENTENCES, make_model

VOCAB = 64
# Stores of the whole vocabulary: only the rounding to float16 is left.
WHOLE = {
    "threshold": lambda logits: write_threshold(logits, VOCAB, 0),
    "top-k renormalised": lambda logits: write_renormalised(logits, VOCAB),
    "top-k with its tail": lambda logits: write_top_k(logits, VOCAB),
}


@pytest.fixture(scope="module")
def pair():
    """A student, a teacher's signal, the teacher's logits (n, V), and rows."""
    student, teacher = (make_model(vocab_size=VOCAB, seed=seed) for seed in (1, 2))
    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = last_hidden_states(teacher, input_ids=ids)[:, :-1].flatten(0, 1)
        logits = head_of(teacher).logits(hidden)
    return student, TeacherSignal(hidden, head_of(teacher)), logits, ids


def test_angles_and_errors_are_those_of_hand_made_gradients():
    one = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0]])]
    found = compare([torch.tensor([0.0, 0.0]), torch.tensor([[4.0]])], one)
    assert found == pytest.approx({"angle": 90.0, "error": 5 / 3})
    assert compare([2 * x for x in one], one) == pytest.approx({"angle": 0.0, "error": 1.0})


def test_small_angles_have_all_their_digits():
    exact, small = torch.ones(10_000), 1e-5
    gradient = exact.clone()
    gradient[::2] += small  # half of the numbers are 1 + s: the sine is s / 2 to first order
    assert compare([gradient], [exact])["angle"] == pytest.approx(math.degrees(small / 2), rel=1e-2)


@pytest.mark.parametrize("name", WHOLE)
def test_stores_of_the_whole_vocabulary_have_the_gradient_of_full_distillation(pair, name):
    student, exact, logits, ids = pair
    signals = {EXACT: exact, name: WHOLE[name](logits).signal}
    found = {key: gradient for key, gradient, _ in parameter_gradients(student, ids, signals)}
    assert compare(found[name], found[EXACT])["angle"] < 0.05
    few = make_stores({2: Sizes(0.3, 2, 2)}).values()
    for store in few:
        signals = {EXACT: exact, name: store(logits, 0).signal}
        found = {key: gradient for key, gradient, _ in parameter_gradients(student, ids, signals)}
        assert compare(found[name], found[EXACT])["angle"] > 1


def test_gradients_of_all_parameters_are_those_of_a_dense_loss(pair):
    student, exact, logits, ids = pair
    ((_, gradient, kd),) = parameter_gradients(student, ids, {EXACT: exact})
    log_probs = student(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    loss = torch.nn.functional.kl_div(log_probs, logits.log_softmax(-1), log_target=True, reduction="sum")
    assert kd == pytest.approx(loss.item(), rel=1e-5)
    assert compare(gradient, torch.autograd.grad(loss, list(student.parameters())))["error"] < 1e-5


def test_gradients_of_the_head_are_those_of_the_losses(pair, monkeypatch):
    student, exact, logits, ids = pair
    monkeypatch.setattr(gradient_angles, "CHUNK", 7)  # which does not divide the 24 positions
    stores = make_stores({3: Sizes(0.2, 4, 3)})
    signals = {EXACT: exact} | {name: store(logits, 0).signal for name, store in stores.items()}
    hidden = last_hidden_states(student, input_ids=ids)[:, :-1].flatten(0, 1).detach()
    found = head_gradients(hidden, head_of(student), signals)
    assert set(found) == set(signals)
    for name, signal in signals.items():
        weight = head_of(student).weight.detach().requires_grad_()
        head = head_of(student)._replace(weight=weight)
        signal.loss(hidden, head, ids[:, 1:].flatten(), OBJECTIVE).loss.backward()
        assert compare([found[name]], [weight.grad])["error"] < 1e-5, name


def test_squared_errors_are_those_of_dense_targets(pair):
    logits = pair[2]
    probs = logits.softmax(-1)
    for name, store in make_stores({3: Sizes(0.2, 4, 3)}).items():
        stored = store(logits, 0)
        signal = stored.signal
        weights = signal.weights if isinstance(signal, SparseSignal) else signal.log_probs.exp()
        dense = torch.zeros_like(probs).scatter_add_(-1, signal.ids.long(), weights)
        expected = (dense - probs).double().square().sum().item()
        assert squared_error(stored, probs, probs.double().square().sum().item()) == pytest.approx(
            expected, rel=1e-4
        ), name


def test_draws_of_a_uniform_distribution_are_those_of_the_closed_form():
    number = draws_for(torch.zeros(2, VOCAB), 12)
    different = [VOCAB * (1 - (1 - 1 / VOCAB) ** n) for n in (number - 1, number)]
    assert different[0] < 12 <= different[1]


def test_sizes_lead_to_equal_entries_and_equal_bytes(pair):
    logits = 4 * pair[2].repeat(20, 1)
    tau, num_draws, num_likeliest = sizes_for(logits, 10)
    fixed, one_tau = write_threshold(logits, 10, 0), write_threshold(logits, 255, 0, tau=tau)
    drawn, likeliest = write_multinomial(logits, num_draws, 0), write_top_k(logits, num_likeliest)
    assert fixed.num_entries == 10 * len(logits)
    assert one_tau.num_entries == pytest.approx(fixed.num_entries, rel=0.05)
    assert drawn.num_entries == pytest.approx(fixed.num_entries, rel=0.05)
    assert likeliest.num_bytes == pytest.approx(fixed.num_bytes, rel=0.1)


def test_a_run_writes_its_table_and_picture_and_goes_on_from_its_folder(folder, tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(SENTENCES * 5)))
    arguments = [
        *("--teacher", str(folder / "teacher"), "--text", str(text), "--folder", str(tmp_path / "run"), "--drop", "0"),
        *("--sizes", "4", "--rows", "2", "--length", "17", "--blocks", "2", "--head-blocks", "3", "--markdown"),
    ]
    main([*arguments, "--picture", str(tmp_path / "picture.png")])
    first = capsys.readouterr().out
    assert first.count("| threshold") == 2
    assert "head, 96" in first  # 3 blocks of 2 rows with 16 label-bearing tokens
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_):
        raise AssertionError("measured twice")

    for name in ("parameter_gradients", "head_gradients", "last_hidden_states", "sizes_for"):
        monkeypatch.setattr(cache_fidelity, name, refuse)
    main(arguments)
    assert capsys.readouterr().out == first
    with pytest.raises(ValueError, match="take another folder"):
        main([*arguments, "--seed", "1"])
