"""The memory of a rollout, on fake tensors: both prompts are read, then the last block, when the caches are longest.

Shapes: R rows, P prompt tokens, G tokens of a draft, S slots of a cache, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.losses.head import Head
from hf_distill.metrics import sum_dtype
from hf_distill.modeling import CachedReader, SlotCache, head_of, may_have_slots, slots_for
from hf_distill.planning.devices import as_on
from hf_distill.planning.ledger import CUDA_GRAIN, LiveBytes, Peak
from hf_distill.planning.models import make_model, no_memory
from hf_distill.planning.steps import CACHE, KEPT, WEIGHTS, ModelSpec, StudentRun, make_student
from hf_distill.speculative import RolloutConfig
from hf_distill.verifying import CHUNK_BYTES, sample


@dataclass(frozen=True)
class WritingRun:
    """All that the writing of some rows depends on.

    Args:
        student ([`StudentRun`]): the student, as it is trained.
        teacher ([`ModelSpec`]): the teacher.
        config ([`RolloutConfig`]): lengths and temperatures.
        rows (`int`): R, written at a time.
        prompts: tokens of the longest prompt of student and teacher.
    """

    student: StudentRun
    teacher: ModelSpec
    config: RolloutConfig
    rows: int
    prompts: tuple[int, int]


@dataclass(frozen=True)
class Writing:
    """Bytes of a rollout beside weights and optimizer."""

    caches: tuple[int, int]  # of student and teacher, when the last token is written
    peak: Peak


def rollout_memory(run: WritingRun) -> Writing:
    """Runs the parts of a rollout that take most memory: the prompts, and the block that ends the longest text.

    Raises:
        `ValueError`: a model whose forward depends on values.
    """
    device, config = run.student.device, run.config
    with no_memory():
        student, teacher = make_student(run.student).eval(), make_model(run.teacher).eval()
        ledger = LiveBytes(CUDA_GRAIN if device == "cuda" else 1)
        autocast = run.student.autocast
        mixed = nullcontext if autocast is None else lambda: torch.autocast("cpu", dtype=autocast)
        with ledger, torch.no_grad(), ledger.labelled(KEPT), as_on(device):
            for model in (student, teacher):
                ledger.add([*model.parameters(), *model.buffers()], WEIGHTS)
            ledger.begin()
            drafter, checker = (
                CachedReader(model, *_prompt(run.rows, length), in_slots=may_have_slots(model.config))
                for model, length in zip(_causal(student, teacher), run.prompts, strict=True)
            )
            with mixed():
                _read(drafter, None, ledger)
            _read(checker, None, ledger)
            # The last block: every slot but those that it reads itself is filled.
            _fill(drafter, run.prompts[0] + config.max_new_tokens - 2, ledger)
            _fill(checker, run.prompts[1] + config.max_new_tokens - 1 - config.draft_length, ledger)
            vocab_size = min(len(head_of(model).weight) for model in _causal(student, teacher))
            noise = torch.empty(run.rows, dtype=sum_dtype(drafter.device))
            with mixed():
                hidden = _read(drafter, 1, ledger)[:, -1]
                logits = drafter.head.truncated(vocab_size).logits(hidden)
                sample(logits, noise, config.student_temperature, config.student_top_p)
                del logits
            states = _read(checker, config.draft_length, ledger)
            _judge(checker.head.truncated(vocab_size), states, noise, config)
        caches = tuple(_cache_bytes(reader) for reader in (drafter, checker))
        parts = {name: size for name, size in ledger.peak.parts.items() if name != WEIGHTS}
        return Writing(caches, Peak(parts))  # pyright: ignore[reportArgumentType]


def _causal(*models: nn.Module) -> list:
    return [getattr(model, "get_base_model", lambda model=model: model)() for model in models]


def _prompt(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def _read(reader: CachedReader, num_tokens: int | None, ledger: LiveBytes) -> Tensor:
    """Reads the prompt, or tokens after it; the cache is counted apart."""
    ids = None if num_tokens is None else torch.zeros(len(reader.lengths), num_tokens, dtype=torch.long)
    hidden = reader.read(ids)
    ledger.add(_cached(reader), CACHE)
    return hidden


def _cached(reader: CachedReader) -> list[Tensor]:
    layers: list[Any] = reader._cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _cache_bytes(reader: CachedReader) -> int:
    return sum(tensor.nbytes for tensor in _cached(reader))


def _fill(reader: CachedReader, tokens: int, ledger: LiveBytes) -> None:
    """Makes the cache as long as it is before the last block, of what it is made of."""
    cache, reader._longest = reader._cache, tokens
    slots = slots_for(tokens) if isinstance(cache, SlotCache) else tokens
    with ledger.labelled(CACHE):
        for layer in cache.layers:
            for name in ("keys", "values"):
                rows, heads, _, width = (old := getattr(layer, name)).shape
                setattr(layer, name, old.new_empty(rows, heads, slots, width))


def _judge(head: Head, states: Tensor, noise: Tensor, config: RolloutConfig) -> None:
    """The teacher's verdict on the drafts, some rows of logits at a time, and its own tokens."""
    flat = states.flatten(0, 1)
    rows = max(1, CHUNK_BYTES // (4 * len(head.weight)))
    logits = head.logits(flat[:rows])
    torch.logsumexp(logits / (config.teacher_temperature or 1.0), 1)
    del logits
    sample(head.logits(states[:, -1]), noise, config.teacher_temperature, config.teacher_top_p)
