"""Rollouts: text that student and teacher generate together. The student drafts, the teacher corrects (2410.11325).

Each row of a batch advances at its own pace. Both caches are kept from the first block to the last; tokens that a row
rejects are removed from them. Texts are token ids throughout.

Shapes: B rows, R of them unfinished, P prompt tokens, C completion tokens, G tokens of the longest draft, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.losses.fused_linear import Head
from hf_distill.metrics import sum_dtype
from hf_distill.modeling import (
    CachedReader,
    CompiledReader,
    Reader,
    causal_lm,
    check_cache,
    ensure,
    evaluating,
    head_of,
)
from hf_distill.verifying import (
    Asked,
    Evidence,
    LocalVerifier,
    RolloutConfig,
    Verifier,
    check_model,
    check_prompts,
    sample,
)

# Tokens of a draft after which the host looks whether all texts have ended. It waits for a GPU then, so there a few
# tokens behind the ends of all texts cost less.
LOOK_EVERY = {"cpu": 1, "cuda": 8}


class Blocks(NamedTuple):
    """Counts of each block and row, in the order of generation; all of shape (K,), on the host."""

    row: Tensor
    draft_length: Tensor  # the block's draft length
    drafted: Tensor  # drafted tokens, fewer than that at the end of a text
    accepted: Tensor
    corrected: Tensor  # 1 where the teacher replaced a token or, without a draft, generated one


class RolloutStats(NamedTuple):
    blocks: Blocks
    student_forwards: int
    teacher_forwards: int
    seconds: float
    asked: Asked


class Rollout(NamedTuple):
    """Completions, on the student's device, and what predicts each of their tokens, on the verifier's device."""

    completion_ids: Tensor  # (B, C), right-padded
    completion_mask: Tensor  # (B, C), bool
    drafted_mask: Tensor  # (B, C), bool: True at drafted tokens that were accepted
    evidence: Evidence  # (B, C, ...): of the teacher; zeros past a row's end
    stats: RolloutStats

    @property
    def teacher_hidden(self) -> Tensor:
        """The hidden states (B, C, Dt) of a teacher in this process, on its device; `KeyError` for another one."""
        return self.evidence["hidden"]


class Block(NamedTuple):
    """One block of all unfinished rows, for a watcher, on the host; the first `drafted` tokens of a draft are valid."""

    rows: Tensor  # (R,)
    drafts: Tensor  # (R, G)
    drafted: Tensor  # (R,)
    accepted: Tensor  # (R,)
    corrections: Tensor  # (R,): valid where accepted < drafted, or nothing was drafted


@torch.no_grad()
def rollout(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_prompt_ids: Tensor,
    student_prompt_mask: Tensor,
    teacher_prompt_ids: Tensor,
    teacher_prompt_mask: Tensor,
    config: RolloutConfig,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    student_context: Callable[[], AbstractContextManager] = nullcontext,
    watch: Callable[[Block], Any] | None = None,
) -> Rollout:
    """Completes prompts: the student drafts, one teacher forward per block checks the whole draft (2410.11325, alg. 1).

    A draft is accepted up to the first token that is unlikely for the teacher (`top_k`, `min_prob`). The teacher
    replaces that token with its own, and the rest of the draft is dropped. A draft that is accepted whole gets no extra
    token. The random numbers of a token depend only on its row and its place, so the text does not depend on draft
    lengths, batches or padding, even when it is sampled.

    Args:
        student (`PreTrainedModel`): a causal language model, on any device, with or without adapters.
        teacher (`PreTrainedModel`): another of the same vocabulary.
        student_prompt_ids (`torch.Tensor` of shape `(B, Ps)`): left-padded prompts.
        student_prompt_mask (`torch.Tensor` of shape `(B, Ps)`): 0 for their padding.
        teacher_prompt_ids (`torch.Tensor` of shape `(B, Pt)`):
            The same prompts, or any other text, such as prompts with knowledge that the student lacks.
        teacher_prompt_mask (`torch.Tensor` of shape `(B, Pt)`): 0 for their padding.
        config (`RolloutConfig`): lengths, rule of acceptance, temperatures.
        eos_token_id (`int` or list of `int`): tokens that end a row; they belong to the completion.
        pad_token_id (`int`): pads completions on the right.
        generator (`torch.Generator`, *optional*): the source of all random numbers, on any device.
        vocab_size (`int`, *optional*): ids from here on are never generated; by default the rows of the smaller head.
        student_context (`Callable`, *optional*): makes a context for the student's forwards, such as autocast.
        watch (`Callable`, *optional*): called with every [`Block`].

    Raises:
        `ValueError`: empty, right-padded or too long prompts; ids or `top_k` outside of the vocabulary; no eos; a model
            whose cache cannot forget tokens, or that computes its logits in an unknown way.
    """
    vocab_size = _vocab_size(student, teacher, vocab_size, config)
    check_prompts("student", student, student_prompt_ids, student_prompt_mask.long(), config.max_new_tokens)
    check_prompts("teacher", teacher, teacher_prompt_ids, teacher_prompt_mask.long(), config.max_new_tokens)
    if len(student_prompt_ids) != len(teacher_prompt_ids):
        raise ValueError(f"{len(student_prompt_ids)} student prompts, but {len(teacher_prompt_ids)} teacher prompts")
    with evaluating(teacher):
        return verified_rollout(
            student, LocalVerifier(teacher, teacher_prompt_ids, teacher_prompt_mask, config, vocab_size),
            student_prompt_ids, student_prompt_mask, config, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
            generator=generator, vocab_size=vocab_size, student_context=student_context, watch=watch,
        )  # fmt: skip


@torch.no_grad()
def verified_rollout(
    student: PreTrainedModel,
    verifier: Verifier,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: RolloutConfig,
    *,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    vocab_size: int,
    generator: torch.Generator | None = None,
    student_context: Callable[[], AbstractContextManager] = nullcontext,
    watch: Callable[[Block], Any] | None = None,
    make_reader: Reader = CachedReader,
) -> Rollout:
    """Completes the student's prompts as [`rollout`] does, with a verifier that has the teacher's prompts.

    `make_reader` makes what reads them with the student.
    """
    start = time.perf_counter()
    eos = _ends_of_text(eos_token_id, pad_token_id)
    prompt_mask = prompt_mask.long()
    check_prompts("student", student, prompt_ids, prompt_mask, config.max_new_tokens)
    if config.draft_length:
        with student_context():
            check_model(student, "student")
    drafter = make_reader(student, prompt_ids, prompt_mask)
    readers = (drafter, verifier) if config.draft_length else (verifier,)
    head, device = drafter.head.truncated(vocab_size), drafter.device
    end_of_text = torch.tensor(eos, device=device)
    shape = len(prompt_ids), config.max_new_tokens
    texts = _Texts(shape, pad_token_id, device)
    noise = _noise(shape, generator, device)
    # Lengths and rows of the next block are on the host: a block waits for the device once, when it is over.
    draft_length = torch.full_like(texts.lengths, config.draft_length)  # (B,)
    rows = torch.arange(shape[0])  # (R,), the unfinished ones
    blocks, student_forwards = [], 0

    with evaluating(student):
        while len(rows):
            # A block takes as long as its longest draft, so all of its rows draft as far.
            own = draft_length[rows]
            place, draft = texts.lengths[rows], (-(-own.sum() // len(own))).expand(len(own))
            here, start_at = (x.to(device, non_blocking=True) for x in (rows, place))
            student_noise, teacher_noise = (_from_place(table[here], start_at) for table in noise.unbind(-1))

            limits = torch.minimum(draft, config.max_new_tokens - place)
            with student_context():
                drafts, drafted = _draft(drafter, head, limits, student_noise, end_of_text, config)
            tokens, accepted, kept, evidence = verifier.check(drafts, drafted, teacher_noise, end_of_text)
            last = tokens.gather(1, kept[:, None] - 1).squeeze(1)
            texts.append(here, start_at, tokens, kept, accepted, evidence)

            drafted, accepted, kept, last, ended = torch.stack(
                [drafted, accepted, kept, last, torch.isin(last, end_of_text)]
            ).cpu()
            is_corrected = kept > accepted
            student_forwards += drafts.shape[1]
            blocks.append(Blocks(rows, draft, drafted, accepted, is_corrected.long()))
            if watch is not None:
                watch(Block(rows, drafts.cpu(), drafted, accepted, last))

            texts.lengths[rows] += kept
            if config.adaptive:
                draft_length[rows] = torch.where(is_corrected, accepted + 1, draft + 2).clamp(max=config.draft_length)
            goes_on = (ended == 0) & (texts.lengths[rows] < config.max_new_tokens)
            rows = rows[goes_on]
            if len(rows):
                for reader in readers:
                    reader.rewind(goes_on.nonzero().squeeze(1), (tokens.shape[1] - kept)[goes_on], last[goes_on])

    history = Blocks(*(torch.cat(column) for column in zip(*blocks, strict=True)))
    seconds = time.perf_counter() - start
    return texts.finished(RolloutStats(history, student_forwards, len(blocks), seconds, verifier.asked))


class _Texts:
    """The completions of all rows while they are generated."""

    def __init__(self, shape: tuple[int, int], pad_token_id: int, device: torch.device) -> None:
        rows, self._end = shape
        # The last column is for tokens that are not kept: to leave them out, the host would have to count them.
        self.ids = torch.full((rows, self._end + 1), pad_token_id, device=device)  # (B, C + 1)
        self.is_draft = torch.zeros_like(self.ids, dtype=torch.bool)  # (B, C + 1)
        self.lengths = torch.zeros(rows, dtype=torch.long)  # (B,), on the host
        self.evidence: Evidence = {}  # (B, C + 1, ...), on the verifier's device

    def append(
        self, rows: Tensor, place: Tensor, tokens: Tensor, kept: Tensor, accepted: Tensor, evidence: Evidence
    ) -> None:
        """Puts the first `kept` (R,) of `tokens` (R, W) into `rows` (R,) from `place` (R,) on, and what predicts them.

        `lengths` are left to the caller.
        """
        offsets = torch.arange(tokens.shape[1], device=rows.device)
        column = (place[:, None] + offsets).where(offsets < kept[:, None], self._end)  # (R, W)
        row = rows[:, None]
        self.ids[row, column] = tokens
        self.is_draft[row, column] = offsets < accepted[:, None]
        for name, found in evidence.items():
            if name not in self.evidence:
                self.evidence[name] = found.new_zeros(*self.ids.shape, *found.shape[2:])
            self.evidence[name][row.to(found.device), column.to(found.device)] = found

    def finished(self, stats: RolloutStats) -> Rollout:
        """The completions, cut at the end of the longest one."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.ids.device) < self.lengths.to(self.ids.device)[:, None]
        evidence = {name: found[:, :longest] for name, found in self.evidence.items()}
        return Rollout(self.ids[:, :longest], mask, self.is_draft[:, :longest], evidence, stats)


@torch.no_grad()
def completion_hidden(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor
) -> Tensor:
    """The hidden states (B, C, D) that predict the tokens of right-padded completions (B, C) after left-padded prompts.

    Raises:
        `ValueError`: the cache of the model holds more than keys and values, but left padding needs such a cache;
            empty, right-padded or too long prompts; unknown ids.
    """
    check_prompts("model", model, prompt_ids, prompt_mask, completion_ids.shape[1])
    ensure(check_cache, causal_lm(model), "model")
    with evaluating(model):
        hidden = CachedReader(model, prompt_ids, prompt_mask).read(completion_ids[:, :-1])
    return hidden[:, -completion_ids.shape[1] :]


def _draft(
    reader: CachedReader | CompiledReader,
    head: Head,
    limits: Tensor,
    uniform: Tensor,
    end_of_text: Tensor,
    config: RolloutConfig,
) -> tuple[Tensor, Tensor]:
    """Drafts (R, G) of the student, and the valid tokens of each row (R,), which its limit or an end of text ends.

    `limits` (R,) are on the host.
    """
    drafts, longest = [], int(limits.max())
    limits = limits.to(uniform.device, non_blocking=True)
    drafted = torch.zeros_like(limits)
    is_open = drafted < limits
    look_every = LOOK_EVERY.get(uniform.device.type, LOOK_EVERY["cuda"])
    while len(drafts) < longest:
        hidden = reader.read(drafts[-1][:, None] if drafts else None)[:, -1]  # (R, Ds)
        position = uniform[:, len(drafts)]
        drafts.append(sample(head.logits(hidden), position, config.student_temperature, config.student_top_p))
        drafted = drafted + is_open
        is_open = is_open & (drafted < limits) & ~torch.isin(drafts[-1], end_of_text)
        if len(drafts) % look_every == 0 and not is_open.any():
            break
    return torch.stack(drafts, 1) if drafts else limits.new_zeros(len(limits), 0), drafted


def _noise(shape: tuple[int, int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """The random numbers of student and teacher for every token, (B, C, 2)."""
    source = device if generator is None else generator.device
    return torch.rand(*shape, 2, generator=generator, device=source, dtype=sum_dtype(source)).to(device)


def _from_place(table: Tensor, place: Tensor) -> Tensor:
    """Each row of (R, C) from its own place (R,) on; values behind its end are arbitrary."""
    columns = place[:, None] + torch.arange(table.shape[1], device=table.device)
    return table.gather(1, columns.clamp(max=table.shape[1] - 1))


def _vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel, vocab_size: int | None, config: RolloutConfig
) -> int:
    """The number of ids that may be generated; `ValueError` if a head, or `top_k`, does not fit it."""
    smaller = min(len(head_of(causal_lm(model)).weight) for model in (student, teacher))
    vocab_size = smaller if vocab_size is None else vocab_size
    if not 0 < vocab_size <= smaller:
        raise ValueError(f"vocab_size has to lie in [1, {smaller}], the rows of the smaller head, got {vocab_size}")
    if config.top_k > vocab_size:
        raise ValueError(f"top_k={config.top_k} is more than the vocabulary has tokens ({vocab_size})")
    return vocab_size


def _ends_of_text(eos_token_id: int | Sequence[int], pad_token_id: int) -> list[int]:
    """The end-of-sequence tokens as a list; `ValueError` if there is none, or no padding."""
    eos = np.atleast_1d(eos_token_id if eos_token_id is not None else []).tolist()
    if not eos or None in eos:
        raise ValueError(f"eos_token_id is missing (got {eos_token_id}): nothing could end a text")
    if pad_token_id is None:
        raise ValueError("pad_token_id is missing: any token will do, such as the one that ends a text")
    return eos
