"""What `make remote-test` does to a model before a real server gets it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import make_model, make_tokenizer
from tests.remote.real_server import prepare, widen


@pytest.mark.parametrize("biased", [False, True])
def test_a_llama_with_wider_heads_is_the_same_function(inputs, biased):
    model = make_model(attention_bias=biased)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        wide = widen(model)
        expected, found = (each(**inputs, use_cache=False).logits for each in (model, wide))
    assert wide.config.head_dim == 32
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=0)


def test_only_a_narrow_llama_is_written_anew(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "narrow")
    make_model().save_pretrained(tmp_path / "narrow")
    folder = prepare(tmp_path / "narrow", tmp_path / "wide")
    assert folder == tmp_path / "wide"
    assert AutoModelForCausalLM.from_pretrained(folder).config.head_dim == 32
    assert prepare(folder, tmp_path / "wider") == folder
    with pytest.raises(ValueError, match="only a Llama whose heads divide 32"):
        widen(make_model("qwen3"))
