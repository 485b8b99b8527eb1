"""The insides of transformers models. No other file looks past `model(...)`.

`parts` is what a model is made of; `probes` asks a model whether that is true; `cache` reads texts in pieces; `capture`
takes what inner layers compute; `engines` deals with weights that are split or quantised.
"""

from hf_distill.modeling.cache import (
    CachedReader,
    cache_keyword,
    check_cache,
)
from hf_distill.modeling.capture import (
    KVCapture,
    hidden_widths,
    kv_widths,
)
from hf_distill.modeling.engines import (
    WholeCopy,
    expose_hidden_states,
    gathered,
    keep_4bit_weights,
    whole_state,
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
    layer_output,
    load_balancing_loss,
    num_layers,
    num_positions,
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

__all__ = [
    "CachedReader",
    "KVCapture",
    "WholeCopy",
    "backbone",
    "cache_keyword",
    "causal_lm",
    "check_cache",
    "check_head",
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
    "keep_4bit_weights",
    "kv_widths",
    "label_positions",
    "last_hidden_states",
    "layer_output",
    "load_balancing_loss",
    "num_layers",
    "num_positions",
    "num_token_ids",
    "public_name",
    "readable",
    "select_positions",
    "shared_parameters",
    "shared_vocabulary",
    "trying",
    "whole_state",
]
