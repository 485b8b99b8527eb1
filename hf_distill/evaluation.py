"""How close a student is to its teacher, on rows that it was not trained on.

Shapes: B batch, T tokens, N label-bearing positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.losses.divergence import DIVERGENCES
from hf_distill.losses.fused_linear import default_chunk_size
from hf_distill.metrics import TokenMeans
from hf_distill.modeling import (
    causal_lm,
    head_of,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    select_positions,
)


@torch.no_grad()
def evaluate_fidelity(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """Perplexities of both models and how far the student's distributions are from the teacher's.

    Rows are `text` (measured as it stands: nothing is appended), `prompt` and `completion` (the completion counts),
    `messages` (every token counts), or `input_ids` with optional `labels`; `trainer.eval_dataset` has the very rows
    that a trainer evaluates on (packed ones are measured document by document). Every value is a mean over
    label-bearing tokens, whatever the batch size.

    Args:
        student, teacher (`PreTrainedModel`): with the same vocabulary, each on its own device; PEFT models too.
        dataset: the rows; a progress bar counts them.
        tokenizer: of both.
        batch_size (`int`): rows per forward.
        max_length (`int`, *optional*): tokens at which rows are cut.
        vocab_size (`int`, *optional*):
            The true vocabulary, `trainer.vocab_size`; by default that of the tokenizer. Ids past it get no probability.

    Returns:
        A dict with `student_perplexity`, `teacher_perplexity`, `kl` (KL(teacher || student), nats per token),
        `agreement` (share of positions with the same most likely token), `expected_acceptance` (mean of
        `sum_v min(p_s, p_t)`, the rate at which speculative decoding would accept the student's tokens: 2211.17192,
        corollary 3.6) and `num_tokens`.

    Raises:
        `ValueError`: no row has a label-bearing token, or a row has none of the columns above.
    """
    for model in (student, teacher):
        keep_4bit_weights(model)
    was_training = student.training, teacher.training
    student.eval()
    teacher.eval()
    means = TokenMeans()
    num_tokens = 0
    vocab_size = vocab_size or max(tokenizer.get_vocab().values()) + 1
    try:
        for batch in _batches(dataset, tokenizer, batch_size, max_length):
            num_tokens += _add_batch(means, student, teacher, batch, vocab_size)
    finally:
        student.train(was_training[0])
        teacher.train(was_training[1])
    totals = means.pop()
    if not totals:
        raise ValueError("the dataset has no label-bearing token to measure; check its labels and max_length")
    return {
        "student_perplexity": math.exp(totals["student_ce"]),
        "teacher_perplexity": math.exp(totals["teacher_ce"]),
        "kl": totals["kl"],
        "agreement": totals["agreement"],
        "expected_acceptance": 1 - totals["total_variation"],
        "num_tokens": num_tokens,
    }


def _add_batch(
    means: TokenMeans, student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], vocab_size: int
) -> int:
    positions, labels = label_positions(batch.pop("labels"))  # (N,)
    sides = []
    for model in (causal_lm(student), causal_lm(teacher)):
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden = select_positions(last_hidden_states(model, **inputs), positions)  # (N, D)
        sides.append((head_of(model), hidden))
    vocab_size = min(vocab_size, *(len(head.weight) for head, _ in sides))
    device = sides[0][1].device
    chunk_size = default_chunk_size(device, vocab_size)
    for start in range(0, len(labels), chunk_size):
        chunk = slice(start, start + chunk_size)
        student_log_probs, teacher_log_probs = (
            head.truncated(vocab_size).logits(hidden[chunk]).log_softmax(-1).to(device) for head, hidden in sides
        )  # (n, V)
        target = labels[chunk].to(device).unsqueeze(-1)  # (n, 1)
        means.add(
            len(target),
            student_ce=-student_log_probs.gather(-1, target).sum(),
            teacher_ce=-teacher_log_probs.gather(-1, target).sum(),
            kl=DIVERGENCES["forward_kl"](student_log_probs, teacher_log_probs).sum(),
            total_variation=DIVERGENCES["total_variation"](student_log_probs, teacher_log_probs).sum(),
            agreement=(student_log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).sum(),
        )
    return len(labels)


def _batches(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int | None
) -> Iterator[dict[str, Tensor]]:
    """Right-padded batches of input_ids, attention_mask and labels (B, T)."""
    rows: list[dict[str, list[int]]] = []
    for row in tqdm(dataset, desc="measuring fidelity", unit="row", leave=False):
        rows += [{k: ids[:max_length] for k, ids in part.items()} for part in _documents(_tokenized(row, tokenizer))]
        while len(rows) >= batch_size:
            yield _padded(rows[:batch_size])
            rows = rows[batch_size:]
    if rows:
        yield _padded(rows)


def _documents(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The documents of a packed row, each by itself; a row that is not packed is one document."""
    lengths = row.pop("seq_lengths", None) or [len(row["input_ids"])]
    ends = list(accumulate(lengths))
    starts = [0, *ends[:-1]]
    return [{k: ids[a:b] for k, ids in row.items()} for a, b in zip(starts, ends, strict=True)]


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    def pad(name: str, value: int) -> Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    input_ids = pad("input_ids", 0)
    mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": pad("labels", -100)}


def _tokenized(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    if "input_ids" in row:
        labels = row.get("labels") or row["input_ids"]
        return {"input_ids": row["input_ids"], "labels": labels, "seq_lengths": row.get("seq_lengths")}  # pyright: ignore
    if "prompt" in row and "completion" in row:
        prompt = _ids(row["prompt"], tokenizer, add_generation_prompt=True)
        ids = _ids(row["prompt"] + row["completion"], tokenizer)
        differing = (i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b)
        start = next(differing, min(len(prompt), len(ids)))
        return {"input_ids": ids, "labels": [-100] * start + ids[start:]}
    content = row.get("text", row.get("messages"))
    if content is None:
        raise ValueError(
            f"a row has the columns {', '.join(sorted(row))}; it needs 'text', 'messages', 'prompt' and 'completion', "
            "or 'input_ids'"
        )
    ids = _ids(content, tokenizer)
    return {"input_ids": ids, "labels": ids}


def _ids(content: str | list, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False) -> list[int]:
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]  # pyright: ignore[reportReturnType]
    return tokenizer.apply_chat_template(content, add_generation_prompt=add_generation_prompt, return_dict=True)[  # pyright: ignore
        "input_ids"
    ]
