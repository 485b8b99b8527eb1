"""Caches of keys and values for rows that forget their last tokens, each its own number of them.

Shapes: R rows, r of them that go on, q tokens that are read, S slots of the cache, W width of a head.
"""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

# Slots that are added at a time where a cache becomes too short.
SLOTS = 128
# Settings of layers that see only some of the tokens before them.
WINDOWS = re.compile(r"window(_size)?$|attention_chunk_size$|local_attention$")
MASKED = ("sdpa", "eager")  # kinds of attention that take a mask for each query


class MovingCache(DynamicCache):
    """A cache in which the tokens of a row fill the last slots without a gap; to forget some, the others are moved.

    So only left padding has to be masked, and a distance in slots is one in tokens, which is what sliding windows need.
    """

    def place(self, lengths: Tensor, num_tokens: int, longest: int) -> Tensor:
        """The mask (R, S) of a forward that reads the last `num_tokens` of texts of `lengths` (R,), `longest` at most.

        After that forward, `get_seq_length` is S.
        """
        self._slots = self.get_seq_length() + num_tokens
        return (torch.arange(self._slots, device=lengths.device) >= self._slots - lengths[:, None]).long()

    @property
    def is_filled(self) -> bool:
        """True if the last forward has read its tokens into this cache."""
        return self.get_seq_length() == self._slots

    def keep(self, rows: Tensor, lengths: Tensor, kept: Tensor) -> None:
        """Keeps the first `kept` (r,) tokens of some `rows` (r,) of texts of `lengths` (R,); all on the host."""
        slots = int(kept.max())
        order = torch.arange(slots) - (slots - kept[:, None])
        taken = (order + (self.get_seq_length() - lengths[rows])[:, None]).clamp(min=0)  # (r, slots); 0 for padding
        layers: list[Any] = self.layers
        for layer in layers:
            layer.keys, layer.values = (_taken(tensor, rows, taken) for tensor in (layer.keys, layer.values))


def _taken(tensor: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Keys or values (R, heads, S, W) of some rows (r,), each at its own slots (r, s)."""
    # Indexing with two tensors around a slice puts their dimensions first: (r, s, heads, W).
    return tensor[rows.to(tensor.device)[:, None], :, slots.to(tensor.device)].transpose(1, 2)


class SlotCache(Cache):
    """A cache in which a token has the slot of its place in the text; to forget some costs nothing.

    Slots are allocated some at a time, and tokens are written into them. The mask shows each query the tokens up to its
    own: what lies behind them has been forgotten, or was never read.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        super().__init__(layer_class_to_replicate=self._new_layer)  # pyright: ignore[reportArgumentType]
        self._adds_mask = config._attn_implementation == "eager"
        self._dtype = dtype
        self.slots: Tensor = torch.empty(0)  # (R, q) of the tokens that are read
        self.visible = self.capacity = self._held = 0

    def _new_layer(self) -> "SlotLayer":
        return SlotLayer(self)

    def place(self, lengths: Tensor, num_tokens: int, longest: int) -> Tensor:
        """As in [`MovingCache`], a mask (R, 1, q, S)."""
        self.visible, self.capacity = self._held or longest, self._held or slots_for(longest)
        order = lengths[:, None] - num_tokens + torch.arange(num_tokens, device=lengths.device)  # (R, q)
        # Of padding, and of a row at its end that is read with others: a slot that nobody sees.
        self.slots = order.where((order >= 0) & (order < self.capacity), self.capacity - 1)
        visible = torch.arange(self.visible, device=lengths.device) <= order.clamp(min=0).unsqueeze(-1)  # (R, q, S)
        if self._adds_mask:
            visible = torch.zeros_like(visible, dtype=self._dtype).masked_fill(~visible, torch.finfo(self._dtype).min)
        return visible.unsqueeze(1)

    @property
    def is_filled(self) -> bool:
        """As in [`MovingCache`]."""
        layers: list[Any] = self.layers
        return bool(layers) and all(layer.slots is self.slots for layer in layers)

    def hold(self, longest: int) -> None:
        """Keeps to one size for texts up to `longest` tokens, or the size it has, so that tensors keep their shapes."""
        self._held = max(self._held, slots_for(longest))

    def keep(self, rows: Tensor, lengths: Tensor, kept: Tensor) -> None:
        """As in [`MovingCache`]."""
        if torch.equal(rows, torch.arange(len(lengths))):
            return
        layers: list[Any] = self.layers
        for layer in layers:
            chosen = rows.to(layer.keys.device, non_blocking=True)
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]


class SlotLayer(CacheLayerMixin):
    """The keys and values (R, heads, S, W) of one layer of a [`SlotCache`]."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache
        self.slots: Tensor | None = None  # that the last forward has filled

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (x.new_zeros(*x.shape[:2], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes keys and values (R, heads, q, W) into their slots; returns those of all visible slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.slots = self._cache.slots
        self.keys = self._written(self.keys, key_states)
        self.values = self._written(self.values, value_states)
        return self.keys[:, :, : self._cache.visible], self.values[:, :, : self._cache.visible]

    def _written(self, tensor: Any, new: Tensor) -> Tensor:
        if tensor.shape[2] < self._cache.capacity:
            grown = tensor.new_zeros(*tensor.shape[:2], self._cache.capacity, tensor.shape[3])  # no NaN behind a mask
            grown[:, :, : tensor.shape[2]] = tensor
            tensor = grown
        slots = self._cache.slots.to(tensor.device)
        tensor[torch.arange(len(slots), device=slots.device)[:, None], :, slots] = new.transpose(1, 2)
        return tensor

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        return 0 if self.slots is None else self._cache.visible

    def get_max_length(self) -> int:
        return -1


def slots_for(longest: int) -> int:
    """The slots of a [`SlotCache`] for texts of `longest` tokens: one more, for padding, and some to grow into."""
    return (longest // SLOTS + 1) * SLOTS


def may_have_slots(config: PreTrainedConfig) -> bool:
    """True if a [`SlotCache`] may serve a model: its layers see all tokens before a query that a mask lets them see.

    Windows count slots in ways of their own, which short texts do not show.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windows = [name for name, value in config.to_dict().items() if value and WINDOWS.search(name)]
    return config._attn_implementation in MASKED and not kinds and not windows
