"""Reading texts a few tokens at a time over a cache of keys and values, and taking tokens back.

Shapes: B batch, R rows that go on, T tokens, D hidden width.
"""

import inspect

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
    """The keyword by which a model's forward takes a cache: `cache` since transformers 5.24, not so in remote code."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CachedReader:
    """Reads B texts of different lengths, a few tokens at a time, and takes the last of them back, row by row.

    Keys and values stay flush right in the cache: the tokens of a row fill its last slots without a gap. So left
    padding is all there is to mask, and a distance in slots is one in tokens, which is what sliding windows count.

    Args:
        model (`PreTrainedModel`): a causal language model whose cache is nothing but keys and values.
        ids (`torch.Tensor` of shape `(B, P)`), mask (`torch.Tensor` of shape `(B, P)`): texts, left-padded.
    """

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self._model = causal_lm(model)
        self.head = head_of(self._model)
        self.device = input_device(self._model)
        self.lengths = mask.sum(1).to(self.device)  # (R,) tokens of each text, those not read yet included
        self._unread = ids.to(self.device)
        self._cache = DynamicCache()
        self._cache_keyword = cache_keyword(backbone(self._model))

    def read(self, ids: Tensor | None = None) -> Tensor:
        """Reads what is not read yet, then `ids` (R, q), which every text gets; the last hidden states (R, n, D)."""
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
        """Goes on with some rows, which forget their last tokens and get another one, to be read next.

        Args:
            rows (`torch.Tensor` of shape `(r,)`): the rows to keep.
            counts (`torch.Tensor` of shape `(r,)`): how many of the tokens read each of them forgets.
            following (`torch.Tensor` of shape `(r,)`): the token that each of them goes on with.
        """
        rows = rows.to(self.device)
        lengths = self.lengths[rows] - counts.to(self.device)
        slots = int(lengths.max())
        first = self._cache.get_seq_length() - self.lengths[rows]  # the slot of each text's first token
        order = torch.arange(slots, device=self.device) - (slots - lengths[:, None])
        taken = (order + first[:, None]).clamp(min=0)  # (r, slots): what is clamped is padding
        for layer in self._cache.layers:
            layer.keys, layer.values = (self._taken(tensor, rows, taken) for tensor in (layer.keys, layer.values))  # pyright: ignore
        self.lengths = lengths + 1
        self._unread = following.to(self.device).unsqueeze(1)

    @staticmethod
    def _taken(tensor: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        """Keys or values (R, heads, S, width) of some rows (r,) at their own slots (r, s)."""
        # Two indices around a slice come first: (r, s, heads, width).
        return tensor[rows.to(tensor.device)[:, None], :, slots.to(tensor.device)].transpose(1, 2)


@remembered
def check_cache(model: PreTrainedModel, name: str) -> None:
    """Reads two short texts in pieces, takes some of it back, and compares with reading them at once.

    Raises:
        `ValueError`: the model remembers more than keys and values (a recurrent state, say), or not one per token.
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
        raise ValueError(f"{refusal}: its hidden states are others than those of the whole text; {remedy}")
