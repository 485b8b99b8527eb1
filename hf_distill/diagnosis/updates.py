"""Losses and gradients of the trainer on the rows of the probe, without anything of the run being changed.

Shapes: B rows of a batch, N label-bearing positions.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_distill.diagnosis.probe import Probe, columns_of
from hf_distill.modeling import label_positions
from hf_distill.teachers.columns import take_columns

Batch = dict[str, Any]


def trained(probe: Probe) -> list[nn.Parameter]:
    """The parameters that are trained: the student's, and those of projectors."""
    modules: tuple[nn.Module, ...] = (probe.trainer.model, probe.trainer.projectors)
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return [*found.values()]


def num_labels(batches: Sequence[Batch]) -> int:
    """The label-bearing tokens of batches."""
    return sum(len(label_positions(batch["labels"])[0]) for batch in batches)


def loss_of(probe: Probe, batch: Batch, num_items: int) -> Tensor:
    """The trainer's loss of a batch: its share of the mean over `num_items` tokens."""
    trainer = probe.trainer

    def model(**inputs: Any) -> Any:
        # accelerate puts mixed precision around the student's forward when a run begins, and around nothing else.
        with trainer.trying_out():
            return trainer.model(**inputs)

    items = torch.tensor(num_items, device=trainer.args.device)
    return trainer.compute_loss(model, dict(batch), num_items_in_batch=items)


def backward(probe: Probe, batches: Sequence[Batch]) -> float:
    """Adds the gradient of the mean over all batches, as of one update; returns the loss."""
    total, number = 0.0, num_labels(batches)
    for batch in batches:
        loss = loss_of(probe, batch, number)
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_loss(probe: Probe, batches: Sequence[Batch]) -> float:
    """The mean loss of batches, in nats per label-bearing token."""
    number = num_labels(batches)
    return sum(loss_of(probe, batch, number).item() for batch in batches)


def gradient(probe: Probe, batches: Sequence[Batch]) -> list[Tensor | None]:
    """The gradient of the mean over all batches for each of the [`trained`] parameters, on the CPU."""
    _zero_grad(probe)
    backward(probe, batches)
    return _taken(probe)


def _zero_grad(probe: Probe) -> None:
    probe.trainer.model.zero_grad()
    probe.trainer.projectors.zero_grad()


def _taken(probe: Probe) -> list[Tensor | None]:
    """The gradients as copies on the CPU; the parameters have none afterwards."""
    found = [p.grad if p.grad is None else p.grad.to("cpu", copy=True) for p in trained(probe)]
    _zero_grad(probe)
    return found


def difference(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """|one - other| / |other| of two gradients; None is zero."""
    pairs = zip(one, other, strict=True)
    gaps = (x if y is None else y if x is None else x.float() - y.float() for x, y in pairs)
    apart, size = (math.hypot(*(x.float().norm().item() for x in side if x is not None)) for side in (gaps, other))
    return apart / max(size, 1e-30)


def micro_rows(probe: Probe) -> int:
    """The rows of a micro-batch: the run's own, or, on a CPU with large models, two."""
    return min(probe.args.per_device_train_batch_size, max(2, probe.affordable(probe.trainer.train_dataset, 1 / 8)))


def micro_batches(probe: Probe, size: int) -> Iterator[Batch]:
    """Batches as the training has them; texts alone if a CPU has no time for rows of many texts."""
    dataset = probe.trainer.train_dataset
    is_joined = not probe.writes and "seq_lengths" in columns_of(dataset)
    return probe.batches(size, packed=not is_joined or probe.affordable(dataset, 1 / 8) >= min(2, len(dataset)))


class FirstGradient(NamedTuple):
    """The gradient of the first rows of the training, as of one update."""

    batches: list[Batch]
    values: list[Tensor | None]  # for each of the trained parameters, on the CPU
    seconds: float  # of the forwards and backwards
    parts: list[float]  # of these, the seconds of each call to the teachers and of each loss


def first_gradient(probe: Probe, number: int = 1) -> FirstGradient:
    """The gradient of the first `number` micro-batches; what several checks ask for is computed once."""
    if probe.first is None or len(probe.first.batches) != number:
        probe.first = None  # before the next one takes memory
        probe.first = _first_gradient(probe, number)
    return probe.first


def _first_gradient(probe: Probe, number: int) -> FirstGradient:
    batches = list(islice(micro_batches(probe, micro_rows(probe)), number))
    device = probe.trainer.args.device
    with measured(probe.trainer, "teacher_signal", "distillation_terms") as parts:
        if device.type == "cuda":  # the first one compiles
            backward(probe, batches[:1])
            parts.clear()
        _zero_grad(probe)
        begin = now(device)
        backward(probe, batches)
        seconds = now(device) - begin
    return FirstGradient(batches, _taken(probe), seconds, parts)


def single_rows(batch: Batch) -> list[Batch]:
    """A batch of generated text as batches of one row; what is flat over label-bearing positions is split by row."""
    rows, flat = batch["input_ids"].shape[0], len(label_positions(batch["labels"])[0])
    counts = [len(label_positions(batch["labels"][i : i + 1])[0]) for i in range(rows)]
    by_row = ("input_ids", "attention_mask", "labels")
    parts: dict[str, Sequence[Any]] = {}
    for name, value in batch.items():
        if name in by_row:
            parts[name] = value.split(1)
        elif isinstance(value, Tensor) and len(value) == flat:
            parts[name] = value.split(counts)
        else:
            parts[name] = [value] * rows
    return [{name: part[i] for name, part in parts.items()} for i in range(rows)]


@contextmanager
def training(probe: Probe) -> Iterator[None]:
    """Train mode without dropout: what the trainer computes in an update, twice the same."""
    model = probe.trainer.model
    was_training, changed = model.training, []
    for module in model.modules():
        names = {name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)}
        names |= {"p"} if isinstance(module, nn.Dropout) else set()
        changed += [(module, name, getattr(module, name)) for name in names]
    try:
        for module, name, _ in changed:
            setattr(module, name, 0.0)
        model.train()
        with probe.trainer.projectors.attached(probe.trainer.student):
            yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        model.train(was_training)


@contextmanager
def replaced(trainer: Any, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """A trainer with other methods while it lasts."""
    before = {name: value for name, value in vars(trainer).items() if name in methods}
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(trainer)[name]
        vars(trainer).update(before)


@contextmanager
def measured(trainer: Any, *names: str) -> Iterator[list[float]]:
    """The seconds of each call of these methods of the trainer; a trainer without teachers has none of them."""
    seconds: list[float] = []
    device = trainer.args.device

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = now(device)
            found = method(*args)
            seconds.append(now(device) - begin)
            return found

        return call

    with replaced(trainer, {name: timed(getattr(trainer, name)) for name in names if hasattr(trainer, name)}):
        yield seconds


def now(device: torch.device) -> float:
    """The time in seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def asked_once(probe: Probe) -> Iterator[None]:
    """Within it the teachers are asked about each batch once: what they say does not depend on the student's weights.

    Terms of inner layers need signals that are too large to be kept, and the memory of an accelerator is for the run:
    there the teachers are asked each time.
    """
    trainer, answers = probe.trainer, {}
    if not hasattr(trainer, "teachers") or trainer.terms or trainer.args.device.type != "cpu":
        yield
        return
    ask = trainer.teacher_signal

    def remembered(inputs: dict[str, Any], positions: Tensor) -> Any:
        ids = inputs["input_ids"]
        if id(ids) in answers:
            take_columns(inputs)
        else:
            answers[id(ids)] = ids, ask(inputs, positions)  # with the ids, so that no other tensor gets their number
        return answers[id(ids)][1]

    with replaced(trainer, {"teacher_signal": remembered}):
        yield


@contextmanager
def weights_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restores parameters afterwards, in place, and drops their gradients; the copies are in the host's memory."""
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
