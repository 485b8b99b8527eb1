"""The settings that rows depend on: all of them are known to a store, and none of the others changes a text."""

from dataclasses import fields

import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from hf_distill import HardLabelConfig, HardLabelTrainer, KDConfig
from hf_distill.store.documents import Documents, joined
from hf_distill.teachers.stored import changes, row_settings
from tests.conftest import SENTENCES, make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v2:FutureWarning")
TEXTS = {"text": SENTENCES, "other": [text[::-1] for text in SENTENCES]}
WORDS = [text.split(" ", 4) for text in SENTENCES]
PROMPTS = {"prompt": [" ".join(words[:4]) for words in WORDS], "completion": [" " + words[4] for words in WORDS]}
CHATS = {
    "messages": [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(*PROMPTS.values(), strict=True)
    ]
}
PACKED = {"packing": True, "max_length": 16}

# Setting -> rows, the other settings, its value: with it, texts are others.
CHANGED = {
    "max_length": (TEXTS, {}, 12),
    "truncation_mode": (TEXTS, {"max_length": 12}, "keep_end"),
    "packing": (TEXTS, {"packing_strategy": "bfd_split", "max_length": 16}, True),
    "packing_strategy": (TEXTS, PACKED, "bfd_split"),
    "eval_packing": (TEXTS, {**PACKED, "packing_strategy": "bfd_split", "eval_packing": False}, True),
    "completion_only_loss": (PROMPTS, {}, False),
    "assistant_only_loss": (CHATS, {}, True),
    "eos_token": (TEXTS, {}, "<|user|>"),
    "chat_template_path": (CHATS, {}, "template.jinja"),
    "dataset_text_field": (TEXTS, {}, "other"),
}
# Setting -> the other settings, its value: with it, texts are the same.
SAME = {
    "learning_rate": ({}, 0.5),
    "shuffle_dataset": ({}, True),
    "padding_free": ({"max_length": None}, True),
    "pad_to_multiple_of": ({}, 8),
    "pad_token": ({}, "<eos>"),
    "loss_type": ({}, "nll"),
    "packing_strategy": ({"packing": True, "max_length": 64}, "bfd"),
    "loss_chunk_size": ({}, 7),
}
# Settings that are not tried here, and why no text depends on them.
ELSEWHERE = {
    "model_init_kwargs": "of the student's weights",
    "trust_remote_code": "of the student's code; its tokenizer and template are compared",
    "router_aux_loss_coef": "a term of the loss",
    "activation_offloading": "where activations are held",
    "freeze_vision_tower": "which weights are trained",
    "dataset_num_proc": "processes that prepare rows",
    "dataset_kwargs": "skip_prepare_dataset: rows come as tokens, whatever settings say",
    "drop_long_rows": "which rows are left, not what is in them",
}


def teaching() -> set[str]:
    """Settings of teachers and of the loss: rows are prepared before any teacher reads them."""
    return {entry.name for entry in fields(KDConfig)} - {entry.name for entry in fields(HardLabelConfig)}


def own_settings() -> set[str]:
    """The settings of TRL and of this library; those of transformers say how a model is trained, whatever on."""
    general = {entry.name for entry in fields(TrainingArguments)}
    return {entry.name for entry in fields(KDConfig)} - general | set(SFTConfig.__annotations__)


def prepared(folder, rows, **settings):
    """The keys of the rows that a trainer makes of `rows`, and its row settings."""
    args = HardLabelConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, eval_strategy="no",
        per_device_train_batch_size=2, **settings,
    )  # fmt: skip
    dataset = Dataset.from_dict(rows)
    train, held_out = dataset.select(range(4)), dataset.select(range(4, len(dataset)))
    trainer = HardLabelTrainer(make_model(seed=2), args, train, held_out, make_tokenizer())
    documents = joined([Documents.of_dataset(each) for each in (trainer.train_dataset, trainer.eval_dataset)], [0, 0])
    return set(map(bytes, documents.with_labels().keys())), row_settings(trainer.args, trainer.processing_class)


def test_every_setting_has_been_looked_at():
    known = {*CHANGED, *SAME, *ELSEWHERE, *teaching()}
    assert not own_settings() - known, (
        "TRL or this library has new settings. If the tokens of a row, or which of them bear a label, depend on one, "
        "it belongs in hf_distill.teachers.stored.ROW_SETTINGS and in CHANGED here; otherwise in SAME or ELSEWHERE"
    )
    assert {*CHANGED, *SAME, *ELSEWHERE} <= own_settings()


@pytest.mark.parametrize("name", CHANGED)
def test_what_changes_texts_is_told(tmp_path, name):
    rows, settings, value = CHANGED[name]
    if name == "chat_template_path":
        (tmp_path / value).write_text(make_tokenizer().chat_template.replace("<eos>", "!"))
        value = str(tmp_path / value)
    before, written = prepared(tmp_path, rows, **settings)
    after, now = prepared(tmp_path, rows, **{**settings, name: value})
    assert after - before
    (change,) = changes([written], now)
    called = {"packing": "packing_strategy", "chat_template_path": "chat template"}
    assert change.startswith(called.get(name, name))


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_text_is_not_blamed(tmp_path, name):
    settings, value = SAME[name]
    before, written = prepared(tmp_path, TEXTS, **{k: v for k, v in settings.items() if k != "packing"})
    after, now = prepared(tmp_path, TEXTS, **{**settings, name: value})
    assert after == before
    assert changes([written], now) == []
