"""Text that student and teacher write together: the student drafts, the teacher checks, and corrects (2410.11325).

All rows of a batch advance at their own pace. Both caches live from the first block to the last; the tokens that a row
does not keep are taken back from them. Texts are token ids from beginning to end.

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

# Logits of a draft that exist at one time, in bytes.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RolloutConfig:
    """How a text is written. A temperature of 0 is greedy.

    Args:
        max_new_tokens (`int`): a row ends here, or at the end-of-sequence token.
        draft_length (`int`): tokens that the student drafts per block; with 0 the teacher writes alone.
        adaptive (`bool`):
            Each row drafts two tokens more, up to `draft_length`, after a block that was kept whole, otherwise as many
            as were accepted and one more.
        top_k (`int`): a drafted token is accepted only among the teacher's `top_k` most likely ones.
        min_prob (`float`): and only with at least this probability at the teacher's temperature (at 1 if that is 0).
        student_temperature, student_top_p (`float`): how the student draws its draft.
        teacher_temperature, teacher_top_p (`float`): how the teacher draws the token that replaces a rejected one.

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
    """What happened, one entry per block and row, in the order of writing; all of shape (K,)."""

    row: Tensor
    draft_length: Tensor  # the row's draft length at this block
    drafted: Tensor  # tokens drafted: fewer than that at the end of a text
    accepted: Tensor
    corrected: Tensor  # 1 where the teacher replaced or, without a draft, wrote a token


class RolloutStats(NamedTuple):
    blocks: Blocks
    student_forwards: int
    teacher_forwards: int
    seconds: float


class Rollout(NamedTuple):
    """Completions, on the student's device, and what the teacher had in mind, on the teacher's."""

    completion_ids: Tensor  # (B, C), right-padded
    completion_mask: Tensor  # (B, C), bool
    drafted_mask: Tensor  # (B, C), bool: the student's own token was kept
    teacher_hidden: Tensor  # (B, C, Dt): what predicts each completion token; zeros past a row's end
    stats: RolloutStats


class Block(NamedTuple):
    """One block of all unfinished rows, for whoever wants to watch; the lengths say what of `drafts` counts."""

    rows: Tensor  # (R,)
    drafts: Tensor  # (R, G)
    drafted: Tensor  # (R,)
    accepted: Tensor  # (R,)
    corrections: Tensor  # (R,): counts where accepted < drafted, or nothing was drafted


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

    A draft is accepted up to its first token that the teacher does not hold likely (`top_k`, `min_prob`); that one is
    replaced by a token of the teacher's own, and the rest is dropped. A draft that is accepted whole gets no extra
    token. A token's random numbers depend on its row and its place only, so draft lengths, batches and padding change
    nothing in what is written, however it is sampled.

    Args:
        student (`PreTrainedModel`), teacher (`PreTrainedModel`):
            Causal language models of one vocabulary, on any devices, with or without adapters.
        student_prompt_ids, student_prompt_mask (`torch.Tensor` of shape `(B, Ps)`): left-padded prompts.
        teacher_prompt_ids, teacher_prompt_mask (`torch.Tensor` of shape `(B, Pt)`):
            The same, or what the teacher knows in addition: any other text.
        config (`RolloutConfig`): lengths, rule of acceptance, temperatures.
        eos_token_id (`int` or list of `int`): any of these ends a row; it belongs to the completion.
        pad_token_id (`int`): fills completions on the right.
        generator (`torch.Generator`, *optional*): where all random numbers come from, on any device.
        vocab_size (`int`, *optional*): ids from here on are never written; by default the smaller head's rows.
        student_context (`Callable`, *optional*): makes what the student's forwards run in, such as autocast.
        watch (`Callable`, *optional*): called with every [`Block`].

    Raises:
        `ValueError`: empty, right-padded or too long prompts, ids or `top_k` outside of the vocabulary, no eos, and a
            model that cannot take back what it has read or computes its logits in an unknown way.
    """
    start = time.perf_counter()
    smaller = min(len(head_of(causal_lm(model)).weight) for model in (student, teacher))
    vocab_size = smaller if vocab_size is None else vocab_size
    if not 0 < vocab_size <= smaller:
        raise ValueError(f"vocab_size has to lie in [1, {smaller}], the rows of the smaller head, got {vocab_size}")
    if config.top_k > vocab_size:
        raise ValueError(f"top_k={config.top_k} is more than the vocabulary has tokens ({vocab_size})")
    eos = np.atleast_1d(eos_token_id if eos_token_id is not None else []).tolist()
    if not eos or None in eos:
        raise ValueError(f"eos_token_id is missing (got {eos_token_id}): nothing could end a text")
    if pad_token_id is None:
        raise ValueError("pad_token_id is missing: any token will do, such as the one that ends a text")
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
    noise_device = device if generator is None else generator.device
    noise = torch.rand(*shape, 2, generator=generator, device=noise_device, dtype=sum_dtype(noise_device)).to(device)
    draft_length = torch.full_like(texts.lengths, config.draft_length)  # (B,)
    rows = torch.arange(shape[0], device=device)  # (R,), the unfinished ones
    blocks, forwards = [], {"student": 0, "teacher": 0}

    with evaluating(student), evaluating(teacher):
        while len(rows):
            place, draft = texts.lengths[rows], draft_length[rows]
            student_noise, teacher_noise = (_from_place(table[rows], place) for table in noise.unbind(-1))

            limits = torch.minimum(draft, config.max_new_tokens - place)
            with student_context():
                drafts, drafted = _draft(drafter, student_head, limits, student_noise, end_of_text, config)
            width = max(drafts.shape[1], 1)
            states = checker.read(drafts[:, :-1])[:, -width:]  # (R, width, Dt): what predicts drafts[:, j]
            accepted = _accepted(teacher_head, states, drafts, drafted, config).to(device)  # (R,)
            is_corrected = (accepted < drafted) | (drafted == 0)
            # Rows that keep a whole draft get a correction too; nobody reads it.
            corrections = _correct(teacher_head, states, accepted.clamp(max=width - 1), teacher_noise, config)

            forwards["student"] += drafts.shape[1]
            forwards["teacher"] += 1
            blocks.append(Blocks(rows, draft, drafted, accepted, is_corrected.long()))
            if watch is not None:
                watch(Block(rows, drafts, drafted, accepted, corrections))

            tokens = torch.nn.functional.pad(drafts, (0, width - drafts.shape[1]))  # (R, width)
            is_correction = torch.arange(width, device=device) == accepted[:, None]
            tokens = torch.where(is_correction, corrections[:, None], tokens)
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
    stats = RolloutStats(history, forwards["student"], forwards["teacher"], time.perf_counter() - start)
    longest = int(texts.lengths.max())
    mask = torch.arange(longest, device=device) < texts.lengths[:, None]
    return Rollout(texts.ids[:, :longest], mask, texts.is_draft[:, :longest], texts.hidden[:, :longest], stats)


class _Texts:
    """The completions of all rows while they are written."""

    def __init__(self, shape: tuple[int, int], pad_token_id: int, device: torch.device) -> None:
        self.ids = torch.full(shape, pad_token_id, device=device)  # (B, C)
        self.is_draft = torch.zeros(shape, dtype=torch.bool, device=device)  # (B, C)
        self.lengths = torch.zeros(shape[0], dtype=torch.long, device=device)  # (B,)
        self.hidden = torch.empty(0)  # (B, C, Dt), on the teacher's device

    def append(self, rows: Tensor, tokens: Tensor, kept: Tensor, accepted: Tensor, states: Tensor) -> None:
        """Appends the first `kept` (R,) of `tokens` (R, width) to `rows` (R,), with what predicts them."""
        if not self.hidden.numel():
            self.hidden = states.new_zeros(*self.ids.shape, states.shape[-1])
        offsets = torch.arange(tokens.shape[1], device=rows.device).expand_as(tokens)
        is_kept = offsets < kept[:, None]  # (R, width)
        row, place = rows[:, None].expand_as(tokens)[is_kept], (self.lengths[rows][:, None] + offsets)[is_kept]
        self.ids[row, place] = tokens[is_kept]
        self.is_draft[row, place] = (offsets < accepted[:, None])[is_kept]
        self.hidden[row.to(states.device), place.to(states.device)] = states[is_kept.to(states.device)]
        self.lengths[rows] += kept


@torch.no_grad()
def completion_hidden(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor
) -> Tensor:
    """What predicts each token of given completions (B, C), right-padded, after left-padded prompts: (B, C, D).

    Raises:
        `ValueError`: the model has no cache of keys and values alone, which left padding needs; empty, right-padded or
            too long prompts, or ids that it does not have.
    """
    _check_prompts("model", model, prompt_ids, prompt_mask, completion_ids.shape[1])
    ensure(check_cache, causal_lm(model), "model")
    with evaluating(model):
        hidden = CachedReader(model, prompt_ids, prompt_mask).read(completion_ids[:, :-1])
    return hidden[:, -completion_ids.shape[1] :]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Token ids (R,) from logits (R, V) and one number (R,) in [0, 1) each: the inverse of the distribution function.

    Args:
        temperature (`float`): 0 takes the most likely token.
        top_p (`float`): only the most likely tokens are drawn whose mass first reaches this, after the temperature.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        unlikely = ordered.cumsum(-1) - ordered >= top_p  # more likely tokens have that mass already
        probs = probs.scatter(-1, order, ordered.masked_fill(unlikely, 0.0))
    cumulative = probs.cumsum(-1, dtype=sum_dtype(probs.device))
    threshold = uniform[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _draft(
    reader: CachedReader, head: Head, limits: Tensor, uniform: Tensor, end_of_text: Tensor, config: RolloutConfig
) -> tuple[Tensor, Tensor]:
    """Drafts (R, G) of the student, and how many tokens of each row count (R,): up to its limit, or the end of text."""
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
    """How many tokens of each draft (R, G) come before the first one that the teacher rejects, (R,)."""
    drafts, drafted = drafts.to(states.device), drafted.to(states.device)
    counts = torch.arange(drafts.shape[1], device=states.device) < drafted[:, None]  # (R, G)
    if drafts.numel() == 0 or (config.top_k >= len(head.weight) and config.min_prob == 0):
        return drafted  # whatever the teacher thinks
    likely = torch.zeros_like(counts)
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    chunks = zip(
        states[:, : drafts.shape[1]][counts].split(rows_per_chunk), drafts[counts].split(rows_per_chunk), strict=True
    )
    likely[counts] = torch.cat([_is_likely(head.logits(hidden), tokens, config) for hidden, tokens in chunks])
    return likely.long().cumprod(1).sum(1)


def _is_likely(logits: Tensor, tokens: Tensor, config: RolloutConfig) -> Tensor:
    """The rule of acceptance for tokens (M,) under the teacher's logits (M, V)."""
    chosen = logits.gather(1, tokens[:, None])  # (M, 1)
    rank = (logits > chosen).sum(1)
    temperature = config.teacher_temperature or 1.0
    prob = (chosen.squeeze(1) / temperature - (logits / temperature).logsumexp(1)).exp()
    return (rank < config.top_k) & (prob >= config.min_prob)


def _correct(head: Head, states: Tensor, offsets: Tensor, uniform: Tensor, config: RolloutConfig) -> Tensor:
    """The teacher's own token (R,) at `offsets` (R,) of a block, on their device."""
    state = states[torch.arange(len(states), device=states.device), offsets.to(states.device)]  # (R, Dt)
    chosen = uniform.gather(1, offsets[:, None]).squeeze(1).to(states.device)
    tokens = sample(head.logits(state), chosen, config.teacher_temperature, config.teacher_top_p)
    return tokens.to(offsets.device)


def _from_place(table: Tensor, place: Tensor) -> Tensor:
    """Each row of (R, C) from its own place (R,) on, with anything behind its end."""
    columns = place[:, None] + torch.arange(table.shape[1], device=table.device)
    return table.gather(1, columns.clamp(max=table.shape[1] - 1))


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
