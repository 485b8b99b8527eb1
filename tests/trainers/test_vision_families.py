"""Vision-language families with rules of their own: trained as the others are, or refused in words."""

import pytest
import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
)

from hf_distill import KDConfig, KDTrainer
from hf_distill.evaluation import row_sums
from hf_distill.modeling import last_hidden_states
from tests.trainers.test_kd import settings
from tests.trainers.test_vision import make_trainer, rows_of
from tests.vision import (
    IMAGE_ID,
    PROCESSED,
    TEXT,
    HandMade,
    chats,
    make_processor,
    make_tokenizer,
    make_vlm,
    questions,
    tokenised,
)


@pytest.mark.parametrize("rows", [questions(3), questions(3).remove_columns(["prompt", "completion"])
                                  .add_column("prompt", ["<image>a"] * 3).add_column("completion", ["b"] * 3)],
                         ids=["messages", "text"])  # fmt: skip
def test_completions_that_a_processor_begins_as_texts_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=r"MllamaProcessor puts '<\|user\|>' before each text, completions among them"):
        make_trainer(tmp_path, "mllama", rows)
    with pytest.raises(ValueError, match=r"MllamaProcessor puts '<\|user\|>' before each text, completions among them"):
        row_sums((make_vlm("mllama"),), None, rows, make_processor("mllama"))


@pytest.mark.parametrize("family", PROCESSED)
def test_a_row_that_is_cut_is_read_as_the_beginning_of_the_whole_one(tmp_path, family):
    length, hidden = 40 if family in ("smolvlm", "llava_onevision") else 12, []
    for max_length in (None, length):
        trainer = make_trainer(tmp_path, family, chats(4), max_length=max_length)
        inputs, _, _ = trainer.take_labels(trainer.batch_collator()(list(chats(4))))
        with torch.no_grad():
            found = last_hidden_states(trainer.student.eval(), **inputs)  # (B, T, D)
            signal = trainer.teacher(inputs, torch.arange(inputs["input_ids"].numel()))
        is_token = inputs["attention_mask"][:, :length].bool()
        sides = [found[:, :length], signal.hidden.view(*found.shape[:2], -1)[:, :length]]
        hidden.append([side[is_token] for side in sides])
    assert inputs["input_ids"].shape[1] == length
    for whole, cut in zip(*hidden, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------- pictures that are a part of the text


def make_early(family: str):
    """A random model whose pictures are tokens (Chameleon, Emu3) or patches (Fuyu) of the text itself."""
    text = {name: TEXT[name] for name in TEXT if name not in ("head_dim", "tie_word_embeddings")}
    codes = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "z_channels": 8, "resolution": 16,
        "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
    if family == "fuyu":
        persimmon = {**text, "model_type": "persimmon"}
        return FuyuForCausalLM(FuyuConfig(**text, text_config=persimmon, patch_size=4, image_token_id=IMAGE_ID))
    if family == "emu3":
        names = {"<image>": IMAGE_ID, **{f"<|visual token {i:06d}|>": 60 + i for i in range(10)}}
        return Emu3ForConditionalGeneration(
            Emu3Config(text_config=text, vq_config={**codes, "hidden_size": 8}, vocabulary_map=names)
        )
    names = {"<image>": IMAGE_ID, **{f"IMGIMG{letter}Z": 60 + i for i, letter in enumerate("ABCDEFGHIJ")}}
    return ChameleonForConditionalGeneration(ChameleonConfig(**text, vq_config=codes, vocabulary_map=names))


@pytest.mark.parametrize("family", ["chameleon", "emu3", "fuyu"])
def test_models_whose_pictures_are_a_part_of_the_text_are_refused(tmp_path, family):
    seeing, early = make_vlm("idefics3"), make_early(family)
    for side, models in {"student": (early, seeing), "teacher": (seeing, early)}.items():
        with pytest.raises(ValueError, match=f"the {side} .*reads pictures without a vision tower \\({family}\\)"):
            KDTrainer(*models, KDConfig(**settings(tmp_path)), chats(), processing_class=make_processor("idefics3"))


@pytest.mark.parametrize("family", ["emu3", "fuyu"])
def test_their_pictures_are_not_learned_as_text_whoever_makes_the_batches(tmp_path, family):
    trainer = KDTrainer(
        make_early(family), make_early(family), KDConfig(**settings(tmp_path, remove_unused_columns=False)),
        tokenised(), processing_class=make_tokenizer(), data_collator=HandMade("internvl"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"a batch has pixel_values, and .* has no vision tower"):
        trainer.train()


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_the_load_balancing_loss_that_llama4_does_not_have_is_told_or_refused(tmp_path, caplog, coefficient):
    student = make_vlm("llama4", 1)
    student.config.text_config.output_router_logits = True
    asked = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    if coefficient is not None:
        with pytest.raises(ValueError, match=r"the load-balancing loss of the student .*Llama4.* cannot be computed"):
            make_trainer(tmp_path, "llama4", rows_of("llama4"), student, **asked)
        return
    trainer = make_trainer(tmp_path, "llama4", rows_of("llama4"), student)
    assert "trained without a load-balancing loss" in caplog.text
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]
