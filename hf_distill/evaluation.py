"""Measurements on held-out rows: perplexity, and the student's distance from its teacher.

Shapes: B batch, T tokens, N label-bearing positions, n positions of a chunk, V vocabulary.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.losses.head import default_chunk_size
from hf_distill.measured_pictures import batches_with_pictures, sees_pictures
from hf_distill.metrics import TokenMeans, sum_dtype
from hf_distill.modeling import (
    causal_lm,
    check_head,
    check_length,
    embedding_weight,
    ensure,
    evaluating,
    head_of,
    input_device,
    is_vision_language,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    num_positions,
    num_token_ids,
    select_positions,
    tokenizer_of,
)
from hf_distill.rows import refuse_pictures, tokenized_row
from hf_distill.teachers.columns import PREFIX
from hf_distill.teachers.own_view import OwnView
from hf_distill.teachers.stored import StoredHiddenTeacher
from hf_distill.token_rows import Limits, check_row, has_label, pad


def evaluate_fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredHiddenTeacher,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    vocab_size: int | None = None,
    teacher_processing_class: ProcessorMixin | None = None,
) -> dict[str, float]:
    """Perplexities of both models, and the distance between the student's and the teacher's distributions.

    Rows are `text` (without anything appended), `prompt` and `completion` (the completion counts), `messages` (every
    token counts), or `input_ids` with optional `labels` or, in their place, `completion_mask` and `assistant_masks`.
    `trainer.eval_dataset` has the very rows that a trainer evaluates on; packed rows are measured document by document.
    Every value is a mean over label-bearing tokens and does not depend on the batch size.

    Rows may have pictures, for models that read them and with a processor; they are read as a trainer reads them.

    Args:
        student (`PreTrainedModel`): may be a PEFT model.
        teacher (`PreTrainedModel` or [`~hf_distill.teachers.stored.StoredHiddenTeacher`]):
            A model of the same vocabulary, on a device of its own, or what it has said about these very rows, in a
            store of hidden states.
        dataset: the rows; a progress bar counts them.
        tokenizer: the tokenizer of both, or the student's processor.
        batch_size (`int`): rows per forward.
        max_length (`int`, *optional*): the number of tokens at which rows are cut.
        vocab_size (`int`, *optional*):
            The true vocabulary, `trainer.vocab_size`; by default the tokenizer's. Ids past it get no probability.
        teacher_processing_class (`ProcessorMixin`, *optional*): of a teacher that reads pictures through its own.

    Returns:
        A dict with `student_perplexity`, `teacher_perplexity`, `kl` (KL(teacher || student), nats per token),
        `agreement` (the share of positions with the same most likely token), `expected_acceptance` (the mean of
        `sum_v min(p_s, p_t)`, the rate at which speculative decoding would accept the student's tokens: 2211.17192,
        corollary 3.6), and the label-bearing tokens and the rows that have one, `num_tokens` and `num_rows` (of packed
        rows, their documents).

    Raises:
        `ValueError`: no row has a label-bearing token; a row has none of the columns above, or tokens that a model does
            not know; a model computes its logits in a way that `head_of` does not know; a row is not in the store.
    """
    sums = row_sums(
        (student,), teacher, dataset, tokenizer, batch_size=batch_size, max_length=max_length, vocab_size=vocab_size,
        teacher_processing_class=teacher_processing_class,
    )  # fmt: skip
    num_tokens = int(sums.num_tokens.sum())
    assert sums.teacher_ce is not None
    means = {name: float(values.sum()) / num_tokens for name, values in sums.students[0].items()}
    return {
        "student_perplexity": _exp(means["ce"]),
        "teacher_perplexity": _exp(float(sums.teacher_ce.sum()) / num_tokens),
        "kl": means["kl"],
        "agreement": means["agreement"],
        "expected_acceptance": max(means["acceptance"], 0.0),  # 0 up to rounding
        "num_tokens": num_tokens,
        "num_rows": len(sums.num_tokens),
    }


class RowSums(NamedTuple):
    """Sums over the label-bearing tokens of each of R rows that have one; of packed rows, their documents."""

    num_tokens: np.ndarray  # (R,)
    # Of each student, (R,) each: `ce`, and with a teacher also `kl`, `agreement` and `acceptance`.
    students: list[dict[str, np.ndarray]]
    teacher_ce: np.ndarray | None  # (R,)


def row_sums(
    students: Sequence[PreTrainedModel],
    teacher: PreTrainedModel | StoredHiddenTeacher | None,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    vocab_size: int | None = None,
    teacher_processing_class: ProcessorMixin | None = None,
) -> RowSums:
    """The sums behind `evaluate_fidelity`, row by row, for several students of one teacher or for models without one.

    Arguments and errors are those of `evaluate_fidelity`. The teacher reads every row once.
    """
    models, stored, texts = tuple(students), None, tokenizer_of(tokenizer)
    if isinstance(teacher, StoredHiddenTeacher):
        stored, vocab_size = teacher, min(true_vocabulary(texts, models, vocab_size), len(teacher.head.weight))
    elif teacher is not None:
        models = (*models, teacher)
    names = ["student", *(f"student {i}" for i in range(2, len(students) + 1)), "teacher"]
    size = true_vocabulary(texts, models, vocab_size)

    def documents() -> Iterator[dict[str, list[int]]]:
        for _, tokens in tokenized_rows(dataset, texts, models, vocab_size):
            for document in documents_of(tokens):
                yield {name: ids[:max_length] for name, ids in document.items()}

    if sees_pictures(models, dataset):
        if stored is not None:
            raise ValueError("a store knows texts by their tokens, and the rows have pictures: pass the teacher itself")
        batches, view = batches_with_pictures(
            models, dataset, tokenizer, None if teacher is None else teacher_processing_class,
            batch_size=batch_size, max_length=max_length,
        )  # fmt: skip
    else:
        batches, view = text_batches(documents(), batch_size, stored), None
    parts: list[tuple[int, Tensor]] = []  # of a chunk: its first row, and the sums (r, F) of its r rows
    with measuring(**dict(zip(names, models, strict=False))):
        for rows, labels, sides in log_prob_chunks(models, batches, size, stored, view):
            first, last = int(rows[0]), int(rows[-1])
            tokens = _token_values(sides, labels, teacher is not None)  # (n, F)
            sums = tokens.new_zeros(last - first + 1, tokens.shape[1])
            parts.append((first, sums.index_add_(0, (rows - first).to(tokens.device), tokens)))
    if not parts:
        raise ValueError("the dataset has no label-bearing token to measure; check its labels and max_length")
    totals = np.zeros((parts[-1][0] + len(parts[-1][1]), parts[0][1].shape[1]))  # (R, F)
    for first, sums in parts:
        totals[first : first + len(sums)] += sums.cpu().numpy()
    count, *columns = totals[totals[:, 0] > 0].T  # of rows with pictures, some may have no label
    measures: list[str] = ["ce", "kl", "agreement", "acceptance"] if teacher is not None else ["ce"]
    found = [
        dict(zip(measures, columns[i * len(measures) : (i + 1) * len(measures)], strict=True))
        for i in range(len(students))
    ]
    return RowSums(count, found, columns[-1] if teacher is not None else None)


def _token_values(sides: list[Tensor], labels: Tensor, has_teacher: bool) -> Tensor:
    """The summands (n, F) of [`RowSums`]: a 1, those of each student, and the teacher's cross-entropy."""
    students, teacher = (sides[:-1], sides[-1]) if has_teacher else (sides, None)
    values = [torch.ones(len(labels), device=sides[0].device)]
    for log_probs in students:
        values.append(_cross_entropies(log_probs, labels))
        if teacher is not None:
            values += [
                DIVERGENCES["forward_kl"](log_probs, teacher),
                (log_probs.argmax(-1) == teacher.argmax(-1)).float(),
                1 - DIVERGENCES["total_variation"](log_probs, teacher),
            ]
    if teacher is not None:
        values.append(_cross_entropies(teacher, labels))
    return torch.stack(values, 1).to(sum_dtype(sides[0].device))


def perplexity(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    stride: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """Perplexity of a model on the label-bearing tokens of the rows that `evaluate_fidelity` takes.

    Text longer than `max_length` is read in windows of that length. Each window starts `stride` tokens after the one
    before, and the last one ends with the text. Every token counts once, in the first window that contains it. So it
    has at least `max_length - stride` tokens of context, or all that the text has. With a stride of 1 each token has as
    much context as fits.

    Args:
        model (`PreTrainedModel`): may be a PEFT model.
        dataset: the rows; a progress bar counts them.
        tokenizer: the model's.
        batch_size (`int`): windows per forward.
        max_length (`int`, *optional*): tokens of a window; by default the number of positions of the model.
        stride (`int`, *optional*):
            Tokens from one window to the next; by default half a window, so that long text is read twice.
        vocab_size (`int`, *optional*): as in `evaluate_fidelity`.

    Returns:
        A dict with `perplexity`, `nats_per_token` and `num_tokens`. If the dataset has text (`text`, or `prompt` and
        `completion` that are no conversations) and the tokenizer is fast, also `bits_per_character`, which compares
        models with different tokenizers.

    Raises:
        `ValueError`: no row has a label-bearing token; a row has none of the known columns; a window or stride leaves
            tokens out.
    """
    length = window_length(model, max_length, stride)
    means = TokenMeans()
    num_tokens = 0
    num_characters: list[int | None] = []  # per row

    def windows() -> Iterator[dict[str, list[int]]]:
        for row, tokens in tokenized_rows(dataset, tokenizer, (model,), vocab_size):
            num_characters.append(_num_characters(row, tokens["labels"], tokenizer))
            for document in documents_of(tokens):
                yield from _windows(document, length, stride)

    with measuring(model=model):
        size = true_vocabulary(tokenizer, (model,), vocab_size)
        for _, labels, (log_probs,) in log_prob_chunks((model,), text_batches(windows(), batch_size), size):
            num_tokens += len(labels)
            means.add(len(labels), ce=_cross_entropies(log_probs, labels).sum())
    nats = _totals(means)["ce"]
    found = {"perplexity": _exp(nats), "nats_per_token": nats, "num_tokens": num_tokens}
    known = [count for count in num_characters if count is not None]
    if len(known) == len(num_characters) and (characters := sum(known)):
        found["bits_per_character"] = nats * num_tokens / math.log(2) / characters
    return found


def window_length(model: PreTrainedModel, max_length: int | None, stride: int | None) -> int | None:
    """The window of `perplexity` in tokens; None if neither caller nor model has a limit.

    Raises:
        `ValueError`: a window that predicts no token, or a stride that leaves tokens out.
    """
    if max_length is None:
        max_length = num_positions(model)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length has to be at least 2, a token and the one it predicts; got {max_length}")
    if stride is None:
        return max_length
    if max_length is None:
        raise ValueError(f"stride={stride} needs max_length: the model does not say how many positions it has")
    if not 1 <= stride < max_length:
        raise ValueError(
            f"stride has to be at least 1 and below max_length ({max_length}), so that windows overlap; got {stride}"
        )
    return max_length


@contextmanager
def measuring(**models: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients for a while, with 4-bit weights in the layout that they have.

    Raises:
        `ValueError`: `head_of` does not describe how a model computes its logits.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for name, model in models.items():
            keep_4bit_weights(model)
            ensure(check_head, causal_lm(model), name)
            stack.enter_context(evaluating(model))
        yield


def _cross_entropies(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Those of labels (n,), in nats (n,)."""
    return -log_probs.gather(-1, labels.to(log_probs.device).unsqueeze(-1)).squeeze(-1)


def _exp(nats: float) -> float:
    """exp, or infinity where a float overflows."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def _totals(means: TokenMeans) -> dict[str, float]:
    if totals := means.pop():
        return totals
    raise ValueError("the dataset has no label-bearing token to measure; check its labels and max_length")


def text_batches(
    documents: Iterable[dict[str, list[int]]], batch_size: int, stored: StoredHiddenTeacher | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of the documents that have a label, with what a store has of them."""
    for rows in groups_of(documents, batch_size):
        yield {**batch_of(rows), **({} if stored is None else stored.collate(rows))}


def log_prob_chunks(
    models: tuple[PreTrainedModel, ...],
    batches: Iterable[dict[str, Tensor]],
    size: int,
    stored: StoredHiddenTeacher | None = None,
    view: OwnView | None = None,
) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """Rows (n,), labels (n,) and the log-probabilities (n, V) of each model, on the device of the first, by chunks.

    Rows are numbers, in the order of the batches, on the CPU. `size` is V, the true vocabulary. A teacher in a store
    comes last. The last model is the one that has a `view` of its own of rows with pictures.
    """
    num_rows = 0
    for whole in batches:
        batch = {name: tensor for name, tensor in whole.items() if not name.startswith(PREFIX)}
        positions, labels = label_positions(batch.pop("labels"))  # (N,)
        num_batch, length = batch["input_ids"].shape
        numbers, num_rows = num_rows + positions // length, num_rows + num_batch
        sides = []
        for place, model in enumerate(map(causal_lm, models)):
            is_own = view is not None and place == len(models) - 1
            inputs, places = view.view(whole, positions) if is_own else (batch, positions)
            inputs = on_device_of(model, inputs)
            try:
                hidden = select_positions(last_hidden_states(model, **inputs), places)  # (N, D)
            except IndexError:
                check_length(model, "model", length)
                raise
            sides.append((head_of(model), hidden))
        if stored is not None:
            signal = stored(whole, positions.to(input_device(causal_lm(models[0]))))
            sides.append((signal.head, signal.hidden))
        device = sides[0][1].device
        chunk_size = default_chunk_size(device, size)
        for start in range(0, len(labels), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = (head.truncated(size).logits(hidden[chunk]) for head, hidden in sides)  # (n, V) each
            yield numbers[chunk], labels[chunk], [tensor.log_softmax(-1).to(device) for tensor in logits]


def on_device_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs where the model reads them, pixels in the precision of its weights."""
    device, dtype = input_device(model), embedding_weight(model).dtype
    return {
        name: each.to(device, dtype if each.is_floating_point() else None) if isinstance(each, Tensor) else each
        for name, each in inputs.items()
    }


def true_vocabulary(
    tokenizer: PreTrainedTokenizerBase, models: tuple[PreTrainedModel, ...], vocab_size: int | None
) -> int:
    """The true vocabulary: the tokens that the tokenizer and all heads have."""
    vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1
    return min(vocab_size, *(len(head_of(causal_lm(model)).weight) for model in models))


def tokenized_rows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    models: tuple[PreTrainedModel, ...],
    vocab_size: int | None,
    doing: str = "measuring",
) -> Iterator[tuple[dict[str, Any], dict[str, list[int]]]]:
    """Rows and their tokens, with a progress bar that says what is done.

    Raises:
        `ValueError`: tokens that a model cannot read or predict.
    """
    num_ids = min(num_token_ids(causal_lm(model)) for model in models)
    limits = Limits(
        true_vocabulary(tokenizer, models, vocab_size), num_ids, known_to="the models have embeddings only for"
    )
    sees = any(is_vision_language(causal_lm(model)) for model in models)
    for index, row in enumerate(tqdm(dataset, desc=doing, unit="row", leave=False, delay=1)):
        name = f"row {index} of the dataset"
        if sees:
            refuse_pictures(row, name)
        tokens = tokenized_row(row, tokenizer, name)
        check_row(tokens, name, limits)
        yield row, tokens


def groups_of(documents: Iterable[dict[str, list[int]]], batch_size: int) -> Iterator[list[dict[str, list[int]]]]:
    """The documents that have a label, some at a time."""
    with_label = (document for document in documents if has_label(document))
    return iter(lambda: list(islice(with_label, batch_size)), [])


def _windows(document: dict[str, list[int]], length: int | None, stride: int | None) -> Iterator[dict[str, list[int]]]:
    """Overlapping windows of a document; labels that an earlier window has counted are masked."""
    ids, labels = document["input_ids"], document["labels"]
    length = length or len(ids)
    counted, end = 0, min(length, len(ids))
    while counted < len(ids):
        start = max(end - length, 0)
        yield {"input_ids": ids[start:end], "labels": [-100] * (counted - start) + labels[counted:end]}
        counted, end = end, min(end + (stride or length // 2), len(ids))


def documents_of(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The documents of a packed row; a row that is not packed is one document."""
    lengths = row.pop("seq_lengths", None) or [len(row["input_ids"])]
    ends = list(accumulate(lengths))
    starts = [0, *ends[:-1]]
    return [{k: ids[a:b] for k, ids in row.items()} for a, b in zip(starts, ends, strict=True)]


def batch_of(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A right-padded batch of input_ids, attention_mask and labels (B, T)."""
    input_ids, is_token = pad([row["input_ids"] for row in rows], 0)
    labels, _ = pad([row["labels"] for row in rows], -100)
    return {"input_ids": input_ids, "attention_mask": is_token.long(), "labels": labels}


def _num_characters(row: dict[str, Any], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of characters that the counted tokens of a row stand for; None if it is unknown."""
    text = row["prompt"] + row["completion"] if {"prompt", "completion"} <= set(row) else row.get("text")
    if "input_ids" in row or not isinstance(text, str) or not tokenizer.is_fast:
        return None
    offsets: Any = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in offsets]
    first = next((i for i, label in enumerate(labels) if i and label != -100), None)
    return 0 if first is None else len(text) - ends[first - 1]
