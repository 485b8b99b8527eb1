"""Reading texts a few tokens at a time with a cache of keys and values, and removing tokens from it.

Shapes: R rows, r of them that go on, P prompt tokens, S slots of the cache, D hidden width.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hf_distill.modeling.parts import (
    backbone,
    causal_lm,
    evaluating,
    head_of,
    input_device,
    last_hidden_states,
    num_token_ids,
    readable,
    trying,
)
from hf_distill.modeling.probes import remembered


def cache_keyword(model: nn.Module) -> str:
    """The keyword of a forward's cache: `cache` since transformers 5.24, `past_key_values` in older or remote code."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CachedReader:
    """Reads texts of different lengths, a few tokens at a time, and forgets the last tokens of each row on demand.

    The tokens of a row always fill the last slots of the cache without a gap. So only left padding has to be masked,
    and a distance in slots is a distance in tokens, which is what sliding windows need.

    Args:
        model (`PreTrainedModel`): a causal language model whose cache holds only keys and values.
        ids (`torch.Tensor` of shape `(R, P)`), mask (`torch.Tensor` of shape `(R, P)`): texts, left-padded.
    """

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self._model = causal_lm(model)
        self.head = head_of(self._model)
        self.device = input_device(self._model)
        self.lengths = mask.sum(1).to(self.device)  # (R,) tokens of each text, unread ones included
        self._unread = ids.to(self.device)
        self._cache = DynamicCache()
        self._cache_keyword = cache_keyword(backbone(self._model))

    def read(self, ids: Tensor | None = None) -> Tensor:
        """Reads the unread tokens, then `ids` (R, q); returns the last hidden states (R, n, D) of all of them."""
        tokens = self._unread if ids is None else torch.cat([self._unread, ids.to(self.device)], 1)
        self.lengths = self.lengths + tokens.shape[1] - self._unread.shape[1]
        self._unread = tokens[:, :0]
        slots = self._cache.get_seq_length() + tokens.shape[1]
        order = torch.arange(slots, device=self.device) - (slots - self.lengths[:, None])  # (R, slots); padding < 0
        outputs = backbone(self._model)(
            input_ids=readable(tokens, num_token_ids(self._model)),
            attention_mask=(order >= 0).long(),
            position_ids=order[:, -tokens.shape[1] :].clamp(min=0),
            use_cache=True,
            **{self._cache_keyword: self._cache},
        )
        if self._cache.get_seq_length() != slots:
            raise RuntimeError(f"its forward does not fill the cache that it is given as {self._cache_keyword}")
        return outputs.last_hidden_state

    def rewind(self, rows: Tensor, counts: Tensor, following: Tensor) -> None:
        """Keeps some rows, removes their last tokens, and appends one unread token to each.

        Args:
            rows (`torch.Tensor` of shape `(r,)`): the rows to keep.
            counts (`torch.Tensor` of shape `(r,)`): the number of tokens that each of them forgets.
            following (`torch.Tensor` of shape `(r,)`): the token that each of them goes on with.
        """
        rows = rows.to(self.device)
        lengths = self.lengths[rows] - counts.to(self.device)
        slots = int(lengths.max())
        first = self._cache.get_seq_length() - self.lengths[rows]  # the slot of each text's first token
        order = torch.arange(slots, device=self.device) - (slots - lengths[:, None])
        taken = (order + first[:, None]).clamp(min=0)  # (r, slots); clamped ones are padding
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.keys, layer.values = (self._taken(tensor, rows, taken) for tensor in (layer.keys, layer.values))
        self.lengths = lengths + 1
        self._unread = following.to(self.device).unsqueeze(1)

    @staticmethod
    def _taken(tensor: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Keys or values (R, heads, S, width) of some rows (r,), each at its own slots (r, s)."""
        # Indexing with two tensors around a slice puts their dimensions first: (r, s, heads, width).
        return tensor[rows.to(tensor.device)[:, None], :, slots.to(tensor.device)].transpose(1, 2)


@remembered
def check_cache(model: PreTrainedModel, name: str) -> None:
    """Reads two short texts in pieces, removes some tokens on the way, and compares with reading them at once.

    Raises:
        `ValueError`: the model remembers more than keys and values (a recurrent state), or not one pair per token.
    """
    device = input_device(model)
    texts = torch.arange(14, device=device).view(2, 7) % num_token_ids(model)
    refusal = f"the {name} ({type(model).__name__}) cannot take back what it has read, which rollouts need"
    remedy = "only models whose cache is keys and values can be used"
    with torch.no_grad(), evaluating(model), trying(f"{refusal} ({remedy})"):
        mask = torch.tensor([[1, 1, 1], [0, 0, 1]], device=device)
        reader = CachedReader(model, texts[:, :3], mask)
        reader.read(texts[:, 3:6])
        reader.rewind(torch.tensor([1, 0]), torch.tensor([1, 2]), texts[[1, 0], [5, 4]])
        found = reader.read(texts[[1, 0], [6, 5]].unsqueeze(1))[:, -1]
        rows = texts[1:, 2:7], texts[:1, :6]
        expected = torch.cat([last_hidden_states(model, input_ids=row)[:, -1] for row in rows])
    if not (found - expected).abs().max() <= 0.05 * expected.abs().max():
        raise ValueError(f"{refusal}: its hidden states differ from those of the whole text; {remedy}")
