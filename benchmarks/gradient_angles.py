"""Gradients of a student from several signals of one teacher, and the angles between them.

Shapes: n positions, R rows, T tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.losses.divergence import DIVERGENCE_TERMS, log_softmax
from hf_distill.losses.fused_linear import Head
from hf_distill.losses.loop import ChunkedSignal, Constants, Predictions
from hf_distill.losses.objective import Objective
from hf_distill.losses.sparse import SparseSignal
from hf_distill.modeling import head_of, last_hidden_states

OBJECTIVE = Objective(kd_weight=1.0, num_items=1, checked=True)  # sums: angles ask for no mean
CONSTANTS = Constants(DIVERGENCE_TERMS["forward_kl"], {}, 1.0, 0.0, 1.0)  # the same, for single steps
CHUNK = 128  # positions whose logits exist at a time in `head_gradients`


def compare(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """The `angle` in degrees between two gradients, and the `error`, |gradient - exact| / |exact|.

    In float64, and not from a cosine: that of a small angle is 1 to all digits of float32.
    """
    norms = [math.sqrt(sum(x.double().square().sum().item() for x in side)) for side in (gradient, exact)]
    distance = difference = 0.0
    for one, other in zip(gradient, exact, strict=True):
        one, other = one.double(), other.double()
        difference += (one - other).square().sum().item()
        distance += (one / norms[0] - other / norms[1]).square().sum().item()
    angle = math.degrees(2 * math.asin(min(1.0, math.sqrt(distance) / 2)))
    return {"angle": angle, "error": math.sqrt(difference) / norms[1]}


def parameter_gradients(
    student: PreTrainedModel, input_ids: Tensor, signals: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Tensor, ...], float]]:
    """For each signal its name, the gradient of all parameters, and its divergence, summed over rows (R, T)."""
    hidden = last_hidden_states(student, input_ids=input_ids)[:, :-1].flatten(0, 1)
    for name, signal in signals.items():
        found = signal.loss(hidden, head_of(student), input_ids[:, 1:].flatten(), OBJECTIVE)
        yield name, torch.autograd.grad(found.loss, list(student.parameters()), retain_graph=True), found.kd.item()


@torch.no_grad()
def head_gradients(hidden: Tensor, head: Head, signals: Mapping[str, ChunkedSignal]) -> dict[str, Tensor]:
    """For each signal the gradient (V, D) of its summed loss with respect to the weight of a student's plain head.

    All signals share the student's logits. The weights w of a sparse target sum to 1, and its gradient with respect to
    the logits is p - w. So all sparse targets share the sum of `p h^T`, and only a sparse product is left for each.

    Args:
        hidden (`torch.Tensor` of shape `(n, D)`): the student's.
    """
    vocab_size = len(head.weight)
    steps = {
        name: signal.step(len(hidden), vocab_size, hidden.device, OBJECTIVE)
        for name, signal in signals.items()
        if not isinstance(signal, SparseSignal)
    }
    gradients = {name: torch.zeros_like(head.weight) for name in steps}
    expected = torch.zeros_like(head.weight)  # the sum of p h^T
    buffer, ones = hidden.new_empty(CHUNK, vocab_size), hidden.new_ones(CHUNK)
    for start in range(0, len(hidden), CHUNK):
        chunk = slice(start, start + CHUNK)
        part = hidden[chunk]
        logits = head.logits(part)
        log_probs = log_softmax(logits)
        student = Predictions(logits, log_probs, log_probs.exp())
        if len(steps) < len(signals):
            expected.addmm_(student.probs.t(), part)
        for name, step in steps.items():
            inputs = step.inputs_(chunk, [buffer[: len(part)]] * step.num_buffers, CONSTANTS)
            gradient = step.differentiate_(student, inputs, ones[: len(part)], CONSTANTS).gradient
            gradients[name].addmm_(gradient.t(), part)
    for name, signal in signals.items():
        if isinstance(signal, SparseSignal):
            rows, columns = signal.weights.nonzero(as_tuple=True)
            places = torch.stack([signal.ids[rows, columns].long(), rows])
            weights = torch.sparse_coo_tensor(
                places, signal.weights[rows, columns], (vocab_size, len(hidden)), check_invariants=False
            )
            gradients[name] = expected - weights @ hidden
    return gradients
