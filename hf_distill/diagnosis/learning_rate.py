"""A probe of the learning rate: some updates at a tenth of it, at it, and at ten times of it; nothing stays changed."""

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.probe import Probe
from hf_distill.diagnosis.updates import (
    Batch,
    asked_once,
    backward,
    first_gradient,
    mean_loss,
    micro_batches,
    micro_rows,
    trained,
    training,
    weights_kept,
)

FACTORS = (0.1, 1.0, 10.0)
UPDATES, FEWEST = 8, 2  # at each rate
SECONDS = 20.0  # for all of them, about
MOST_ROWS = 32  # of an update
# The loss at which updates have done harm, as a part of the loss before them.
HARM = 1.05
SMALLEST = 0.001  # nats; a loss may be 0 or, of a sample, below
# A run that would lower the loss by less than this part of it, if each update did what those of the probe do.
LITTLE = 0.02


def learning_rate(probe: Probe) -> Finding:
    """The loss after some updates at three rates, from the same weights, on the rows of the probe.

    The rate rises from update to update, as in a warm-up. If it does harm even so, it does more in the run.
    """
    rate, updates = probe.args.learning_rate, _updates(probe)
    if not updates:
        raise LeftOut("the probe has no rows for an update")
    parameters = trained(probe)
    with training(probe), asked_once(probe):
        first = first_gradient(probe, len(updates[0]))
        updates[0] = first.batches  # so that the first update and the losses share one answer of the teachers
        there_is_time_for = min(UPDATES, int(SECONDS / len(FACTORS) / max(first.seconds, 1e-6)))
        # One update does not overshoot. Without the time for more, a second one is made on the same rows.
        updates, number = updates[: max(1, there_is_time_for)], max(FEWEST, there_is_time_for)
        batches = [batch for update in updates for batch in update]
        before = mean_loss(probe, batches)
        after = {}
        for factor in FACTORS:
            with weights_kept(parameters):
                _train(probe, updates, number, rate * factor, first.values)
                after[factor] = mean_loss(probe, batches)
    probe.first = None  # as large as what is trained
    numbers = {
        "rates": [rate * factor for factor in FACTORS], "before": before, "after": [after[f] for f in FACTORS],
        "updates": number, "planned": probe.updates,
    }  # fmt: skip
    changes = ", ".join(f"{after[factor]:.4g} at {rate * factor:.1g}" for factor in FACTORS)
    line = f"{number} updates take the loss from {before:.4g} to {changes}"
    if not math.isfinite(after[1.0]):
        return failure(f"{line}: the run diverges", f"lower learning_rate ({rate:g})", **numbers)
    if after[1.0] - before > (HARM - 1) * max(abs(before), SMALLEST) and after[0.1] < after[1.0]:
        return warning(
            f"{line}: the rate does harm", f"lower learning_rate ({rate:g}) to {rate / 10:.1g} or less", **numbers
        )
    # As if each update of the run did as much as the first ones, at the full rate.
    planned, fall = probe.updates, None
    if planned is not None and before > 0:  # it is 0 if both sides are the same
        fall = (before - after[1.0]) / before / sum(_ramp(number)) * max(planned, number)
    numbers["fall"] = fall
    if fall is not None and fall < LITTLE and after[10.0] <= after[1.0]:
        return warning(
            f"{line}: in {planned:,} updates the loss would fall by about {max(fall, 0):.1%}",
            f"raise learning_rate ({rate:g}), or train for longer", **numbers,
        )  # fmt: skip
    return ok(line, **numbers)


def _updates(probe: Probe) -> list[list[Batch]]:
    """The micro-batches of each update, as many of them as the probe has rows for."""
    size, most = micro_rows(probe), probe.affordable(probe.trainer.train_dataset, 1 / 8)
    rows = min(size * probe.args.gradient_accumulation_steps, max(size, MOST_ROWS), most)
    batches = micro_batches(probe, size)
    return list(islice(iter(lambda: list(islice(batches, max(1, rows // size))), []), UPDATES))


def _ramp(number: int) -> list[float]:
    """The parts of the full rate at which the updates are made."""
    return [(index + 1) / number for index in range(number)]


def _train(
    probe: Probe, updates: Sequence[list[Batch]], number: int, rate: float, first: Sequence[Tensor | None]
) -> None:
    """Some updates with a fresh optimizer of the trainer's own kind, at a rate that rises to `rate`.

    The first one is the same at all rates: its gradient is given.
    """
    trainer = probe.trainer
    trainer.optimizer = None
    optimizer = trainer.create_optimizer()
    peaks = [group["lr"] * rate / max(probe.args.learning_rate, 1e-30) for group in optimizer.param_groups]
    parameters = trained(probe)
    for index, part in enumerate(_ramp(number)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * part
        optimizer.zero_grad()
        if index == 0:
            for parameter, value in zip(parameters, first, strict=True):
                parameter.grad = None if value is None else value.to(parameter.device, copy=True)
        else:
            backward(probe, updates[index % len(updates)])
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)
        optimizer.step()
    trainer.optimizer = None
