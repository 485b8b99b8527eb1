"""The trainers with families that are built otherwise: the right update, or a refusal in words at construction.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM, MllamaTextConfig

from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import (
    assert_same_gradients,
    dense_gradients,
    dense_loss,
    gradients_of,
    make_trainer,
)

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def odd_model(family: str, seed: int = 0, **settings):
    """A random float32 model of a family that `tests.conftest` does not make."""
    torch.manual_seed(seed)
    if family == "mllama":  # transformers maps its whole configuration only
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = MllamaTextConfig(**SIZES, cross_attention_layers=[1], rope_parameters=rope, **settings)
        model = MllamaForCausalLM(config)
    else:
        config = AutoConfig.for_model(family, **{**SIZES, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged tokenised rows; the first tokens of each are prompt, without a label."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


# ----------------------------------------------------------------------------------------- where the hidden states are

# Their `base_model` is the model itself.
WITHOUT_A_NAME = {
    "llama4_text": {
        "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 64,
        "max_position_embeddings": 256,
    },
    "mllama": {"max_position_embeddings": 256},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(WITHOUT_A_NAME))
def test_update_of_a_family_whose_base_model_is_itself_is_the_dense_formula(tmp_path, tokenizer, rows, family):
    student, teacher = (odd_model(family, seed, **WITHOUT_A_NAME[family]) for seed in (2, 1))
    assert student.base_model is student
    found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, router_aux_loss_coef=0.0)
    loss = dense_loss(student, teacher, rows)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


REFUSED = {
    "xlnet": ({"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, "reads ahead"),
    "xlm": ({"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "reads ahead"),
    "bert": ({"is_decoder": True}, "does not compute its logits as"),
    "xmod": ({"is_decoder": True, "languages": ["en_XX"]}, "cannot be read as .* Input language unknown"),
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_is_no_backbone_with_a_head_is_refused_in_words(tmp_path, tokenizer, rows, family):
    settings, message = REFUSED[family]
    odd, plain = odd_model(family, **settings), make_model()
    with pytest.raises(ValueError, match=rf"the teacher \(\w+\) {message}"):
        make_trainer(tmp_path, plain, copy.deepcopy(odd), rows, tokenizer)
    with pytest.raises(ValueError, match=rf"the student \(\w+\) {message}"):
        make_trainer(tmp_path, odd, plain, rows, tokenizer)
