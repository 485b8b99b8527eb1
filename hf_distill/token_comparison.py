"""Student and teacher, token by token: the KL between their distributions, and the tokens that both find most likely.

`evaluate_fidelity` says how far a student is from its teacher; this says where. A report shows it (`page/`).

Shapes: N label-bearing positions of a batch, n of them in a chunk or a row, V vocabulary, K tokens that are shown.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.evaluation import batch_of, documents_of, groups_of, measuring, tokenized_rows, true_vocabulary
from hf_distill.losses.cross_tokenizer import AlignedSignal
from hf_distill.losses.divergence import DIVERGENCES, LOG_ZERO
from hf_distill.losses.fused_linear import MixtureSignal, TeacherSignal
from hf_distill.losses.head import default_chunk_size
from hf_distill.losses.sparse import SparseSignal, TopKSignal, coarse_outcomes, log_tail_of
from hf_distill.losses.sum import SumSignal
from hf_distill.modeling import (
    PictureSpans,
    causal_lm,
    head_of,
    input_device,
    label_positions,
    last_hidden_states,
    select_positions,
)
from hf_distill.picture_rows import pictures_of, small
from hf_distill.teachers import Signal, Teacher
from hf_distill.teachers.columns import PREFIX, has_label
from hf_distill.teachers.local import signal_of
from hf_distill.token_texts import token_texts

NUM_LIKELIEST = 5
MAX_ROWS, MAX_TOKENS = 200, 256
MAX_PICTURES = 4  # of a row

# What the KL of a token is, by what is known of the teacher there; None: it has none.
EXACT, ESTIMATE, LOWER_BOUND = "exact", "estimate", "lower bound"


class Side(NamedTuple):
    """The predictions of one side at n positions."""

    ids: np.ndarray  # (n, K), int64, the most likely token first; -1 where fewer are known
    probs: np.ndarray  # (n, K), float32, their probabilities; 0 where there is none
    own: np.ndarray  # (n,), float32, the probability of the token that follows; NaN where it is not known


class TokenRow(NamedTuple):
    """A row, or a document of a packed row, and what both sides say of its n label-bearing tokens."""

    number: int  # of the row in its data set, from 0
    input_ids: list[int]  # the first `max_tokens`
    length: int  # of the whole row, in tokens
    places: np.ndarray  # (n,), int64, of the label-bearing tokens in `input_ids`
    kl: np.ndarray  # (n,), float64, KL(teacher || student) in nats; NaN where it is not known
    student: Side
    teacher: Side
    pictures: tuple[str, ...] = ()  # of the row, the first 4, small: addresses that hold them ("data:image/png;...")
    num_pictures: int = 0  # of the row
    picture_places: tuple[int, ...] = ()  # of the tokens in `input_ids` that stand for pictures


class TokenComparison(NamedTuple):
    """Rows with what both sides say of their tokens."""

    rows: list[TokenRow]
    kl_is: str | None  # EXACT, ESTIMATE, LOWER_BOUND, or None: a token has no KL
    notes: list[str]  # what is missing, or else than usual, in sentences
    num_rows: int | None  # of the data set; None for a stream
    student_texts: Sequence[str | bytes]  # of every token id ([`token_texts`])
    teacher_texts: Sequence[str | bytes]  # the same ones unless the teacher has another tokenizer


class Said(NamedTuple):
    """A teacher's predictions at n positions, as tensors of the shapes of [`Side`], and the KL (n,)."""

    ids: Tensor
    probs: Tensor
    own: Tensor
    kl: Tensor


View = Callable[[Any, Tensor, Tensor, Tensor], Said]


def compare_tokens(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher | None,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    vocab_size: int | None = None,
    collator: Callable[[Any], dict[str, Any]] | None = None,
    spans: PictureSpans | None = None,
) -> TokenComparison:
    """The predictions of student and teacher at every label-bearing token of the first rows, and their distance.

    The numbers are those whose means `evaluate_fidelity` returns. A teacher that does not have all probabilities gives
    what it knows, and `notes` say the rest: a store of samples an estimate of the KL, a store of the most likely tokens
    a lower bound. With another tokenizer it has no KL for a token of the student, but its most likely tokens where both
    begin a token at the same place. Of a teacher whose signal is of another class nothing is known.

    Args:
        student (`PreTrainedModel`): may be a PEFT model.
        teacher (`PreTrainedModel` or [`~hf_distill.teachers.Teacher`], *optional*): a model of the same vocabulary, or
            `trainer.teacher`, with rows that the trainer has prepared. Without one, the student's side alone is known.
        dataset: rows as in `evaluate_fidelity`; `trainer.eval_dataset` has those of a trainer.
        tokenizer: the student's.
        batch_size (`int`): rows per forward.
        max_rows (`int`): rows that are looked at, from the first on.
        max_tokens (`int`): tokens of a row that are kept; whole rows are read.
        max_length (`int`, *optional*): as in `evaluate_fidelity`; for a teacher that is a model.
        vocab_size (`int`, *optional*): as in `evaluate_fidelity`.
        collator (`Callable`, *optional*):
            Makes batches of rows that have no tokens before, `trainer.collated` of rows with pictures; the teacher is
            that of the trainer then.
        spans ([`~hf_distill.modeling.PictureSpans`], *optional*):
            `trainer.picture_spans`: the tokens of a picture are one, and the picture stands beside its row.

    Raises:
        `ValueError`: what `evaluate_fidelity` refuses; no label-bearing token in these rows.
    """
    model = causal_lm(student)
    is_model = isinstance(teacher, PreTrainedModel | PeftModel)
    asked: Any = _ModelTeacher(teacher) if is_model else teacher if isinstance(teacher, Teacher) else _NoTeacher()
    models: Any = (student, teacher) if is_model else (student,)
    size = true_vocabulary(tokenizer, models, vocab_size)
    some = dataset.select(range(min(max_rows, len(dataset)))) if isinstance(dataset, Dataset) else dataset
    documents = (
        islice(filter(has_label, _documents(some, tokenizer, models, vocab_size, max_length)), max_rows)
        if collator is None
        else ({"number": number, "row": row} for number, row in enumerate(islice(some, max_rows)))
    )
    rows: list[TokenRow] = []
    kinds: set[type] = set()
    temperatures: set[float] = set()
    has_own_text = False
    with measuring(**dict(zip(("student", "teacher"), models, strict=False))):
        batches = (
            iter(lambda: list(islice(documents, batch_size)), []) if collator else groups_of(documents, batch_size)
        )
        for batch in batches:
            made = collator([row["row"] for row in batch]) if collator else {**batch_of(batch), **asked.collate(batch)}
            found, signal = _compared(model, asked, batch, made, size, max_tokens, spans)
            kinds.add(_kind(signal))
            temperatures |= {signal.temperature} if isinstance(signal, SparseSignal) else set()
            has_own_text = has_own_text or f"{PREFIX}input_ids" in batch[0]
            rows += found
    if not rows:
        raise ValueError("the first rows have no label-bearing token to compare; check their labels")
    kl_is = next((_KL_IS[kind] for kind in kinds if kind in _KL_IS), None)
    texts = token_texts(tokenizer)
    own_texts = token_texts(cast(Any, asked).tokenizer) if kinds == {AlignedSignal} else texts
    notes = [_NOTES[kind] for kind in kinds if kind in _NOTES] + [_OWN_TEXT] * has_own_text
    notes += [_TEMPERATURE.format(value) for value in temperatures - {1}]
    return TokenComparison(
        rows, kl_is, notes, len(dataset) if isinstance(dataset, Dataset) else None, texts, own_texts
    )  # fmt: skip


class _NoTeacher:
    """No teacher, as [`Teacher`]."""

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {}

    def __call__(self, inputs: dict[str, Any], positions: Tensor) -> None:
        return None


class _ModelTeacher:
    """A model as [`Teacher`], left as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = causal_lm(model)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {}

    def __call__(self, inputs: dict[str, Any], positions: Tensor) -> TeacherSignal:
        device = input_device(self.model)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return signal_of(self.model, head_of(self.model), inputs, positions.to(device), ())


def _documents(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    models: tuple[Any, ...],
    vocab_size: int | None,
    max_length: int | None,
) -> Iterable[dict[str, Any]]:
    """Tokenised rows with their number and the teacher's columns; of packed rows, their documents."""
    rows = tokenized_rows(dataset, tokenizer, models, vocab_size, "comparing tokens")
    for number, (row, tokens) in enumerate(rows):
        own = {name: value for name, value in row.items() if name.startswith(PREFIX)}
        for document in documents_of(tokens):
            cut = {name: ids[:max_length] for name, ids in document.items()}
            yield {**own, **cut, "number": number}


def _compared(
    model: PreTrainedModel, teacher: Any, rows: list[dict[str, Any]], made: dict[str, Any], size: int, max_tokens: int,
    spans: PictureSpans | None,
) -> tuple[list[TokenRow], Signal]:  # fmt: skip
    """The rows of a batch that was made of them, and the signal that the teacher gave."""
    device = input_device(model)
    whole = {name: tensor.to(device) for name, tensor in made.items() if isinstance(tensor, Tensor)}
    positions, labels = label_positions(whole.pop("labels"))  # (N,)
    batch = {name: tensor for name, tensor in whole.items() if not name.startswith(PREFIX)}
    width = batch["input_ids"].shape[1]
    hidden = select_positions(last_hidden_states(model, **batch), positions)  # (N, D)
    signal = teacher(whole, positions)
    is_picture = _is_picture(batch["input_ids"], spans)  # (B, T)
    # Of each picture the first token.
    is_shown = ~is_picture | ~torch.nn.functional.pad(is_picture, (1, 0))[:, :-1]
    is_shown &= batch["attention_mask"].bool()
    places = (is_shown.cumsum(1) - 1).flatten()[positions + 1]
    kept = (places < max_tokens).nonzero().squeeze(1)
    head, parts = head_of(model).truncated(size), []
    view = _VIEWS.get(_kind(signal), _nothing)
    for chunk in kept.split(default_chunk_size(device, size)):
        log_probs = head.logits(hidden[chunk]).log_softmax(-1)  # (n, V)
        said = view(signal, chunk, log_probs, labels[chunk])
        parts.append((_likeliest(log_probs, labels[chunk]), said))
    row_of = (positions // width)[kept].cpu().numpy()
    kept_places = places[kept].cpu().numpy()
    student, mine = (_side([part[i] for part in parts]) for i in (0, 1))
    kl = torch.cat([said.kl for _, said in parts]).double().cpu().numpy() if parts else np.zeros(0)
    found = []
    for i, row in enumerate(rows):
        at = np.flatnonzero(row_of == i)
        sides = (Side(*(array[at] for array in side)) for side in (student, mine))
        ids = batch["input_ids"][i][is_shown[i]].tolist()
        pictures = pictures_of(row["row"]) if "row" in row else []
        standing = is_picture[i][is_shown[i]][:max_tokens].nonzero().flatten().tolist()
        found.append(
            TokenRow(
                row["number"], ids[:max_tokens], len(ids), kept_places[at], kl[at], *sides,
                pictures=tuple(map(small, pictures[:MAX_PICTURES])), num_pictures=len(pictures),
                picture_places=tuple(standing),
            )
        )  # fmt: skip
    return found, signal


def _is_picture(input_ids: Tensor, spans: PictureSpans | None) -> Tensor:
    """True for tokens (B, T) that stand for pictures."""
    return torch.zeros_like(input_ids, dtype=torch.bool) if spans is None else spans(input_ids)


def _side(said: Sequence[Said]) -> Side:
    """Chunks one after the other, as arrays."""
    if not said:
        nothing = np.zeros((0, NUM_LIKELIEST))
        return Side(nothing.astype(np.int64), nothing, np.zeros(0))
    ids, probs, own = (torch.cat([part[i] for part in said]).cpu().numpy() for i in range(3))
    return Side(ids, probs, own)


# ------------------------------------------------------------------------------------- what the kinds of signals know


def _likeliest(log_probs: Tensor, labels: Tensor, kl: Tensor | None = None) -> Said:
    """The likeliest tokens of distributions (n, V), and the probability of the label."""
    values, ids = log_probs.topk(min(NUM_LIKELIEST, log_probs.shape[1]))
    own = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).exp()
    return _filled(ids, values.exp(), own, torch.full_like(own, math.nan) if kl is None else kl)


def _filled(ids: Tensor, probs: Tensor, own: Tensor, kl: Tensor) -> Said:
    """The same with K entries at each position; without a probability there is no token."""
    missing = NUM_LIKELIEST - ids.shape[1]
    probs = torch.nn.functional.pad(probs.float(), (0, missing))
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1).masked_fill(probs == 0, -1)
    return Said(ids, probs, own.float(), kl)


def _dense(signal: TeacherSignal | MixtureSignal | SumSignal, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    """A distribution over the vocabulary: of one teacher, or the mixture of several."""
    total = torch.full_like(student, -torch.inf)
    for weight, teacher in _weighed(signal):
        head = teacher.head.truncated(student.shape[1])
        hidden = teacher.hidden[at.to(teacher.hidden.device)].to(head.weight.device)
        log_probs = head.logits(hidden).log_softmax(-1).to(student)
        weight = weight[at.to(weight.device)].unsqueeze(1) if isinstance(weight, Tensor) else torch.tensor(weight)
        total = torch.logaddexp(total, log_probs + weight.to(student).log())
    return _likeliest(total, labels, DIVERGENCES["forward_kl"](student, total))


def _weighed(signal: Any) -> list[tuple[float | Tensor, TeacherSignal]]:
    """The teachers of a mixture, with weights."""
    if isinstance(signal, TeacherSignal):
        return [(1.0, signal)]
    if isinstance(signal, MixtureSignal):
        return [(teacher.weight, teacher) for teacher in signal.signals]
    return [
        (outer * weight, teacher) for outer, member in signal.members if outer for weight, teacher in _weighed(member)
    ]


def _sampled(signal: SparseSignal, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    """A sample: its largest weights, and the KL that it estimates."""
    ids, weights = signal.ids.to(student.device)[at].long(), signal.weights.to(student)[at]
    log_probs = (student / signal.temperature).log_softmax(-1)
    kl = torch.full_like(log_probs[:, 0], math.nan)
    if signal.entropy is not None:
        kl = -(weights * log_probs.gather(-1, ids)).sum(-1) - signal.entropy.to(student)[at]
    probs, order = weights.topk(min(NUM_LIKELIEST, weights.shape[1]))
    return _filled(ids.gather(-1, order), probs, torch.full_like(kl, math.nan), kl)


def _top(signal: TopKSignal, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    """The most likely tokens, and all others as one outcome."""
    ids, log_probs = signal.ids.to(student.device)[at].long(), signal.log_probs.to(student)[at]
    lacking = ids < 0
    ids, log_probs = ids.where(~lacking, ids[:, :1]), log_probs.masked_fill(lacking, LOG_ZERO).clamp(min=LOG_ZERO)
    if signal.log_tail is None:
        tail = log_tail_of(log_probs, torch.finfo(log_probs.dtype).eps)
    else:
        tail = signal.log_tail.to(student)[at]
    outcomes, _ = coarse_outcomes(student, ids, lacking)
    kl = DIVERGENCES["forward_kl"](
        outcomes.clamp(min=LOG_ZERO), torch.cat([log_probs, tail.unsqueeze(-1)], -1).clamp(min=LOG_ZERO)
    )
    hit = (ids == labels.unsqueeze(-1)) & ~lacking
    own = torch.where(hit.any(-1), (log_probs.exp() * hit).sum(-1), math.nan)
    values, order = log_probs.topk(min(NUM_LIKELIEST, log_probs.shape[1]))
    return _filled(ids.gather(-1, order), values.exp(), own, kl)


def _whole(signal: TopKSignal, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    """All tokens, which leaves no others: a distribution, normalised as the loss does it."""
    ids, values = signal.ids.to(student.device)[at].long(), signal.log_probs.to(student)[at]
    teacher = torch.full_like(student, LOG_ZERO).scatter_(-1, ids, values).log_softmax(-1)
    return _likeliest(teacher, labels, DIVERGENCES["forward_kl"](student, teacher))


def _across(signal: AlignedSignal, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    """Another tokenizer's tokens, where both sides begin a group of tokens and so have read the same text."""
    spans = signal.spans
    places: dict[int, int] = {}
    for place, group in enumerate(spans.teacher_groups.tolist()):
        places.setdefault(group, place)
    groups = [-1, *spans.student_groups.tolist()]
    begins = [places.get(now, -1) if now != before and now != -1 else -1 for before, now in pairwise(groups)]
    own_places = torch.tensor(begins, device=at.device)[at]  # (n,), -1: both do not begin a token here
    head = signal.head.truncated(len(signal.shared.teacher_names))
    hidden = signal.hidden[own_places.clamp(min=0).to(signal.hidden.device)].to(head.weight.device)
    values, ids = head.logits(hidden).log_softmax(-1).topk(NUM_LIKELIEST)
    probs = values.exp().to(student.device).masked_fill((own_places < 0).unsqueeze(-1), 0)
    unknown = torch.full_like(student[:, 0], math.nan)
    return _filled(ids.to(student.device), probs, unknown, unknown)


def _nothing(signal: Any, at: Tensor, student: Tensor, labels: Tensor) -> Said:
    unknown = torch.full_like(student[:, 0], math.nan)
    nothing = student.new_zeros(len(student), 1)
    return _filled(nothing.long(), nothing, unknown, unknown)


class _Whole:
    """The kind of a signal of the most likely tokens that has all of them."""


class _Unknown:
    """The kind of a signal that does not say probabilities."""


def _kind(signal: Any) -> type:
    """The class of a signal; a sum of dense ones is a mixture, and one of anything else is unknown."""
    if isinstance(signal, SumSignal):
        members = {_kind(member) for weight, member in signal.members if weight}
        return SumSignal if members <= {TeacherSignal, MixtureSignal, SumSignal} else _Unknown
    if isinstance(signal, TopKSignal) and signal.ids.shape[1] == signal.vocab_size:
        return _Whole
    return type(None) if signal is None else next((kind for kind in _VIEWS if isinstance(signal, kind)), _Unknown)


_VIEWS: dict[type, View] = {
    TeacherSignal: _dense, MixtureSignal: _dense, SumSignal: _dense, SparseSignal: _sampled, TopKSignal: _top,
    _Whole: _whole, AlignedSignal: _across,
}  # fmt: skip
_KL_IS = {
    TeacherSignal: EXACT, MixtureSignal: EXACT, SumSignal: EXACT, _Whole: EXACT, SparseSignal: ESTIMATE,
    TopKSignal: LOWER_BOUND,
}  # fmt: skip
_OWN_TEXT = "The teacher reads prompts of its own before the same completions."
_TEMPERATURE = (
    "The store was written at temperature {0:g}: the teacher's probabilities and the KL are those at {0:g}, the "
    "student's probabilities those at 1."
)
_NOTES = {
    MixtureSignal: "There are several teachers: their probabilities are mixed with the weights of the run.",
    SumSignal: (
        "There are several teachers: their probabilities are mixed with the weights of the run, and the KL is the one "
        "to this mixture."
    ),
    SparseSignal: (
        "The teacher's probabilities come from a store of samples. Its tokens are the largest of the sample, and the "
        "KL of a token is an estimate: it is right on average, and may be below 0."
    ),
    TopKSignal: (
        "Of the teacher, the probabilities of its most likely tokens alone are known. All others count as one, so the "
        "KL of a token is a lower bound."
    ),
    AlignedSignal: (
        "The teacher has another tokenizer, so a token of the student has no KL. The teacher's tokens are shown where "
        "both begin a token at the same place. Colours show how much the token surprises the student: -log p, in nats."
    ),
    type(None): (
        "There is no teacher. Colours show how much the token surprises the student: -log p, in nats."
    ),
    _Unknown: (
        "This teacher does not say its probabilities, so a token has no KL. Colours show how much the token surprises "
        "the student: -log p, in nats."
    ),
}  # fmt: skip
