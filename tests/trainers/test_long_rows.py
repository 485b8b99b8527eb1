"""`drop_long_rows`: rows that a model has no positions for are dropped and counted, wherever a trainer reads them."""

import pytest
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from hf_distill import (
    HardLabelConfig,
    HardLabelTrainer,
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
    cli,
)
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.test_cli import options

LIMIT = 16
LENGTHS = [12, 20, 16, 17, 3, 25, 16, 8]
TOKENS = Dataset.from_list([{"input_ids": [5 + i] * length} for i, length in enumerate(LENGTHS)])
KEPT = [[5 + i] * length for i, length in enumerate(LENGTHS) if length <= LIMIT]
SETTINGS = {
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "max_steps": 1, "per_device_train_batch_size": 4, "drop_long_rows": True,
}  # fmt: skip


def short():
    return make_model("gpt2", seed=3, n_positions=LIMIT)


def make(folder, rows, tokenizer, student=None, teacher=None, *, eval_dataset=None, others=None, **changes):
    return KDTrainer(
        student or make_model(seed=2), teacher or make_model(seed=1),
        KDConfig(output_dir=str(folder), **{**SETTINGS, **changes}), rows, eval_dataset, tokenizer, **(others or {}),
    )  # fmt: skip


def ids(dataset):
    return [list(row["input_ids"]) for row in dataset]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("changes", [{}, {"dataset_kwargs": {"skip_prepare_dataset": True}}])
def test_rows_longer_than_a_model_has_positions_are_dropped_and_counted(tmp_path, tokenizer, caplog, side, changes):
    trainer = make(tmp_path, TOKENS, tokenizer, eval_dataset={"a": TOKENS}, **{side: short()}, **changes)
    assert ids(trainer.train_dataset) == ids(trainer.eval_dataset["a"]) == KEPT
    for name in ("train", "a"):
        assert f"3 of 8 {name} rows have more than 16 tokens for the {side} and are dropped" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_model_with_the_least_room_counts_with_rotary_positions_too(tmp_path, tokenizer, caplog):
    def model(limit):
        return make_model(seed=limit, max_position_embeddings=limit)

    trainer = make(tmp_path, TOKENS, tokenizer, model(17), {"a": model(LIMIT), "b": model(40)})
    assert ids(trainer.train_dataset) == KEPT
    assert "3 of 8 train rows have more than 16 tokens for the teacher a and are dropped" in caplog.text
    args = HardLabelConfig(output_dir=str(tmp_path), **SETTINGS)
    assert ids(HardLabelTrainer(model(LIMIT), args, TOKENS, None, tokenizer).train_dataset) == KEPT
    args = KVProjectionConfig(output_dir=str(tmp_path), **SETTINGS)
    assert ids(KVProjectionTrainer(model(40), model(LIMIT), args, TOKENS, None, tokenizer).train_dataset) == KEPT


def test_rows_are_cut_at_max_length_first(tmp_path, tokenizer):
    trainer = make(tmp_path, TOKENS, tokenizer, short(), max_length=LIMIT)
    assert ids(trainer.train_dataset) == [row[:LIMIT] for row in ids(TOKENS)]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_documents_are_dropped_before_they_are_packed(tmp_path, tokenizer, strategy):
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 32, "eval_packing": False}
    trainer = make(tmp_path, TOKENS, tokenizer, short(), **packing)
    found = trainer.train_dataset
    assert sorted(token for row in found["input_ids"] for token in row) == [token for row in KEPT for token in row]
    assert sorted(length for row in found["seq_lengths"] for length in row) == sorted(map(len, KEPT))


def test_packed_rows_count_by_their_longest_document(tmp_path, tokenizer):
    rows = [{"input_ids": [7] * 30, "seq_lengths": lengths} for lengths in ([16, 14], [13, 17], [10, 10, 10])]
    trainer = make(tmp_path, Dataset.from_list(rows), tokenizer, short(), packing=True, max_length=64)
    assert trainer.train_dataset["seq_lengths"] == [[16, 14], [10, 10, 10]]


def test_streams_drop_rows_as_they_come_and_count_the_first_ones(tmp_path, tokenizer, caplog):
    trainer = make(tmp_path, TOKENS.to_iterable_dataset(), tokenizer, short())
    assert ids(trainer.train_dataset) == KEPT
    assert (
        "train rows that have more than 16 tokens for the student are dropped as they come; of the stream's first 8"
        in (caplog.text)
    )
    assert "stream's first 8 rows it is 3" in caplog.text
    assert "the train dataset is a stream: rows without a label are dropped, and rows longer than max_length" in (
        caplog.text
    )
    trainer.train()
    assert trainer.state.global_step == 1


def endless():
    while True:
        yield {"input_ids": [5] * 20}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TOKENS.select([1, 3, 5]), "all rows of the train dataset have more than 16 tokens for the student, and"),
        (IterableDataset.from_generator(endless), "the first 1,000 rows of the train dataset have more than 16 tokens"),
    ],
)
def test_nothing_left_is_refused(tmp_path, tokenizer, rows, message):
    with pytest.raises(ValueError, match=f"{message}.*drop_long_rows=True leaves none of them: lower max_length"):
        make(tmp_path, rows, tokenizer, short())


def test_an_evaluations_own_rows_are_dropped_too(tmp_path, tokenizer, caplog):
    trainer = make(tmp_path, TOKENS.select([0]), tokenizer, short())
    whole, kept = (trainer.evaluate(rows) for rows in (TOKENS, Dataset.from_dict({"input_ids": KEPT})))
    assert whole["eval_loss"] == kept["eval_loss"]
    assert len(trainer.predict(TOKENS).predictions) == len(KEPT)
    assert "3 of 8 test rows" in caplog.text


# ------------------------------------------------------------------------------------------ a text of the teacher's own


PROMPTS = Dataset.from_list(
    [
        {"prompt": "Q", "completion": text, "teacher_prompt": "Look at this. " * i if i % 2 else None}
        for i, text in enumerate(SENTENCES)
    ]
)


def lengths_with_own_prompt(tokenizer):
    texts = [(row["teacher_prompt"] or row["prompt"]) + row["completion"] + "<eos>" for row in PROMPTS]
    return [len(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
def test_prompts_of_the_teachers_own_that_are_too_long_are_dropped(tmp_path, tokenizer, caplog, base, is_stream):
    lengths = lengths_with_own_prompt(tokenizer)
    limit = sorted(lengths)[5]
    expected = [text for text, length in zip(SENTENCES, lengths, strict=True) if length <= limit]
    assert len(expected) < len(SENTENCES)
    rows = PROMPTS.to_iterable_dataset() if is_stream else PROMPTS
    model = make_model(seed=1, max_position_embeddings=limit)
    sides = {"student": model, "teacher": "base"} if base else {"teacher": model}
    others = {"peft_config": LoraConfig(target_modules=["q_proj"])} if base else {}
    trainer = make(tmp_path, rows, tokenizer, **sides, others=others)
    assert [row["completion"].removesuffix("<eos>") for row in trainer.train_dataset] == expected
    if not is_stream:
        assert f"of 8 train rows have more than {limit} tokens for the teacher" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match=rf"teacher_prompt and completion of row \d .*{limit} positions: shorten"):
        make(tmp_path, PROMPTS, tokenizer, **sides, others=others, drop_long_rows=False)


def test_rows_of_another_tokenizers_tokens_are_dropped(tmp_path, tokenizer, caplog):
    foreign = make_tokenizer(corpus=[sentence[::-1] for sentence in SENTENCES])
    lengths = [len(foreign(text)["input_ids"]) + 1 for text in SENTENCES]  # and the end of text
    limit = sorted(lengths)[4]
    teacher = make_model(seed=1, max_position_embeddings=limit)
    others = {"teacher_processing_class": foreign}
    rows = Dataset.from_dict({"text": SENTENCES})
    trainer = make(tmp_path, rows, tokenizer, teacher=teacher, others=others)
    expected = [text for text, length in zip(SENTENCES, lengths, strict=True) if length <= limit]
    assert tokenizer.batch_decode(ids(trainer.train_dataset), skip_special_tokens=True) == expected
    assert f"{8 - len(expected)} of 8 train rows have more than {limit} tokens for the teacher" in caplog.text
    with pytest.raises(ValueError, match=rf"own tokens of row \d .* {limit} positions: lower max_length, or set"):
        make(tmp_path, rows, tokenizer, teacher=teacher, others=others, drop_long_rows=False)


def test_a_table_of_positions_is_checked_for_the_teachers_own_text(tmp_path, tokenizer):
    rows = Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "teacher_input_ids": [5] * n + [6, 7]}
            | {"teacher_labels": [-100] * n + [6, 7]}
            for n in (3, 20)
        ]
    )
    given = {"teacher": short(), "dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="has 16 positions, and row 1 of the prepared rows has 22 tokens: shorten it"):
        make(tmp_path, rows, tokenizer, **given, drop_long_rows=False)
    assert make(tmp_path, rows, tokenizer, **given).train_dataset["teacher_input_ids"] == [[5] * 3 + [6, 7]]


# -------------------------------------------------------------------------------------------------- rollouts, the shell


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_prompts_without_room_for_a_rollout_are_dropped(tmp_path, tokenizer, caplog, side, is_stream):
    rows = Dataset.from_dict({"prompt": SENTENCES})
    lengths = [len(tokenizer(text)["input_ids"]) for text in SENTENCES]
    limit = sorted(lengths)[4]
    models = {"student": make_model(seed=2), "teacher": make_model(seed=1)}
    models[side] = make_model(seed=3, max_position_embeddings=limit + 10)
    args = SpeculativeKDConfig(output_dir=str(tmp_path), max_new_tokens=10, **SETTINGS)
    given = rows.to_iterable_dataset() if is_stream else rows
    trainer = SpeculativeKDTrainer(*models.values(), args, given, None, tokenizer)
    expected = [tokenizer(text)["input_ids"] for text, n in zip(SENTENCES, lengths, strict=True) if n <= limit]
    assert [row["student_prompt_ids"] for row in trainer.train_dataset] == expected
    who = f"more than {limit} tokens for the {side}, which max_new_tokens=10 follow,"
    assert (who if is_stream else f"of 8 train rows have {who} and are dropped") in caplog.text
    trainer.train()


def test_the_command_line_has_the_setting(folder, tmp_path, caplog):
    make_model(seed=4, max_position_embeddings=24).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    shared = options(folder, output_dir=tmp_path / "out", teacher_model=tmp_path / "short")
    cli.main(["kd", *shared, "--drop_long_rows"])
    assert "train rows have more than 24 tokens for the teacher and are dropped" in caplog.text
