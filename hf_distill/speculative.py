"""Rollouts: text that student and teacher generate together. The student drafts, the teacher corrects (2410.11325).

Each row of a batch advances at its own pace. Both caches are kept from the first block to the last; tokens that a row
rejects are removed from them. Texts are token ids throughout.

Shapes: B rows, R of them unfinished, P prompt tokens, C completion tokens, G tokens of the longest draft, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.losses.fused_linear import Head
from hf_distill.metrics import sum_dtype
from hf_distill.modeling import (
    CachedReader,
    causal_lm,
    check_cache,
    check_head,
    ensure,
    evaluating,
    head_of,
    num_positions,
    num_token_ids,
)

# Size limit of the logits that exist at one time, in bytes.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RolloutConfig:
    """The settings of a rollout. A temperature of 0 is greedy.

    Args:
        max_new_tokens (`int`): the longest completion; an end-of-sequence token ends it earlier.
        draft_length (`int`): tokens that the student drafts per block; with 0 the teacher generates alone.
        adaptive (`bool`):
            The draft length of a row grows by two, up to `draft_length`, after a block that was kept whole. Otherwise
            it becomes the number of accepted tokens plus one.
        top_k (`int`): a drafted token is accepted only if it is among the teacher's `top_k` most likely tokens.
        min_prob (`float`):
            A drafted token is accepted only with at least this probability, at the teacher's temperature (at 1 if that
            is 0).
        student_temperature, student_top_p (`float`): sampling of the student's drafts.
        teacher_temperature, teacher_top_p (`float`): sampling of the teacher's corrections.

    Raises:
        `ValueError`: a value out of its range.
    """

    max_new_tokens: int
    draft_length: int = 5
    adaptive: bool = False
    top_k: int = 25
    min_prob: float = 0.0
    student_temperature: float = 1.0
    student_top_p: float = 1.0
    teacher_temperature: float = 1.0
    teacher_top_p: float = 1.0

    def __post_init__(self):
        for name, smallest in {"max_new_tokens": 1, "draft_length": 0, "top_k": 1}.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} has to be at least {smallest}, got {getattr(self, name)}")
        if not 0 <= self.min_prob <= 1:
            raise ValueError(f"min_prob has to lie in [0, 1], got {self.min_prob}")
        for side in ("student", "teacher"):
            temperature, top_p = getattr(self, f"{side}_temperature"), getattr(self, f"{side}_top_p")
            if not 0 <= temperature < float("inf"):
                raise ValueError(f"{side}_temperature has to be at least 0 (greedy) and finite, got {temperature}")
            if not 0 < top_p <= 1:
                raise ValueError(f"{side}_top_p has to lie in (0, 1], got {top_p}")


class Blocks(NamedTuple):
    """Counts of each block and row, in the order of generation; all of shape (K,)."""

    row: Tensor
    draft_length: Tensor  # the row's draft length in this block
    drafted: Tensor  # drafted tokens, fewer than that at the end of a text
    accepted: Tensor
    corrected: Tensor  # 1 where the teacher replaced a token or, without a draft, generated one


class RolloutStats(NamedTuple):
    blocks: Blocks
    student_forwards: int
    teacher_forwards: int
    seconds: float


class Rollout(NamedTuple):
    """Completions, on the student's device, and the teacher's hidden states, on the teacher's device."""

    completion_ids: Tensor  # (B, C), right-padded
    completion_mask: Tensor  # (B, C), bool
    drafted_mask: Tensor  # (B, C), bool: True at drafted tokens that were accepted
    teacher_hidden: Tensor  # (B, C, Dt): hidden states that predict each completion token; zeros past a row's end
    stats: RolloutStats


class Block(NamedTuple):
    """One block of all unfinished rows, for a watcher; of a row of `drafts`, the first `drafted` tokens are valid."""

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
        student (`PreTrainedModel`), teacher (`PreTrainedModel`):
            Causal language models of one vocabulary, on any devices, with or without adapters.
        student_prompt_ids, student_prompt_mask (`torch.Tensor` of shape `(B, Ps)`): left-padded prompts.
        teacher_prompt_ids, teacher_prompt_mask (`torch.Tensor` of shape `(B, Pt)`):
            The same prompts, or any other text, such as prompts with knowledge that the student lacks.
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
    start = time.perf_counter()
    vocab_size = _vocab_size(student, teacher, vocab_size, config)
    eos = _ends_of_text(eos_token_id, pad_token_id)
    student_prompt_mask, teacher_prompt_mask = student_prompt_mask.long(), teacher_prompt_mask.long()
    _check_prompts("student", student, student_prompt_ids, student_prompt_mask, config.max_new_tokens)
    _check_prompts("teacher", teacher, teacher_prompt_ids, teacher_prompt_mask, config.max_new_tokens)
    if len(student_prompt_ids) != len(teacher_prompt_ids):
        raise ValueError(f"{len(student_prompt_ids)} student prompts, but {len(teacher_prompt_ids)} teacher prompts")
    if config.draft_length:
        with student_context():
            _check_model(student, "student")
    _check_model(teacher, "teacher")
    drafter = CachedReader(student, student_prompt_ids, student_prompt_mask)
    checker = CachedReader(teacher, teacher_prompt_ids, teacher_prompt_mask)
    readers = (drafter, checker) if config.draft_length else (checker,)
    student_head, teacher_head = drafter.head.truncated(vocab_size), checker.head.truncated(vocab_size)
    device = drafter.device
    end_of_text = torch.tensor(eos, device=device)
    shape = len(student_prompt_ids), config.max_new_tokens
    texts = _Texts(shape, pad_token_id, device)
    noise = _noise(shape, generator, device)
    draft_length = torch.full_like(texts.lengths, config.draft_length)  # (B,)
    rows = torch.arange(shape[0], device=device)  # (R,), the unfinished ones
    blocks, student_forwards = [], 0

    with evaluating(student), evaluating(teacher):
        while len(rows):
            place, draft = texts.lengths[rows], draft_length[rows]
            student_noise, teacher_noise = (_from_place(table[rows], place) for table in noise.unbind(-1))

            limits = torch.minimum(draft, config.max_new_tokens - place)
            with student_context():
                drafts, drafted = _draft(drafter, student_head, limits, student_noise, end_of_text, config)
            width = max(drafts.shape[1], 1)
            states = checker.read(drafts[:, :-1])[:, -width:]  # (R, width, Dt); states[:, j] predict drafts[:, j]
            accepted = _accepted(teacher_head, states, drafts, drafted, config).to(device)  # (R,)
            is_corrected = (accepted < drafted) | (drafted == 0)
            # Rows that keep a whole draft get a correction too, which is not used.
            corrections = _correct(teacher_head, states, accepted.clamp(max=width - 1), teacher_noise, config)

            student_forwards += drafts.shape[1]
            blocks.append(Blocks(rows, draft, drafted, accepted, is_corrected.long()))
            if watch is not None:
                watch(Block(rows, drafts, drafted, accepted, corrections))

            tokens = _corrected(drafts, width, accepted, corrections)  # (R, width)
            kept = accepted + is_corrected  # (R,), at least 1
            texts.append(rows, tokens, kept, accepted, states)
            if config.adaptive:
                draft_length[rows] = torch.where(is_corrected, accepted + 1, draft + 2).clamp(max=config.draft_length)
            last = tokens.gather(1, kept[:, None] - 1).squeeze(1)
            goes_on = ~torch.isin(last, end_of_text) & (texts.lengths[rows] < config.max_new_tokens)
            rows = rows[goes_on]
            if len(rows):
                for reader in readers:
                    reader.rewind(goes_on.nonzero().squeeze(1), (width - kept)[goes_on], last[goes_on])

    history = Blocks(*(torch.cat(column).cpu() for column in zip(*blocks, strict=True)))
    return texts.finished(RolloutStats(history, student_forwards, len(blocks), time.perf_counter() - start))


class _Texts:
    """The completions of all rows while they are generated."""

    def __init__(self, shape: tuple[int, int], pad_token_id: int, device: torch.device) -> None:
        self.ids = torch.full(shape, pad_token_id, device=device)  # (B, C)
        self.is_draft = torch.zeros(shape, dtype=torch.bool, device=device)  # (B, C)
        self.lengths = torch.zeros(shape[0], dtype=torch.long, device=device)  # (B,)
        self.hidden = torch.empty(0)  # (B, C, Dt), on the teacher's device

    def append(self, rows: Tensor, tokens: Tensor, kept: Tensor, accepted: Tensor, states: Tensor) -> None:
        """Appends the first `kept` (R,) of `tokens` (R, width) to `rows` (R,), with the states that predict them."""
        if not self.hidden.numel():
            self.hidden = states.new_zeros(*self.ids.shape, states.shape[-1])
        offsets = torch.arange(tokens.shape[1], device=rows.device).expand_as(tokens)
        is_kept = offsets < kept[:, None]  # (R, width)
        row, place = rows[:, None].expand_as(tokens)[is_kept], (self.lengths[rows][:, None] + offsets)[is_kept]
        self.ids[row, place] = tokens[is_kept]
        self.is_draft[row, place] = (offsets < accepted[:, None])[is_kept]
        self.hidden[row.to(states.device), place.to(states.device)] = states[is_kept.to(states.device)]
        self.lengths[rows] += kept

    def finished(self, stats: RolloutStats) -> Rollout:
        """The completions, cut at the end of the longest one."""
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.ids.device) < self.lengths[:, None]
        return Rollout(self.ids[:, :longest], mask, self.is_draft[:, :longest], self.hidden[:, :longest], stats)


@torch.no_grad()
def completion_hidden(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor
) -> Tensor:
    """The hidden states (B, C, D) that predict the tokens of right-padded completions (B, C) after left-padded prompts.

    Raises:
        `ValueError`: the cache of the model holds more than keys and values, but left padding needs such a cache;
            empty, right-padded or too long prompts; unknown ids.
    """
    _check_prompts("model", model, prompt_ids, prompt_mask, completion_ids.shape[1])
    ensure(check_cache, causal_lm(model), "model")
    with evaluating(model):
        hidden = CachedReader(model, prompt_ids, prompt_mask).read(completion_ids[:, :-1])
    return hidden[:, -completion_ids.shape[1] :]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Token ids (R,) from logits (R, V) and one number in [0, 1) each (R,), by the inverse distribution function.

    Args:
        temperature (`float`): 0 takes the most likely token.
        top_p (`float`): samples from the smallest set of most likely tokens whose mass reaches this.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        unlikely = ordered.cumsum(-1) - ordered >= top_p  # more likely tokens already have that mass
        probs = probs.scatter(-1, order, ordered.masked_fill(unlikely, 0.0))
    cumulative = probs.cumsum(-1, dtype=sum_dtype(probs.device))
    threshold = uniform[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _draft(
    reader: CachedReader, head: Head, limits: Tensor, uniform: Tensor, end_of_text: Tensor, config: RolloutConfig
) -> tuple[Tensor, Tensor]:
    """Drafts (R, G) of the student, and the valid tokens of each row (R,), which its limit or an end of text ends."""
    drafts = []
    drafted = torch.zeros_like(limits)
    is_open = drafted < limits
    while is_open.any():
        hidden = reader.read(drafts[-1][:, None] if drafts else None)[:, -1]  # (R, Ds)
        position = uniform[:, len(drafts)]
        drafts.append(sample(head.logits(hidden), position, config.student_temperature, config.student_top_p))
        drafted = drafted + is_open
        is_open = is_open & (drafted < limits) & ~torch.isin(drafts[-1], end_of_text)
    return torch.stack(drafts, 1) if drafts else limits.new_zeros(len(limits), 0), drafted


def _accepted(head: Head, states: Tensor, drafts: Tensor, drafted: Tensor, config: RolloutConfig) -> Tensor:
    """The number (R,) of tokens of each draft (R, G) before the first one that the teacher rejects."""
    drafts, drafted = drafts.to(states.device), drafted.to(states.device)
    counts = torch.arange(drafts.shape[1], device=states.device) < drafted[:, None]  # (R, G)
    if drafts.numel() == 0 or (config.top_k >= len(head.weight) and config.min_prob == 0):
        return drafted  # no token can be rejected
    likely = torch.zeros_like(counts)
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    chunks = zip(
        states[:, : drafts.shape[1]][counts].split(rows_per_chunk), drafts[counts].split(rows_per_chunk), strict=True
    )
    likely[counts] = torch.cat([_is_likely(head.logits(hidden), tokens, config) for hidden, tokens in chunks])
    return likely.long().cumprod(1).sum(1)


def _is_likely(logits: Tensor, tokens: Tensor, config: RolloutConfig) -> Tensor:
    """The acceptance rule for tokens (M,) under the teacher's logits (M, V)."""
    chosen = logits.gather(1, tokens[:, None])  # (M, 1)
    rank = (logits > chosen).sum(1)
    temperature = config.teacher_temperature or 1.0
    prob = (chosen.squeeze(1) / temperature - (logits / temperature).logsumexp(1)).exp()
    return (rank < config.top_k) & (prob >= config.min_prob)


def _correct(head: Head, states: Tensor, offsets: Tensor, uniform: Tensor, config: RolloutConfig) -> Tensor:
    """The teacher's own token (R,) at `offsets` (R,) of a block, on the device of `offsets`."""
    state = states[torch.arange(len(states), device=states.device), offsets.to(states.device)]  # (R, Dt)
    chosen = uniform.gather(1, offsets[:, None]).squeeze(1).to(states.device)
    tokens = sample(head.logits(state), chosen, config.teacher_temperature, config.teacher_top_p)
    return tokens.to(offsets.device)


def _corrected(drafts: Tensor, width: int, accepted: Tensor, corrections: Tensor) -> Tensor:
    """Drafts (R, G) as (R, width) tokens, with the correction (R,) behind the accepted ones."""
    tokens = torch.nn.functional.pad(drafts, (0, width - drafts.shape[1]))
    is_correction = torch.arange(width, device=tokens.device) == accepted[:, None]
    return torch.where(is_correction, corrections[:, None], tokens)


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


def _check_model(model: PreTrainedModel, side: str) -> None:
    for check in (check_head, check_cache):
        ensure(check, causal_lm(model), side)


def _check_prompts(side: str, model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    if ids.shape != mask.shape or ids.dim() != 2 or len(ids) == 0:
        raise ValueError(
            f"{side}_prompt_ids and {side}_prompt_mask have to have one shape (B, P), got {tuple(ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    real = mask.bool()
    if empty := (~real.any(1)).nonzero().flatten().tolist():
        raise ValueError(f"the {side}'s prompt of row {empty[0]} is empty; it needs at least one token")
    if (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(f"the {side}'s prompts have to be padded on the left: padding_side='left'")
    model = causal_lm(model)
    for strange in (int(ids[real].max()), int(ids[real].min())):
        if not 0 <= strange < num_token_ids(model):
            raise ValueError(f"the {side}'s prompts have token id {strange}, but it has {num_token_ids(model)} ids")
    positions = num_positions(model)
    if positions is not None and (needed := int(real.sum(1).max()) + max_new_tokens) > positions:
        raise ValueError(
            f"the longest {side} prompt and max_new_tokens={max_new_tokens} make {needed} tokens, but the {side} has "
            f"{positions} positions; shorten the prompts or lower max_new_tokens"
        )
