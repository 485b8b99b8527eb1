"""Verifiers: teachers that check what a student drafts. A rollout asks its teacher through a [`Verifier`] alone.

Shapes: B rows, R of them unfinished, r of these that go on, P prompt tokens, C completion tokens, G tokens of the
longest draft, W tokens that a block may add to a row, Dt width of the teacher, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    num_steady_positions,
    num_token_ids,
)

# Size limit of the logits that exist at one time, in bytes.
CHUNK_BYTES = 256 * 2**20
# What the teacher knows where it predicts a token, by name: tensors (R, W, ...) or (B, C, ...).
Evidence = dict[str, Tensor]


@dataclass(frozen=True)
class RolloutConfig:
    """The settings of a rollout. A temperature of 0 is greedy.

    Args:
        max_new_tokens (`int`): the longest completion; an end-of-sequence token ends it earlier.
        draft_length (`int`): tokens that the student drafts per block; with 0 the teacher generates alone.
        adaptive (`bool`):
            A block takes the mean of its rows' draft lengths, rounded up. After a draft that was kept whole, that of
            the row becomes the block's plus two, at most `draft_length`; otherwise the accepted tokens plus one.
        top_k (`int`): a drafted token is accepted only if it is among the teacher's `top_k` most likely tokens.
        min_prob (`float`):
            A drafted token is accepted only with at least this probability, at the teacher's temperature (at 1 if that
            is 0).
        student_temperature (`float`): of the student's drafts; 0 is greedy.
        student_top_p (`float`): nucleus of the student's drafts, in (0, 1].
        teacher_temperature (`float`): of the teacher's corrections; 0 is greedy.
        teacher_top_p (`float`): nucleus of the teacher's corrections, in (0, 1].

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

    def accepts_all(self, vocab_size: int) -> bool:
        """True if no drafted token can be rejected."""
        return self.top_k >= vocab_size and self.min_prob == 0


class Asked(NamedTuple):
    """The questions of a verifier to its teacher so far."""

    positions: int  # tokens that the teacher has read, in all forwards and requests together
    requests: int = 0  # over the network, those that were tried again included
    bytes: int = 0  # of their answers
    seconds: float = 0.0  # of waiting for them


class Verdict(NamedTuple):
    """The tokens that one block adds to R rows: accepted ones of the draft, then the teacher's own. W is at least 1."""

    tokens: Tensor  # (R, W), on the device of the drafts, as the next two
    accepted: Tensor  # (R,): tokens of the draft before the first one that the teacher rejects
    kept: Tensor  # (R,): tokens that a row goes on with, at least 1
    evidence: Evidence  # (R, W, ...): what predicts each of the tokens


class Verifier(Protocol):
    """A teacher that has the prompts of a rollout's rows, and checks the drafts that follow."""

    @property
    def asked(self) -> Asked:
        """Its questions to the teacher since it was made."""
        ...

    def read(self, tokens: Tensor, lengths: Tensor) -> Evidence:
        """The evidence that predicts tokens (R, W), of which the first `lengths` (R,) follow each text."""
        ...

    def check(self, drafts: Tensor, drafted: Tensor, uniform: Tensor, end_of_text: Tensor) -> Verdict:
        """The tokens that each row goes on with, of its draft and of the teacher's own.

        Args:
            drafts (`torch.Tensor` of shape `(R, G)`), drafted (`torch.Tensor` of shape `(R,)`):
                The tokens, and the number of valid ones. Where there is none, the teacher goes on alone.
            uniform (`torch.Tensor` of shape `(R, C)`):
                Numbers in [0, 1), one for each place from here on, for the teacher's own tokens.
            end_of_text (`torch.Tensor` of shape `(E,)`): tokens that end a row.
        """
        ...

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """Keeps rows (r,), removes their last `counts` (r,) tokens, and appends the token `following` (r,) to each.

        Counted in the W tokens of the verdict, of which the last one counts as not read yet.
        """
        ...


class LocalVerifier:
    """A model in this process that checks drafts ([`Verifier`]). The evidence is its last hidden states, `hidden`.

    Args:
        model (`PreTrainedModel`): in eval mode while it is asked.
        prompt_ids (`torch.Tensor` of shape `(B, P)`), prompt_mask (`torch.Tensor` of shape `(B, P)`): left-padded.
        config (`RolloutConfig`): the rule of acceptance and the sampling of corrections.
        vocab_size (`int`): ids from here on are never generated.

    Raises:
        `ValueError`: as in [`~hf_distill.speculative.rollout`], for the teacher.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, config: RolloutConfig, vocab_size: int
    ) -> None:
        prompt_mask = prompt_mask.long()
        check_prompts("teacher", model, prompt_ids, prompt_mask, config.max_new_tokens)
        check_model(model, "teacher")
        self._reader = CachedReader(model, prompt_ids, prompt_mask)
        self._head, self._config = self._reader.head.truncated(vocab_size), config
        # Every forward leaves the last token of its draft to the next one.
        self._positions: Tensor | int = int(prompt_mask.sum()) - len(prompt_mask)

    @property
    def asked(self) -> Asked:
        return Asked(int(self._positions))

    @torch.no_grad()
    def read(self, tokens: Tensor, lengths: Tensor) -> Evidence:
        """As in [`Verifier`]; states[:, j] predict tokens[:, j]."""
        self._positions = lengths.clamp(min=1).sum() + self._positions
        return {"hidden": self._reader.read(tokens[:, :-1])[:, -max(tokens.shape[1], 1) :]}

    @torch.no_grad()
    def check(self, drafts: Tensor, drafted: Tensor, uniform: Tensor, end_of_text: Tensor) -> Verdict:
        """As in [`Verifier`]."""
        evidence = self.read(drafts, drafted)
        states, config = evidence["hidden"], self._config  # (R, W, Dt)
        accepted = _accepted(self._head, states, drafts, drafted, config).to(drafts.device)  # (R,)
        # Rows that keep a whole draft get a correction too, which is not used.
        corrections = _correct(self._head, states, accepted.clamp(max=states.shape[1] - 1), uniform, config)
        return verdict(drafts, drafted, accepted, corrections, evidence)

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """As in [`Verifier`]."""
        self._reader.rewind(rows, counts, following)


def verdict(drafts: Tensor, drafted: Tensor, accepted: Tensor, corrections: Tensor, evidence: Evidence) -> Verdict:
    """The verdict on drafts (R, G), with a correction (R,) behind the accepted (R,) tokens where one is needed."""
    width = max(drafts.shape[1], 1)
    is_corrected = (accepted < drafted) | (drafted == 0)
    return Verdict(_with_correction(drafts, width, accepted, corrections), accepted, accepted + is_corrected, evidence)


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


def _accepted(head: Head, states: Tensor, drafts: Tensor, drafted: Tensor, config: RolloutConfig) -> Tensor:
    """The number (R,) of tokens of each draft (R, G) before the first one that the teacher rejects."""
    drafts, drafted = drafts.to(states.device), drafted.to(states.device)
    counts = torch.arange(drafts.shape[1], device=states.device) < drafted[:, None]  # (R, G)
    if drafts.numel() == 0 or config.accepts_all(len(head.weight)):
        return drafted
    # Places behind a draft are judged, too: to leave them out, the host would have to know where they are.
    rows_per_chunk = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    chunks = zip(
        states[:, : drafts.shape[1]].flatten(0, 1).split(rows_per_chunk), drafts.flatten().split(rows_per_chunk),
        strict=True,
    )  # fmt: skip
    likely = torch.cat([_is_likely(head.logits(hidden), tokens, config) for hidden, tokens in chunks])
    return (likely.view_as(counts) & counts).long().cumprod(1).sum(1)


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


def _with_correction(drafts: Tensor, width: int, accepted: Tensor, corrections: Tensor) -> Tensor:
    """Drafts (R, G) as (R, width) tokens, with the correction (R,) behind the accepted ones."""
    tokens = torch.nn.functional.pad(drafts, (0, width - drafts.shape[1]))
    is_correction = torch.arange(width, device=tokens.device) == accepted[:, None]
    return torch.where(is_correction, corrections[:, None], tokens)


def check_model(model: PreTrainedModel, side: str) -> None:
    for check in (check_head, check_cache):
        ensure(check, causal_lm(model), side)


def check_prompts(side: str, model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
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
    positions = num_steady_positions(model)
    if positions is not None and (needed := int(real.sum(1).max()) + max_new_tokens) > positions:
        raise ValueError(
            f"the longest {side} prompt and max_new_tokens={max_new_tokens} make {needed} tokens, but the {side} has "
            f"{positions} positions (with longrope or dynamic scaling, those before it); shorten the prompts or lower "
            "max_new_tokens"
        )
