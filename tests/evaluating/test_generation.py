"""Generated answers, against a loop of single forwards without padding or cache."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_distill.evaluating.generation import generate_answers
from tests.conftest import SENTENCES, make_model


def by_hand(model, tokenizer, prompt, max_new_tokens, ends):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text[: 5 + 4 * i])["input_ids"] for i, text in enumerate(SENTENCES)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_answers_are_those_of_single_forwards_for_any_batch_size(tokenizer, prompts, family):
    model = make_model(family, seed=3)
    ends = [by_first(model, prompts[0]), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends[0]
    expected = [by_hand(model, tokenizer, prompt, 8, ends) for prompt in prompts]
    assert expected[0] == ""  # ended by its first token
    assert any(expected)
    for batch_size in (1, 3, 8):
        assert generate_answers(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=8) == expected


def by_first(model, prompt):
    with torch.no_grad():
        return int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())


def test_the_models_own_settings_of_generation_play_no_part_and_come_back(tokenizer, prompts):
    model = make_model(seed=3)
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "num_beams": 2, "min_new_tokens": 8}
    model.generation_config = GenerationConfig(**settings, no_repeat_ngram_size=1, bad_words_ids=[[5]])
    before = model.generation_config
    model.train()
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=8) == expected
    assert model.generation_config is before
    assert model.training


def test_adapters_take_part(tokenizer, prompts):
    model = get_peft_model(make_model(seed=3), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    plain = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    adapted = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    assert adapted != plain
    merged = model.merge_and_unload()
    assert [by_hand(merged, tokenizer, p, 8, [tokenizer.eos_token_id]) for p in prompts] == adapted


def test_texts_that_stop_an_answer_are_no_part_of_it(tokenizer, prompts):
    model = make_model(seed=3)
    whole = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    stop = whole[0][3:5]
    found = generate_answers(model, tokenizer, prompts, max_new_tokens=8, stop=[stop])
    assert found == [text.split(stop)[0] for text in whole]


def test_prompts_that_leave_no_room_are_refused_by_their_number(tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match=r"row 1 has a prompt of 200 tokens, .* beyond the 256 positions"):
        generate_answers(model, tokenizer, [[5], [5] * 200], max_new_tokens=57)
    with pytest.raises(ValueError, match="row 0 has a prompt without tokens"):
        generate_answers(model, tokenizer, [[]])
