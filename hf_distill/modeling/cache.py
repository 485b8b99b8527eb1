"""Reading texts a few tokens at a time with a cache of keys and values, and removing tokens from it.

Shapes: R rows, r of them that go on, P prompt tokens, S slots of the cache, D hidden width.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill.modeling.caches import MovingCache, SlotCache, may_have_slots
from hf_distill.modeling.parts import (
    backbone,
    causal_lm,
    evaluating,
    head_of,
    input_device,
    last_hidden_states,
    num_steady_positions,
    num_token_ids,
    readable,
    trying,
)
from hf_distill.modeling.probes import PASSED, remembered

# The entry of a model in `PASSED` whose tokens can keep their slots.
CHECKED_SLOTS = "check_slots"


def cache_keyword(model: nn.Module) -> str:
    """The keyword of a forward's cache: `cache` since transformers 5.24, `past_key_values` in older or remote code."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CachedReader:
    """Reads texts of different lengths, a few tokens at a time, and forgets the last tokens of each row on demand.

    Args:
        model (`PreTrainedModel`): a causal language model whose cache holds only keys and values.
        ids (`torch.Tensor` of shape `(R, P)`), mask (`torch.Tensor` of shape `(R, P)`): texts, left-padded.
        in_slots (`bool`, *optional*):
            Whether tokens keep their slots ([`SlotCache`]), by default wherever `check_cache` has found that they can.
        step (*optional*): a forward for single tokens, and its `cache` ([`~hf_distill.modeling.CompiledStep`]).
    """

    def __init__(
        self, model: nn.Module, ids: Tensor, mask: Tensor, in_slots: bool | None = None, step: Any = None
    ) -> None:
        self._model = causal_lm(model)
        self.head = head_of(self._model)
        self.device = input_device(self._model)
        self.lengths = mask.sum(1).cpu()  # (R,) tokens of each text, unread ones included, on the host
        self._longest = ids.shape[1]
        self._unread = ids.to(self.device)
        self._cache: MovingCache | SlotCache = MovingCache()
        self._step = step
        if in_slots is None:
            in_slots = CHECKED_SLOTS in PASSED.get(self._model, ())
        if step is not None:
            self._cache = step.cache
        elif in_slots:
            self._cache = SlotCache(self._model.config.get_text_config(), self._model.dtype)
        self._cache_keyword = cache_keyword(backbone(self._model))
        limit = num_steady_positions(self._model)
        self._last_position = None if limit is None else limit - 1

    def read(self, ids: Tensor | None = None) -> Tensor:
        """Reads the unread tokens, then `ids` (R, q); returns the last hidden states (R, n, D) of all of them."""
        tokens = self._unread if ids is None else torch.cat([self._unread, ids.to(self.device)], 1)
        added, number = tokens.shape[1] - self._unread.shape[1], tokens.shape[1]
        self.lengths, self._longest = self.lengths + added, self._longest + added
        self._unread = tokens[:, :0]
        lengths = self.lengths.to(self.device, non_blocking=True)
        positions = lengths[:, None] - number + torch.arange(number, device=self.device)
        is_step = self._step is not None and number == 1 and len(self._cache.layers) > 0
        forward: Any = self._step if is_step else backbone(self._model)
        outputs = forward(
            input_ids=readable(tokens, num_token_ids(self._model)),
            attention_mask=self._cache.place(lengths, number, self._longest),
            # Padding, and a row at its end that is read with others which go on: what comes of it is not used.
            position_ids=positions.clamp(0, self._last_position),
            use_cache=True,
            **{self._cache_keyword: self._cache},
        )
        if not self._cache.is_filled:
            raise RuntimeError(f"its forward does not fill the cache that it is given as {self._cache_keyword}")
        return outputs.last_hidden_state

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """Keeps some rows, removes their last tokens, and appends one unread token to each.

        Args:
            rows (`torch.Tensor` of shape `(r,)`): the rows to keep.
            counts (`torch.Tensor` of shape `(r,)`): the number of tokens that each of them forgets.
            following (`torch.Tensor` of shape `(r,)`): the token that each of them goes on with.
        """
        rows = rows.cpu()
        kept = self.lengths[rows] - counts.cpu()
        self._cache.keep(rows, self.lengths, kept)
        self.lengths, self._longest = kept + 1, int(kept.max()) + 1
        self._unread = following.to(self.device, non_blocking=True).unsqueeze(1)


@remembered
def check_cache(model: PreTrainedModel, name: str) -> None:
    """Reads two short texts in pieces, removes some tokens on the way, and compares with reading them at once.

    Finds out, too, whether tokens can keep their slots ([`SlotCache`]); readers use it from then on.

    Raises:
        `ValueError`: the model remembers more than keys and values (a recurrent state), or not one pair per token.
    """
    refusal = f"the {name} ({type(model).__name__}) cannot take back what it has read, which rollouts need"
    remedy = "only models whose cache is keys and values can be used"
    texts = torch.arange(14, device=input_device(model)).view(2, 7) % num_token_ids(model)
    with torch.no_grad(), evaluating(model), trying(f"{refusal} ({remedy})"):
        found = _read_in_pieces(model, texts, in_slots=False)
        rows = texts[1:, 2:7], texts[:1, :6]
        expected = torch.cat([last_hidden_states(model, input_ids=row)[:, -1] for row in rows])
        scale = expected.abs().max()
        if may_have_slots(model.config):
            try:
                with trying("it takes no mask for each query"):
                    in_slots = _read_in_pieces(model, texts, in_slots=True)
                if (in_slots - found).abs().max() <= (1e-3 if found.dtype == torch.float32 else 0.05) * scale:
                    PASSED.setdefault(model, set()).add(CHECKED_SLOTS)
            except ValueError:
                pass  # its tokens are moved, which is slower and as right
    if not (found - expected).abs().max() <= 0.05 * scale:
        raise ValueError(f"{refusal}: its hidden states differ from those of the whole text; {remedy}")


def _read_in_pieces(model: PreTrainedModel, texts: Tensor, *, in_slots: bool) -> Tensor:
    """The hidden states (2, D) at the ends of texts[1, 2:7] and texts[0, :6], read with a rewind."""
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    reader = CachedReader(model, texts[:, :3], mask, in_slots)
    reader.read(texts[:, 3:6])
    reader.rewind(torch.tensor([1, 0]), torch.tensor([1, 2]), texts[[1, 0], [5, 4]])
    return reader.read(texts[[1, 0], [6, 5]].unsqueeze(1))[:, -1]
