"""A model's step of one token, compiled: the drafts of rollouts.

Shapes: R rows, all of them at all times, r of them that go on, P prompt tokens, q tokens that are read, D hidden width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.modeling.cache import CHECKED_SLOTS, CachedReader, check_cache
from hf_distill.modeling.caches import SlotCache
from hf_distill.modeling.parts import backbone, causal_lm, num_layers
from hf_distill.modeling.probes import PASSED, ensure

# Cost of compiling a step, in seconds of one core (torch 2.13, Llama).
SECONDS_PER_LAYER = 10


class CompiledStep:
    """The forward of one token for each of R rows, compiled, and the cache that it works on.

    Shapes never change, so nothing is compiled twice, and on CUDA a step is one graph: rows that have ended, or are not
    there, are read with the others. Longer prompts than any before make the cache longer, and a new compilation.

    Args:
        model (`PreTrainedModel`): a causal language model, in eval mode while it reads.
        rows (`int`): R, of the largest batch.
        room (`int`): tokens that may follow a prompt.
        longest (`int`): tokens of the longest prompt, as far as it is known.

    Raises:
        `ValueError`: a model whose tokens cannot keep their slots.
    """

    def __init__(self, model: PreTrainedModel, rows: int, room: int, longest: int = 0) -> None:
        model = causal_lm(model)
        ensure(check_cache, model, "student")
        if CHECKED_SLOTS not in PASSED[model]:
            raise ValueError(
                f"the student ({type(model).__name__}) cannot be compiled for rollouts: its attention takes no mask "
                "for each token, or has a window. Set rollout_compile=False, or load it with attn_implementation='sdpa'"
            )
        self.rows, self.room = rows, room
        seconds = SECONDS_PER_LAYER * num_layers(model.config.get_text_config())
        self.cost = (
            "the student's step is compiled (rollout_compile) when the first text is written. On a CPU that takes "
            f"about {seconds} seconds of one core, longer beside other work, and nothing is said meanwhile"
        )
        self.cache = SlotCache(model.config.get_text_config(), model.dtype)
        self.cache.hold(longest + room)
        is_cuda = next(model.parameters()).is_cuda
        self._forward = torch.compile(backbone(model), mode="reduce-overhead" if is_cuda else None, dynamic=False)

    def __call__(self, **inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return self._forward(**inputs)


class CompiledReader:
    """A [`CachedReader`] of up to R rows that reads single tokens with a [`CompiledStep`]; one at a time.

    Args:
        model (`PreTrainedModel`): the model of the step.
        ids (`torch.Tensor` of shape `(r, P)`), mask (`torch.Tensor` of shape `(r, P)`): texts, left-padded.
        step ([`CompiledStep`]): for at least r rows.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, step: CompiledStep) -> None:
        step.cache.hold(ids.shape[1] + step.room)
        self._rows = torch.arange(len(ids))  # (r,) that go on
        missing = step.rows - len(ids)
        ids, mask = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (ids, mask.long()))
        mask[len(self._rows) :, -1] = 1  # a text of one token
        self._reader = CachedReader(model, ids, mask, step=step)
        self.head, self.device = self._reader.head, self._reader.device

    @property
    def lengths(self) -> Tensor:
        """As in [`CachedReader`]."""
        return self._reader.lengths[self._rows]

    def read(self, ids: Tensor | None = None) -> Tensor:
        """As in [`CachedReader`]."""
        rows = self._rows.to(self.device, non_blocking=True)
        if ids is not None:
            ids = self._spread(ids.to(self.device), rows, 0)
        return self._reader.read(ids)[rows]

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """As in [`CachedReader`]. Of the other rows one token is left."""
        self._rows = self._rows[rows.cpu()]
        whole = self._reader.lengths - 1
        whole[self._rows] = counts.cpu()
        chosen = self._rows.to(following.device)
        self._reader.rewind(torch.arange(len(whole)), whole, self._spread(following, chosen, 0))

    def _spread(self, values: Tensor, rows: Tensor, filler: int) -> Tensor:
        """Values (r, ...) of the rows that go on, among those of all R."""
        whole = values.new_full((len(self._reader.lengths), *values.shape[1:]), filler)
        whole[rows] = values
        return whole


Reader = Callable[[PreTrainedModel, Tensor, Tensor], CachedReader | CompiledReader]
