"""The insides of transformers models. Other modules ask here instead of looking past `model(...)` themselves.

- `parts`: backbone, head, layers, positions, vocabulary, device.
- `probes`: checks that run the model itself.
- `cache`: reading texts in pieces, removing tokens from a cache; `caches`: the two ways to do that.
- `decoding`: a step of one token, compiled.
- `capture`: the output of inner layers: hidden states, keys and values.
- `engines`: split or quantised weights; the loss inside the forward.
- `rebuilding`: a model with fewer or more layers.
- `vision`: models that read pictures, and the tokens that stand for these.
"""

from hf_distill.modeling.cache import (
    CachedReader,
    cache_keyword,
    check_cache,
)
from hf_distill.modeling.caches import (
    SlotCache,
    may_have_slots,
    slots_for,
)
from hf_distill.modeling.capture import (
    KVCapture,
    hidden_widths,
    kv_widths,
    layer_outputs,
    layer_states,
)
from hf_distill.modeling.decoding import (
    CompiledReader,
    CompiledStep,
    Reader,
)
from hf_distill.modeling.engines import (
    WholeCopy,
    expose_hidden_states,
    gathered,
    is_split,
    keep_4bit_weights,
    weights_fingerprint,
    weights_kind,
    whole_state,
    without_values,
)
from hf_distill.modeling.parts import (
    backbone,
    causal_lm,
    decoder_layers,
    drop_unreadable_padding,
    embedding_weight,
    evaluating,
    head_layer,
    head_of,
    input_device,
    label_positions,
    last_hidden_states,
    layer_input,
    layer_output,
    load_balancing_loss,
    num_layers,
    num_positions,
    num_steady_positions,
    num_token_ids,
    public_name,
    readable,
    select_positions,
    shared_parameters,
    shared_vocabulary,
    trying,
)
from hf_distill.modeling.probes import (
    check_head,
    check_length,
    check_load_balancing,
    ensure,
)
from hf_distill.modeling.rebuilding import (
    check_function,
    check_layers,
    layer_settings,
    named_tensors,
    rebuilt,
    set_layer_settings,
)
from hf_distill.modeling.vision import (
    PictureSpans,
    is_vision_language,
    language_part,
    merges_early,
    picture_tokens,
    spare_frozen_tower,
    tokenizer_of,
    vision_tower,
)

__all__ = [
    "CachedReader",
    "CompiledReader",
    "CompiledStep",
    "KVCapture",
    "PictureSpans",
    "Reader",
    "SlotCache",
    "WholeCopy",
    "backbone",
    "cache_keyword",
    "causal_lm",
    "check_cache",
    "check_function",
    "check_head",
    "check_layers",
    "check_length",
    "check_load_balancing",
    "decoder_layers",
    "drop_unreadable_padding",
    "embedding_weight",
    "ensure",
    "evaluating",
    "expose_hidden_states",
    "gathered",
    "head_layer",
    "head_of",
    "hidden_widths",
    "input_device",
    "is_split",
    "is_vision_language",
    "keep_4bit_weights",
    "kv_widths",
    "label_positions",
    "language_part",
    "last_hidden_states",
    "layer_input",
    "layer_output",
    "layer_outputs",
    "layer_settings",
    "layer_states",
    "load_balancing_loss",
    "may_have_slots",
    "merges_early",
    "named_tensors",
    "num_layers",
    "num_positions",
    "num_steady_positions",
    "num_token_ids",
    "picture_tokens",
    "public_name",
    "readable",
    "rebuilt",
    "select_positions",
    "set_layer_settings",
    "shared_parameters",
    "shared_vocabulary",
    "slots_for",
    "spare_frozen_tower",
    "tokenizer_of",
    "trying",
    "vision_tower",
    "weights_fingerprint",
    "weights_kind",
    "whole_state",
    "without_values",
]
