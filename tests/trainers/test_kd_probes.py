"""The trainers with families that are built otherwise: the right update, or a refusal in words at construction.

Shapes: B batch, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    MllamaForCausalLM,
    MllamaTextConfig,
)
from trl import SFTConfig, SFTTrainer

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, make_model
from tests.trainers.test_kd import (
    Gradients,
    assert_same_gradients,
    dense_gradients,
    dense_loss,
    gradients_of,
    make_trainer,
    settings,
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


@pytest.fixture
def teacher():
    return make_model("llama", seed=1)


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
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token  # Mllama of transformers 5.17 takes no tokenizer without one
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


# ------------------------------------------------------------------------------------------------ rows that are joined

QUICK = ("bloom", "mamba", "mpt", "bamba")  # one of each kind; the others are slow tests
# Their attention, or their recurrence, does not follow position_ids, or does not take them.
MIXING = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mamba": {"state_size": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "rwkv": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"alibi": True, "new_decoder_architecture": False},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["attention", "attention", "recurrent"]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [0]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    },
}  # fmt: skip
PACKED = {"packing": True, "max_length": 64}
JOINED = {"padding_free": True, "max_length": None}
APART = r"(lets texts that share a row see each other|cannot read several texts in one row).*packing"


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MIXING]
)
def test_a_family_whose_texts_see_each_other_in_a_row_is_refused(tmp_path, tokenizer, rows, family):
    odd, plain = odd_model(family, **MIXING[family]), make_model()
    with pytest.raises(ValueError, match=rf"the teacher \(\w+\) {APART}"):
        make_trainer(tmp_path, plain, copy.deepcopy(odd), rows, tokenizer, **PACKED)
    with pytest.raises(ValueError, match=rf"the student \(\w+\) {APART}"):
        make_trainer(tmp_path, odd, plain, rows, tokenizer, **JOINED)
    make_trainer(tmp_path, odd, copy.deepcopy(odd), rows, tokenizer)  # each text in a row of its own


@pytest.mark.parametrize("trainer_class", [KDTrainer, KVProjectionTrainer])
def test_each_of_several_teachers_is_tried_by_both_trainers(tmp_path, tokenizer, rows, trainer_class):
    config = KDConfig if trainer_class is KDTrainer else KVProjectionConfig
    teachers = {"one": make_model(seed=1), "two": odd_model("bloom", **MIXING["bloom"])}
    args = config(**settings(tmp_path, **PACKED))
    with pytest.raises(ValueError, match=r"the teacher two .*share a row"):
        trainer_class(make_model(seed=2), teachers, args, train_dataset=rows, processing_class=tokenizer)


def test_the_students_base_is_tried_as_its_teacher(tmp_path, tokenizer, rows):
    student = odd_model("bloom", **MIXING["bloom"])
    with pytest.raises(ValueError, match="share a row"):
        make_trainer(
            tmp_path, student, "base", rows, tokenizer, **JOINED,
            trainer_settings={"peft_config": LoraConfig(target_modules=["query_key_value"])},
        )  # fmt: skip


def test_rows_that_are_packed_for_the_evaluation_alone_are_tried_too(tmp_path, tokenizer, rows):
    """The collator then gives them an attention mask and no positions: no model keeps the texts apart."""
    student, teacher = make_model(seed=2), make_model(seed=1)
    ready = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    packed = Dataset.from_list([{**rows[0], "seq_lengths": [2, 4]}])
    with pytest.raises(ValueError, match=r"eval_packing without packing: .*see each other"):
        make_trainer(
            tmp_path, student, teacher, rows, tokenizer, eval_packing=True, max_length=64,
            trainer_settings={"eval_dataset": rows},
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"are packed \(seq_lengths\), and their documents would see each other"):
        make_trainer(tmp_path, student, teacher, packed, tokenizer, **ready)
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, **ready)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the student .*see each other"):
            trainer.evaluate(packed)


def test_rows_that_a_collator_of_ones_own_joins_are_tried(tmp_path, tokenizer, rows):
    student, teacher = odd_model("bloom", **MIXING["bloom"]), make_model(seed=1)
    own = {"trainer_settings": {"data_collator": DataCollatorWithFlattening()}}
    with pytest.raises(ValueError, match=r"the student .*see each other"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, **own)
    make_trainer(tmp_path, make_model(seed=2), teacher, rows, tokenizer, **own)


class Quantised(torch.nn.Linear):
    """A layer whose input is rounded by one scale for all tokens of a batch, as 8-bit layers do in part."""

    def forward(self, hidden):
        scale = hidden.abs().max() / 20
        return super().forward((hidden / scale).round() * scale)


def test_rounding_that_depends_on_the_whole_batch_is_no_leak(tmp_path, tokenizer, rows):
    """Texts in rows of their own move each other as much."""
    teacher = make_model(seed=1)
    for layer in teacher.model.layers:
        layer.mlp.down_proj.__class__ = Quantised
    make_trainer(tmp_path, make_model(seed=2), teacher, rows, tokenizer, **JOINED)


def test_joined_rows_may_be_padded(tmp_path, tokenizer, rows):
    make_trainer(tmp_path, make_model(seed=2), make_model(seed=1), rows, tokenizer, pad_to_multiple_of=32, **JOINED)


@pytest.mark.slow
def test_chunks_of_attention_are_counted_from_the_start_of_each_text(tmp_path, tokenizer, rows):
    sizes = {**WITHOUT_A_NAME["llama4_text"], "attention_chunk_size": 6}
    student, teacher = (odd_model("llama4_text", seed, **sizes) for seed in (2, 1))
    plain = {"router_aux_loss_coef": 0.0}
    alone, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer, **plain)
    joined, _ = gradients_of(tmp_path, student, teacher, rows, tokenizer, **plain, **PACKED)
    assert_same_gradients(joined, alone, rtol=1e-4)


def test_a_single_layer_that_goes_across_is_noticed(tmp_path, tokenizer, rows):
    student = make_model(seed=2, attn_implementation="eager")
    layer, forward = student.model.layers[1], student.model.layers[1].forward

    def across(hidden, attention_mask=None, **kwargs):
        length = hidden.shape[1]
        return forward(hidden, attention_mask=torch.full((length, length), -1e9).triu(1)[None, None], **kwargs)

    layer.forward = across
    with pytest.raises(ValueError, match=r"the student .*see each other"):
        make_trainer(tmp_path, student, make_model(seed=1), rows, tokenizer, **JOINED)


def test_positions_that_go_on_from_text_to_text_are_noticed(tmp_path, tokenizer, rows):
    teacher = make_model("gpt2", seed=1)
    table, forward = teacher.transformer.wpe, teacher.transformer.wpe.forward
    table.forward = lambda ids: forward(torch.arange(ids.shape[-1]).expand_as(ids))
    with pytest.raises(ValueError, match=r"the teacher .*does not restart its positions"):
        make_trainer(tmp_path, make_model(seed=2), teacher, rows, tokenizer, **JOINED)


def test_quantised_and_half_precision_models_are_taken(tmp_path, tokenizer, rows):
    pytest.importorskip("bitsandbytes")
    make_model(seed=1, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "teacher")
    student = make_model("qwen2", seed=2).to(torch.bfloat16)
    trainer = make_trainer(
        tmp_path, student, str(tmp_path / "teacher"), rows, tokenizer, bf16=True, teacher_quantization="4bit", **PACKED
    )
    assert trainer.tried_packings == {True}


# ------------------------------------------------------------------------------------------------ weights of two dtypes

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False}


def of_two_dtypes(part: str, folder):
    """A float32 student with a part in bf16; or one in 4 bits."""
    model = make_model("llama", seed=2, hidden_size=64, intermediate_size=128)
    if part == "4-bit body":
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(folder)
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
        model.lm_head.float()
    else:
        model.get_submodule(part).to(torch.bfloat16)
    return model


@pytest.mark.parametrize("part", ["lm_head", "4-bit body", pytest.param("model.layers.0", marks=pytest.mark.slow)])
def test_student_of_two_dtypes_is_trained_as_sfttrainer_trains_it(tmp_path, tokenizer, rows, teacher, part):
    """SFTTrainer rounds its logits to bf16, the losses here do not: 1e-2 is that rounding."""
    found = {}
    for trainer_class, config in ((SFTTrainer, SFTConfig), (KDTrainer, KDConfig)):
        torch.manual_seed(0)  # of adapters
        capture, is_ours = Gradients(), trainer_class is KDTrainer
        trainer = trainer_class(
            of_two_dtypes(part, tmp_path / "student"),
            **({"teacher_model": teacher, "teacher_processing_class": tokenizer} if is_ours else {}),
            args=config(**settings(tmp_path, bf16=True, **({"kd_weight": 0.0} if is_ours else {}))),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA, modules_to_save=["lm_head"]),
            callbacks=[capture],
        )
        trainer.train()
        found[trainer_class] = capture.first, trainer.state.log_history[0]["loss"]
    (ours, loss), (theirs, expected) = found[KDTrainer], found[SFTTrainer]
    assert loss == pytest.approx(expected, rel=1e-4)
    assert ours.keys() == theirs.keys()
    assert any("lm_head" in name for name in ours)
    assert_same_gradients(ours, theirs, rtol=5e-2)


@pytest.mark.parametrize("what", ["hidden states", "keys and values", "rollouts"])
def test_students_that_need_mixed_precision_are_probed_with_it(tmp_path, tokenizer, rows, teacher, what):
    trainer_class, config, options = {
        "hidden states": (KDTrainer, KDConfig, {"hidden_weight": 1.0, "hidden_layers": "cka"}),
        "keys and values": (KVProjectionTrainer, KVProjectionConfig, {"kv_layers": "cka"}),
        "rollouts": (SpeculativeKDTrainer, SpeculativeKDConfig, {"max_new_tokens": 4}),
    }[what]
    if what == "rollouts":
        rows = Dataset.from_dict({"prompt": [text[:12] for text in SENTENCES]})
    make = lambda **more: trainer_class(  # noqa: E731
        of_two_dtypes("model.layers.0", tmp_path), teacher, config(**settings(tmp_path / "out", **options, **more)),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    trainer = make(bf16=True)
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(
        ValueError, match=r"the student .* \(its weights are bfloat16 and float32: load it in one dtype"
    ):
        make()


def test_a_base_that_needs_the_students_mixed_precision_is_no_teacher(tmp_path, tokenizer, rows):
    student = of_two_dtypes("model.layers.0", tmp_path)
    lora = {"trainer_settings": {"peft_config": LoraConfig(**LORA)}}
    with pytest.raises(ValueError, match=r"the teacher .* load it in one dtype"):
        make_trainer(tmp_path, student, "base", rows, tokenizer, bf16=True, **lora)
