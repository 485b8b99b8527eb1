"""Both sides' predictions on the rows of the probe, each side on its own view of them, summed up.

Shapes: N label-bearing positions of a batch, M of a teacher with another tokenizer, n in a chunk, V true vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_distill.diagnosis.findings import LeftOut
from hf_distill.diagnosis.probe import Probe
from hf_distill.losses.cross_tokenizer import AlignedSignal
from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head, default_chunk_size
from hf_distill.losses.objective import Objective, Signal
from hf_distill.losses.sparse import TopKSignal
from hf_distill.modeling import evaluating, head_of, last_hidden_states, select_positions
from hf_distill.teachers.columns import take_columns
from hf_distill.teachers.local import LocalTeacher

ENOUGH_LABELS = 500  # fewer say little about how frequent tokens are


class Forward(NamedTuple):
    """A batch, and the student's hidden states at its label-bearing positions."""

    inputs: dict[str, Any]  # of the whole batch, without labels
    positions: Tensor  # (N,)
    labels: Tensor  # (N,)
    hidden: Tensor  # (N, Ds)


@dataclass
class Sums:
    """Sums over label-bearing tokens. What is not known of a teacher stays None.

    Args:
        tokens, student (`int`, `float`): the student's label-bearing tokens, and their nats.
        teacher_tokens, teacher (*optional*): the same of the teacher's own view of the same text.
        kl, agreement, acceptance (*optional*): KL(teacher || student), equal most likely tokens, sum of min(p, q).
        ends (`list`): the teacher's probability of each end token that bears a label.
        labels: how often each token bears a label, for the teacher's own tokens.
        is_bound (`bool`): true if `kl` is a lower bound: of the teacher only the most likely tokens are known.
    """

    tokens: int = 0
    student: float = 0.0
    teacher_tokens: int = 0
    teacher: float | None = None
    kl: float | None = None
    agreement: float | None = None
    acceptance: float | None = None
    ends: list[float] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    is_bound: bool = False

    def add(self, **values: float) -> None:
        """Adds to sums; those that were not known begin."""
        for name, value in values.items():
            setattr(self, name, (getattr(self, name) or 0.0) + value)

    def guessed(self) -> float:
        """The nats of a label-bearing token for one who only knows how frequent tokens are."""
        total = sum(self.labels.values())
        return -sum(n * math.log(n / total) for n in self.labels.values()) / max(total, 1)

    @property
    def is_worse_than_a_guess(self) -> bool:
        """True if the teacher is; of few labels it is not known how frequent tokens are."""
        enough = self.teacher_tokens >= ENOUGH_LABELS
        return enough and self.teacher is not None and self.teacher > self.guessed() * self.teacher_tokens


def forwards(probe: Probe, size: int) -> Iterator[Forward]:
    """The student's forward over the rows of the probe, in batches of `size`."""
    trainer = probe.trainer
    for batch in probe.batches(size):
        inputs, positions, labels = trainer.take_labels(batch)
        own = dict(inputs)
        take_columns(own)
        own.pop("hard_labels", None)
        with torch.no_grad(), trainer.trying_out(), evaluating(trainer.student):
            hidden = select_positions(last_hidden_states(trainer.student, **own), positions)
        yield Forward(inputs, positions, labels, hidden)


def signals_of(probe: Probe, forward: Forward) -> dict[str, Signal]:
    """The signal of each teacher at a batch; [`LeftOut`] where each row has a teacher of its own."""
    if getattr(probe.args, "teacher_combination", "") == "route":
        raise LeftOut("each row has a teacher of its own, and the others are not asked about it")
    if probe.writes:  # who has read the text when it was written
        return {name: probe.trainer.teacher_signal(dict(forward.inputs), forward.positions) for name in probe.teachers}
    return {name: teacher(forward.inputs, forward.positions) for name, teacher in probe.teachers.items()}


def add_signal(sums: Sums, forward: Forward, signal: Signal, probe: Probe) -> None:
    """Adds what a teacher and the student say of a batch."""
    head, ends = head_of(probe.trainer.student), torch.tensor(sorted(probe.end_ids) or [-1])
    size = probe.trainer.vocab_size
    if isinstance(signal, TeacherSignal):
        _add_dense(sums, forward, signal, head, ends, size)
        return
    if isinstance(signal, AlignedSignal):
        _add_aligned(sums, forward, signal, head)
        return
    sums.add(student=_nats(head.truncated(size), forward.hidden, forward.labels).sum().item())
    sums.tokens += len(forward.labels)
    _count(sums, forward.labels)
    objective = Objective(kd_weight=1.0, vocab_size=size, checked=True)
    found = signal.loss(forward.hidden, head, forward.labels, objective)
    sums.add(kl=found.kd.item())
    if found.num_paired:
        sums.add(agreement=found.agreement.item())
    if isinstance(signal, TopKSignal):
        sums.is_bound = sums.is_bound or signal.ids.shape[1] < size
        log_probs = _of_entries(signal, forward.labels, size)
        sums.add(teacher=-log_probs.sum().item())
        sums.teacher_tokens += len(log_probs)
        sums.ends += log_probs[torch.isin(forward.labels.cpu(), ends)].exp().tolist()


def _add_dense(sums: Sums, forward: Forward, signal: TeacherSignal, head: Head, ends: Tensor, size: int) -> None:
    labels, device = forward.labels, forward.hidden.device
    chunk_size = default_chunk_size(device, size)
    student, teacher = head.truncated(size), signal.head.to(device).truncated(size)
    hidden = signal.hidden.to(device)
    for start in range(0, len(labels), chunk_size):
        part = slice(start, start + chunk_size)
        mine, theirs = (
            side.logits(states[part]).log_softmax(-1) for side, states in ((student, forward.hidden), (teacher, hidden))
        )  # (n, V) each
        target = labels[part].unsqueeze(-1)
        own = theirs.gather(-1, target).squeeze(-1)
        sums.add(
            student=-mine.gather(-1, target).sum().item(),
            teacher=-own.sum().item(),
            kl=DIVERGENCES["forward_kl"](mine, theirs).sum().item(),
            acceptance=torch.minimum(mine, theirs).exp().sum().item(),
            agreement=(mine.argmax(-1) == theirs.argmax(-1)).sum().item(),
        )
        sums.ends += own[torch.isin(labels[part], ends.to(device))].exp().tolist()
    sums.tokens += len(labels)
    sums.teacher_tokens += len(labels)
    _count(sums, labels)


def _add_aligned(sums: Sums, forward: Forward, signal: AlignedSignal, head: Head) -> None:
    """A teacher with another tokenizer: nats of the text that both sides are compared on, each in its own tokens."""
    spans, compared = signal.spans, signal.spans.student_groups >= 0
    sums.add(student=_nats(head, forward.hidden[compared], spans.student_tokens[compared]).sum().item())
    sums.add(teacher=_nats(signal.head, signal.hidden, spans.teacher_tokens).sum().item())
    sums.tokens += int(compared.sum())
    sums.teacher_tokens += len(spans.teacher_tokens)
    _count(sums, spans.teacher_tokens)


def _nats(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """The nats (N,) of labels (N,), chunk by chunk."""
    device = head.weight.device
    hidden, labels = hidden.to(device), labels.to(device)
    chunk_size = default_chunk_size(device, len(head.weight))
    chunks = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    found = [
        -head.logits(states).log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1) for states, target in chunks
    ]
    return torch.cat([hidden.new_zeros(0), *found])


def _of_entries(signal: TopKSignal, labels: Tensor, size: int) -> Tensor:
    """Log-probabilities (N,) of labels (N,); a token that is not among the K gets an equal share of the rest."""
    ids, log_probs, labels = signal.ids.cpu().long(), signal.log_probs.float().cpu(), labels.cpu()
    hit = ids == labels.unsqueeze(-1)  # (N, K)
    log_probs = log_probs.masked_fill(ids < 0, -torch.inf)
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=1e-9) / max(size - ids.shape[1], 1)
    return torch.where(hit.any(-1), log_probs.masked_fill(~hit, -torch.inf).amax(-1), rest.log())


def _count(sums: Sums, labels: Tensor) -> None:
    for token, number in zip(*(side.tolist() for side in labels.unique(return_counts=True)), strict=True):
        sums.labels[token] = sums.labels.get(token, 0) + number


def compared(probe: Probe) -> Mapping[str, Sums]:
    """The sums of each teacher, over all rows of the probe; computed once."""
    return probe.once(_compared)


def _compared(probe: Probe) -> dict[str, Sums]:
    if not probe.writes and probe.is_mislabelled:
        raise LeftOut("labels are not what the rows say (labels, padding)")
    found = {name: Sums() for name in probe.teachers}
    for forward in forwards(probe, probe.args.per_device_eval_batch_size):
        for name, signal in signals_of(probe, forward).items():
            add_signal(found[name], forward, signal, probe)
    if not any(sums.tokens for sums in found.values()):
        raise LeftOut("no row of the probe has a label")
    return found


def between(probe: Probe, one: LocalTeacher, other: LocalTeacher, num_batches: int) -> tuple[float, float, float]:
    """KL(one || other) in nats per token, and the nats per token of both, over some batches of all lengths."""
    size, totals, tokens = probe.trainer.vocab_size, torch.zeros(3, dtype=torch.float64), 0
    rows = probe.args.per_device_eval_batch_size
    every = max(1, probe.affordable(probe.rows) // (rows * num_batches))
    for batch in islice(probe.batches(rows), 0, every * num_batches, every):
        inputs, positions, labels = probe.trainer.take_labels(batch)
        mine, theirs = one(inputs, positions), other(inputs, positions)
        chunk_size = default_chunk_size(labels.device, size)
        for start in range(0, len(labels), chunk_size):
            part = slice(start, start + chunk_size)
            target = labels[part].unsqueeze(-1)
            p, q = (
                s.head.truncated(size).logits(s.hidden[part]).log_softmax(-1).to(target.device) for s in (mine, theirs)
            )
            totals += torch.stack(
                [DIVERGENCES["forward_kl"](q, p).sum(), -p.gather(-1, target).sum(), -q.gather(-1, target).sum()]
            ).cpu()
        tokens += len(labels)
    kl, first, second = (totals / max(tokens, 1)).tolist()
    return kl, first, second
