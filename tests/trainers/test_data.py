"""Data sets on their way into a trainer: what TRL would train on without a word, and what is trained on here."""

import contextlib
import dataclasses
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import DataCollatorForSeq2Seq
from trl import SFTConfig, SFTTrainer

from hf_distill import KDConfig, LUPICollator
from hf_distill.collators import PromptCollator
from hf_distill.evaluation import evaluate_fidelity, perplexity
from hf_distill.losses.cross_tokenizer import Spans, cross_tokenizer_loss
from hf_distill.losses.fused_linear import Head, fused_linear_distillation_loss
from hf_distill.pruning import rank_layers
from hf_distill.rows import tokenized_row
from hf_distill.speculative import RolloutConfig, rollout
from hf_distill.token_alignment import SharedTokens
from hf_distill.token_rows import PEEKED_ROWS
from hf_distill.trainers.data import brought, check_columns, one_format, tell_columns
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.trainers.test_kd import make_trainer, settings
from tests.trainers.test_speculative_kd import make_trainer as make_speculative

VOCAB = 384
SHAREGPT = [{"from": "human", "value": "The small dog"}, {"from": "gpt", "value": "ran to the river."}]
CHAT = [{"role": "user", "content": "The small dog"}, {"role": "assistant", "content": "ran to the river."}]


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1)


@pytest.fixture
def student():
    return make_model("llama", seed=2)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return KDConfig(**settings(tmp_path_factory.mktemp("data")))


# ------------------------------------------------------------------------------------------------------ conversations

CONVERSATIONS = {
    "conversations": {"conversations": SHAREGPT},
    "conversations with roles": {"conversations": CHAT},
    "messages": {"messages": SHAREGPT},
    "role and value": {"messages": [{"role": m["role"], "value": m["content"]} for m in CHAT]},
    "content in parts": {
        "messages": [
            m | {"content": [{"type": "text", "text": part} for part in (m["content"][:5], m["content"][5:])]}
            for m in CHAT
        ]
    },
    "messages with human": {"messages": [{"role": "human", **CHAT[0]} | {"role": "human"}, CHAT[1] | {"role": "gpt"}]},
    "prompt and completion": {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
    "chat": {"messages": CHAT},
}


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_conversations_have_the_roles_of_templates_whatever_they_are_called(args, case, is_stream):
    dataset = Dataset.from_list([CONVERSATIONS[case]] * 2)
    found = next(iter(one_format(dataset.to_iterable_dataset() if is_stream else dataset, "train", args)))
    assert found.get("messages") or found["prompt"] + found["completion"] == CHAT
    assert found in ({"messages": CHAT}, {"prompt": CHAT[:1], "completion": CHAT[1:]})


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_collators_and_measurements_read_conversations_under_all_names(tokenizer, case):
    row, collator = CONVERSATIONS[case], PromptCollator(tokenizer)
    assert collator.encode(row) == collator.encode({"messages": CHAT})
    expected = CONVERSATIONS["chat"] if "prompt" not in row else {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert tokenized_row(row, tokenizer) == tokenized_row(expected, tokenizer)
    teacher_prompt = collator.encode({"prompt": CHAT[:1], "teacher_prompt": SHAREGPT[:1]})
    assert teacher_prompt["teacher_prompt_ids"] == teacher_prompt["student_prompt_ids"]


ROLES = {"human": "user", "gpt": "assistant", "system": "system", "bing": "assistant", "function": "tool"}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_of_from_and_value_has_its_name_in_templates(args, role):
    rows = Dataset.from_list([{"conversations": [*SHAREGPT, {"from": role, "value": "Yes."}]}])
    assert one_format(rows, "train", args)[0]["messages"][2] == {"role": ROLES[role], "content": "Yes."}


def test_unknown_role_is_refused_with_row_and_role(args, tokenizer):
    strange = [{"from": "narrator", "value": "Once."}]
    rows = Dataset.from_list([{"conversations": SHAREGPT}, {"conversations": strange}])
    for read in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="row 1 of the train dataset has the role 'narrator'"):
            list(one_format(read, "train", args))
    with pytest.raises(ValueError, match="a row has the role 'narrator'"):
        tokenized_row({"conversations": strange}, tokenizer)


def test_message_without_a_text_is_refused_but_for_one_that_calls_a_tool(args):
    empty = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": None}]
    call = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": "{}"}]}]
    picture = [{"role": "user", "content": [{"type": "image", "text": None}]}]
    for messages, message in ((empty, "row 0 .* no content"), (picture, "row 0 .* parts that are no text")):
        with pytest.raises(ValueError, match=message):
            list(one_format(Dataset.from_list([{"messages": messages}]), "train", args))
    assert one_format(Dataset.from_list([{"messages": call}]), "train", args)[0]["messages"][1]["tool_calls"]


def test_knowledge_has_the_roles_of_templates_though_the_first_row_has_none(args):
    rows = [{"prompt": CHAT[:1], "completion": CHAT[1:], "teacher_prompt": own} for own in (None, SHAREGPT[:1])]
    assert one_format(Dataset.from_list(rows), "train", args)[1]["teacher_prompt"] == CHAT[:1]


FORMS = {
    "messages before a text": (
        {"prompt": CHAT[:1], "completion": "ran"},
        "'prompt' as messages and 'completion' as text",
    ),
    "a text before messages": (
        {"prompt": "ran", "completion": CHAT[1:]},
        "'prompt' as text and 'completion' as messages",
    ),
    "a text as messages": ({"messages": "[{}]"}, "'messages', which has to be messages"),
    "messages as a text": ({"text": CHAT}, "'text', which has to be text; conversations go to a column 'messages'"),
    "a number": ({"text": 5}, "5 as its 'text', which has to be text"),
    "a list": ({"text": ["a", "b"]}, "as its 'text', which has to be text"),
}


@pytest.mark.parametrize("case", FORMS)
@pytest.mark.parametrize("is_stream", [False, True])
def test_cells_that_are_neither_text_nor_messages_are_refused(args, tokenizer, student, case, is_stream):
    row, message = FORMS[case]
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match=f"row 0 of the train dataset has .*{message}"):
        next(iter(one_format(dataset.to_iterable_dataset() if is_stream else dataset, "train", args)))
    with pytest.raises(ValueError, match=f"row 0 of the dataset has .*{message}"):
        perplexity(student, dataset, tokenizer)


def test_templates_keep_roles_of_their_own(args):
    messages = [{"role": "developer", "content": "Be short."}, *CHAT]
    assert one_format(Dataset.from_list([{"messages": messages}]), "train", args)[0]["messages"] == messages


TOOL_CALLS = [
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    for name, arguments in (("walk", {"where": "river"}), ("count", {"where": 1, "what": ["fish"]}))
]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tool_calls_whose_arguments_differ_in_type_come_as_they_are(args, column):
    """Such messages are kept as JSON, as `load_dataset` reads them from a file."""
    plain = [[CHAT[0], call, CHAT[1]] for call in TOOL_CALLS]
    named = [[SHAREGPT[0], {"from": "gpt", **call} | {"role": None}, SHAREGPT[1]] for call in TOOL_CALLS]
    for rows in (plain, named):
        dataset = Dataset.from_list([{column: messages} for messages in rows], on_mixed_types="use_json")
        for read in (dataset, dataset.to_iterable_dataset()):
            assert [row["messages"] for row in one_format(read, "train", args)] == plain


def test_trainers_read_from_and_value_as_role_and_content(tmp_path, tokenizer, student, teacher):
    expected = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    labels = [t if m else -100 for t, m in zip(expected["input_ids"], expected["assistant_masks"], strict=True)]
    trainer = make_trainer(
        tmp_path, student, teacher, Dataset.from_list([{"conversations": SHAREGPT}] * 2), tokenizer,
        assistant_only_loss=True, trainer_settings={"eval_dataset": {"a": Dataset.from_list([{"messages": SHAREGPT}])}},
    )  # fmt: skip
    for dataset in (trainer.train_dataset, trainer.eval_dataset["a"]):
        assert (dataset[0]["input_ids"], dataset[0]["labels"]) == (expected["input_ids"], labels)


@pytest.mark.parametrize("kind", ["rows", "mixed rows", "stream"])
def test_roles_that_templates_may_not_know_are_told_once(args, kind, caplog):
    odd = [{"role": "usr", "content": "a"}, {"role": "developer", "content": "b"}, *CHAT]
    rows = [{"messages": CHAT}, {"messages": odd}]
    if kind == "mixed rows":
        rows = [{"messages": [{**message, "extra": extra} for message in odd]} for extra in ("a", {"b": 1})]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json" if kind == "mixed rows" else None)
    with caplog.at_level(logging.WARNING, "hf_distill"):
        brought(dataset.to_iterable_dataset() if kind == "stream" else dataset, "held-out", args)
        if kind == "rows":
            brought(dataset.select([0]), "held-out", args)  # rows that were not chosen play no part
    (record,) = caplog.records
    assert "messages of the held-out dataset have the role 'usr': a chat template that does not" in record.getMessage()


@pytest.mark.parametrize(
    ("row", "changes", "is_told"),
    [
        ({"messages": CHAT}, {}, True),
        ({"conversations": SHAREGPT}, {}, True),
        ({"messages": CHAT}, {"assistant_only_loss": True}, False),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {}, False),
        ({"text": "a"}, {}, False),
    ],
)
def test_conversations_whose_questions_are_trained_on_are_told(tmp_path, row, changes, is_told, caplog):
    with caplog.at_level(logging.WARNING, "hf_distill"):
        brought(Dataset.from_list([row]), "train", KDConfig(**settings(tmp_path), **changes))
        brought(Dataset.from_list([row]), "eval", KDConfig(**settings(tmp_path), **changes))
    told = "every token of the conversations is trained on, those of system prompts and questions too"
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True] * is_told


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_in_which_the_assistant_says_nothing_are_dropped(tmp_path, tokenizer, student, teacher, caplog, is_stream):
    rows = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT}])
    given = rows.to_iterable_dataset() if is_stream else rows
    options = {"max_steps": 1, "assistant_only_loss": True}
    with caplog.at_level(logging.WARNING, "hf_distill"):
        trainer = make_trainer(tmp_path, student, teacher, given, tokenizer, **options)
    assert sum(1 for _ in trainer.train_dataset) == 2
    assert is_stream or "1 of 3 train rows have no message of the assistant" in caplog.text
    with pytest.raises(ValueError, match="no row of the train dataset has a label left"):
        make_trainer(tmp_path, student, teacher, rows.select([1]), tokenizer, **options)


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_held_out_completions_bear_labels_alone_whatever_the_training_rows_are(
    tmp_path, tokenizer, student, teacher, kind
):
    train = Dataset.from_list([{"text": SENTENCES[0]}] * 2 if kind == "text" else [{"messages": CHAT}] * 2)
    held_out = Dataset.from_list([{"prompt": "The small dog", "completion": " ran."}] * 2)
    trainer = make_trainer(tmp_path, student, teacher, train, tokenizer, trainer_settings={"eval_dataset": held_out})
    alone = make_trainer(tmp_path, student, teacher, held_out, tokenizer)
    assert trainer.eval_dataset[0]["labels"] == alone.train_dataset[0]["labels"]
    assert -100 in trainer.eval_dataset[0]["labels"]
    assert -100 not in trainer.train_dataset[0]["labels"]


@pytest.mark.parametrize("place", ["train_dataset", "eval_dataset"])
def test_an_empty_stream_is_told_as_such(tmp_path, tokenizer, student, teacher, place):
    def nothing():
        yield from ()

    empty, rows = IterableDataset.from_generator(nothing), Dataset.from_list([{"text": SENTENCES[0]}] * 2)
    given = {"train_dataset": rows, "eval_dataset": None, place: empty}
    with pytest.raises(ValueError, match="dataset is empty"):
        make_trainer(
            tmp_path, student, teacher, given["train_dataset"], tokenizer, max_steps=1,
            trainer_settings={"eval_dataset": given["eval_dataset"]},
        )  # fmt: skip


def test_a_template_without_marks_names_the_way_that_needs_none(tmp_path, student, teacher):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    rows = Dataset.from_list([{"messages": CHAT}] * 2)
    with pytest.raises(ValueError, match="Give the rows as prompt and completion, both of them messages"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, assistant_only_loss=True)
    rows = Dataset.from_list([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2)
    assert len(make_trainer(tmp_path, student, teacher, rows, tokenizer).train_dataset) == 2


# ------------------------------------------------------------------------------------------------ columns and formats

REFUSED = {
    "teacher's log-probabilities": (
        {"text": "A", "teacher_logprobs": [0.1]},
        "column 'teacher_logprobs', which nothing",
    ),
    "labels without ids": ({"text": "A", "labels": [1]}, "has 'labels', which speaks of tokens"),
    "mask without ids": ({"prompt": "A", "completion": "B", "completion_mask": [1]}, "has 'completion_mask'"),
    "mask that is not read": ({"input_ids": [5], "completion_mask": [1]}, "completion_only_loss=True alone"),
    "packed rows": ({"input_ids": [5, 6], "seq_lengths": [1, 1]}, "would see each other: set packing=True"),
    "no text": ({"question": "A"}, "has the columns question; it needs 'text'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_nobody_would_follow_are_refused(args, case):
    row, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_columns(Dataset.from_list([row]), "train", args, False)


ONE_OF_SEVERAL = {
    "text beside prompt and completion": ({"text": "A", "prompt": "B", "completion": "C"}, {"prompt", "completion"}),
    "text beside messages": ({"text": "A", "messages": CHAT}, {"messages"}),
    "prompt beside messages": ({"prompt": "A", "messages": CHAT}, {"messages"}),
    "prompt beside text": ({"prompt": "A", "text": "B"}, {"text"}),
    "pairs beside messages": ({"chosen": CHAT, "rejected": CHAT, "messages": CHAT}, {"messages"}),
    "messages beside prompt and completion": (
        {"messages": CHAT, "prompt": "A", "completion": "B"}, {"prompt", "completion"}
    ),
    "conversations beside messages": ({"conversations": SHAREGPT, "messages": CHAT}, {"messages"}),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_OF_SEVERAL)
@pytest.mark.parametrize("is_stream", [False, True])
def test_one_format_of_several_is_read_and_the_others_are_told(args, case, is_stream, caplog):
    row, used = ONE_OF_SEVERAL[case]
    dataset = Dataset.from_list([row])
    with caplog.at_level(logging.WARNING, "hf_distill"):
        found = one_format(dataset.to_iterable_dataset() if is_stream else dataset, "train", args)
    assert set(next(iter(found))) == used
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in row)


def test_end_of_text_goes_to_the_completion_though_there_is_a_text(tmp_path, tokenizer, student, teacher):
    rows = Dataset.from_list([{"text": "A dog", "prompt": "The small", "completion": " dog ran."}] * 2)
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    ids, prompt = (tokenizer(text)["input_ids"] for text in ("The small dog ran.<eos>", "The small"))
    assert trainer.train_dataset[0]["input_ids"] == ids
    assert trainer.train_dataset[0]["labels"] == [-100] * len(prompt) + ids[len(prompt) :]


def test_chat_template_is_needed_for_conversations_that_are_read_alone(tmp_path, student, teacher):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    both = Dataset.from_list([{"messages": CHAT, "prompt": "The small", "completion": " dog ran."}] * 2)
    texts = {"formatting_func": lambda row: row["messages"][1]["content"]}
    for rows, others in ((both, {}), (both.select_columns(["messages"]), texts)):
        assert (
            len(make_trainer(tmp_path, student, teacher, rows, tokenizer, trainer_settings=others).train_dataset) == 2
        )
    with pytest.raises(ValueError, match="the student's tokenizer has no chat template"):
        make_trainer(tmp_path, student, teacher, both.select_columns(["messages"]), tokenizer)


def test_mask_of_completions_is_left_unread_where_that_is_asked_for(args):
    rows = Dataset.from_list([{"input_ids": [5, 6], "completion_mask": [0, 1]}])
    check_columns(rows, "train", dataclasses.replace(args, completion_only_loss=False), False)


def test_collator_of_ones_own_gets_the_columns_that_it_gets_in_training(tmp_path, tokenizer, student, teacher):
    """It could not make tensors of texts."""
    rows = Dataset.from_dict({"text": SENTENCES})
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, eval_strategy="steps",
        trainer_settings={"data_collator": DataCollatorForSeq2Seq(tokenizer), "eval_dataset": rows},
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history
    expected = make_trainer(tmp_path, student, teacher, rows, tokenizer, trainer_settings={"eval_dataset": rows})
    assert logs[1]["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-5)


def test_text_of_a_formatting_func_is_what_is_trained_on(tmp_path, tokenizer, student, teacher):
    rows = Dataset.from_list([{"messages": CHAT}] * 2)
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer,
        trainer_settings={"formatting_func": lambda row: row["messages"][1]["content"]},
    )  # fmt: skip
    assert trainer.train_dataset[0]["input_ids"] == tokenizer("ran to the river.<eos>")["input_ids"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_of_several_formats_that_were_joined_are_refused_with_the_row(args, is_stream):
    texts, chats = Dataset.from_list([{"text": "A dog."}]), Dataset.from_list([{"messages": CHAT}] * 2)
    joined = concatenate_datasets([chats, texts])
    with pytest.raises(ValueError, match=r"row 2 of the train dataset has no 'messages'.*messages, text"):
        list(one_format(joined.to_iterable_dataset() if is_stream else joined, "train", args))
    with pytest.raises(ValueError, match="row 1 of the train dataset has no 'messages'"):
        list(one_format(IterableDataset.from_generator(lambda: iter([chats[0], texts[0]])), "train", args))
    chosen = joined.select([0, 1])
    assert len(one_format(chosen, "train", args)) == 2
    with pytest.raises(ValueError, match="row 1 of the train dataset has no 'text'"):
        one_format(Dataset.from_dict({"text": ["A", None]}), "train", args)
    with pytest.raises(ValueError, match="row 1 of the train dataset has no 'messages'"):
        one_format(Dataset.from_dict({"messages": [CHAT, []]}), "train", args)


def test_columns_that_are_not_read_are_told_in_one_line(args, caplog):
    with caplog.at_level(logging.INFO, "hf_distill"):
        tell_columns(Dataset.from_list([{"text": "A", "id": 1, "source": "web"}]), "train", args)
        tell_columns(Dataset.from_list([{"text": "A", "weight": 2.0}]), "train", args)
        tell_columns(Dataset.from_list([{"text": "A"}]), "train", args)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "of the train dataset text is read; not read: id, source"),
        ("WARNING", "of the train dataset text is read; not read: weight"),
    ]


# ------------------------------------------------------------------------------------- ids and labels that are no token


def bad_rows(column: str, value: int) -> Dataset:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(3)]
    rows[1][column] = [5, value, 7]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("way", "column", "value"),
    [
        ("prepared", "labels", -1), ("prepared", "labels", 9999), ("prepared", "input_ids", -1),
        ("skipped", "labels", -1), ("stream", "labels", -1), ("skipped stream", "labels", -1),
        ("held out", "labels", -1), ("transform", "labels", 9999),
    ],
)  # fmt: skip
def test_row_with_what_is_no_token_is_named_whichever_way_it_comes(
    tmp_path, tokenizer, student, teacher, column, value, way
):
    rows, good = bad_rows(column, value), bad_rows("labels", 6)
    skip = (
        {"dataset_kwargs": {"skip_prepare_dataset": True}} if way in ("skipped", "skipped stream", "transform") else {}
    )
    rows = rows.to_iterable_dataset() if "stream" in way else rows
    rows = rows.with_transform(lambda batch: batch) if way == "transform" else rows
    name = "eval" if way == "held out" else "train"
    with pytest.raises(ValueError, match=rf"row 1 of the {name} dataset has (the label|token id) {value} at place 1"):  # noqa: PT012
        train, evaluation = (good, rows) if way == "held out" else (rows, None)
        trainer = make_trainer(
            tmp_path, student, teacher, train, tokenizer, max_steps=2, per_device_train_batch_size=1,
            trainer_settings={"eval_dataset": evaluation}, **skip,
        )  # fmt: skip
        assert "stream" in way  # which is read when it comes to it
        trainer.train()


def test_rows_that_were_packed_once_are_not_packed_again(tmp_path, tokenizer, student, teacher):
    rows = Dataset.from_dict({"text": SENTENCES})
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        rows,
        tokenizer,
        packing=True,
        max_length=32,
        trainer_settings={"eval_dataset": rows},
    )
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "row",
    [
        {"student_prompt_ids": [5, -1], "teacher_prompt_ids": [5]},
        {"student_prompt_ids": [5], "teacher_prompt_ids": [5, VOCAB]},
        {"student_prompt_ids": [5], "teacher_prompt_ids": [5], "completion_ids": [6, -100]},
    ],
)
def test_prompts_and_completions_are_tokens(tmp_path, tokenizer, student, teacher, row):
    good = {"student_prompt_ids": [5], "teacher_prompt_ids": [5], "completion_ids": [6]}
    with pytest.raises(ValueError, match=r"row 1 of the train dataset has token id (-1|384|-100)"):
        make_speculative(tmp_path, student, teacher, Dataset.from_list([good, good | row]), tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"student_prompt_ids": [True, False], "teacher_prompt_ids": [5]}, "token id True"),
        ({"prompt": CHAT[:1], "completion": "ran"}, "'prompt' as messages and 'completion' as text"),
        ({"prompt": "The", "completion": CHAT[1:]}, "'prompt' as text and 'completion' as messages"),
        ({"prompt": 5}, "5 as its 'prompt', which has to be text or messages"),
    ],
)
def test_prompts_of_another_form_are_refused(tmp_path, tokenizer, student, teacher, row, message):
    with pytest.raises(ValueError, match=f"row 0 of the train dataset has {message}"):
        make_speculative(tmp_path, student, teacher, Dataset.from_list([row]), tokenizer)


def test_measurements_name_a_row_with_what_is_no_token(tokenizer, student, teacher):
    for column, value in (("labels", -1), ("labels", VOCAB), ("input_ids", -1), ("input_ids", VOCAB)):
        rows, message = bad_rows(column, value), rf"row 1 of the dataset has (the label|token id) {value} at place 1"
        with pytest.raises(ValueError, match=message):
            evaluate_fidelity(student, teacher, rows, tokenizer)
        with pytest.raises(ValueError, match=message):
            perplexity(student, rows, tokenizer)
        if column == "input_ids":
            with pytest.raises(ValueError, match=message):
                rank_layers(student, rows, tokenizer, 1)
    with pytest.raises(ValueError, match="3 input_ids and 2 labels"):
        perplexity(student, Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[6, 7]]}), tokenizer)
    with pytest.raises(ValueError, match="3 input_ids and 0 labels"):
        perplexity(student, Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[]]}), tokenizer)


def test_measurements_read_rows_in_every_format_and_follow_their_masks(tokenizer, student, teacher):
    rows = [[5 + i, 6, 7 + i, 8, 9] for i in range(3)]
    masked = Dataset.from_list([{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows])
    expected = evaluate_fidelity(student, teacher, masked, tokenizer)
    same = [
        masked.with_format("torch"),
        masked.with_format("numpy"),
        Dataset.from_list([{"input_ids": row, "completion_mask": [0, 0, 0, 1, 1]} for row in rows]),
        Dataset.from_list([{"input_ids": row, "assistant_masks": [False] * 3 + [True] * 2} for row in rows]),
        Dataset.from_list(
            [
                {"input_ids": [*row, 0], "labels": [-100] * 3 + row[3:] + [-100], "attention_mask": [1] * 5 + [0]}
                for row in rows
            ]
        ),
    ]
    for dataset in same:
        assert evaluate_fidelity(student, teacher, dataset, tokenizer) == expected
    padded = Dataset.from_list([{"input_ids": [*row, 0], "attention_mask": [1] * 5 + [0]} for row in rows])
    packed = Dataset.from_list([{"input_ids": row * 2, "seq_lengths": [5, 5]} for row in rows]).with_format("torch")
    for measure in (
        lambda data: perplexity(student, data, tokenizer),
        lambda data: rank_layers(student, data, tokenizer, 1),
    ):
        with pytest.raises(ValueError, match="row 0 of the dataset has padding"):
            measure(padded)
        assert measure(packed) == measure(packed.with_format(None))


def test_stream_may_bring_arrays_but_no_row_without_labels(tmp_path, tokenizer, student, teacher):
    rows = [[5, 6, 7], [8, 9, 10, 11]]

    def losses(stream):
        student.load_state_dict(make_model("llama", seed=2).state_dict())
        trainer = make_trainer(
            tmp_path, student, teacher, stream, tokenizer, max_steps=2, per_device_train_batch_size=1, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def arrays():
        yield from ({"input_ids": np.array(row, dtype=np.int32), "labels": torch.tensor(row)} for row in rows)

    def without():
        yield from ({"input_ids": rows[0], "labels": labels} for labels in (rows[0], None))

    assert losses(IterableDataset.from_generator(arrays)) == losses(
        Dataset.from_dict({"input_ids": rows, "labels": rows}).to_iterable_dataset()
    )
    with pytest.raises(ValueError, match=r"row 1 of the train dataset has no labels \(None\)"):
        losses(IterableDataset.from_generator(without))


def test_rollouts_refuse_prompts_that_are_no_tokens(student, teacher):
    prompts = torch.tensor([[5, -1, 7]]), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="student's prompts have token id -1"):
        rollout(student, teacher, *prompts, *prompts, RolloutConfig(4), eos_token_id=1, pad_token_id=0)


@pytest.mark.parametrize(("label", "is_fine"), [(-100, True), (9, True), (-1, False), (10, False), (9999, False)])
def test_losses_take_tokens_and_masked_labels_alone(label, is_fine):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(3, 4), torch.randn(12, 4), torch.tensor([1, label, 2])
    names = torch.arange(10)
    shared = SharedTokens(names, names, names, names)
    groups, tokens = torch.arange(3), torch.tensor([1, 2, 3])
    calls = [
        lambda: fused_linear_distillation_loss(hidden, weight, hidden, weight, labels, vocab_size=10),
        lambda: cross_tokenizer_loss(
            hidden, Head(weight), hidden, Head(weight), labels, Spans(tokens, groups, tokens, groups), shared
        ),
    ]
    for call in calls:
        if is_fine:
            assert call().loss.isfinite()
            continue
        with pytest.raises(ValueError, match=rf"labels\[1\] is {label}; -100 and 0 to 9 are possible"):
            call()
    strange = Spans(tokens, groups, torch.tensor([1, -1, 3]), groups)
    with pytest.raises(ValueError, match=r"teacher_tokens\[1\] is -1"):
        cross_tokenizer_loss(hidden, Head(weight), hidden, Head(weight), tokens, strange, shared)


def test_privileged_knowledge_may_have_any_column(tmp_path, tokenizer, student, teacher):
    rows = Dataset.from_list([{"query": "Where?", "teacher_notes": "There is a river."}] * 2)
    collator = LUPICollator(tokenizer, knowledge_column="teacher_notes")
    trainer = make_speculative(tmp_path, student, teacher, rows, tokenizer, others={"data_collator": collator})
    assert len(trainer.train_dataset) == 2
    with pytest.raises(ValueError, match="'teacher_logprobs', which nothing reads"):
        make_speculative(
            tmp_path, student, teacher, Dataset.from_list([{"prompt": "A", "teacher_logprobs": [0.1]}]), tokenizer
        )


# ------------------------------------------------------------------------------------------------- labels that are lost


def answers(long_prompts: int, long_answers: int, short: int) -> Dataset:
    """Prompts of 30 words and more, answers that end past 24 tokens, and rows that fit."""
    words = " ".join(SENTENCES).split()
    rows = [(" ".join(words[i : i + 30]), " yes") for i in range(long_prompts)]
    rows += [("Say:", " " + " ".join(words[i : i + 30])) for i in range(long_answers)]
    rows += [("Say:", f" {word}") for word in words[:short]]
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "completion": [answer for _, answer in rows]})


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
def test_prompts_that_fill_max_length_and_answers_that_are_cut_are_counted(
    tmp_path, tokenizer, student, teacher, caplog, packing, is_stream
):
    rows = answers(5, 3, 4)
    trainer = make_trainer(
        tmp_path, student, teacher, rows.to_iterable_dataset() if is_stream else rows, tokenizer, max_length=24,
        packing=packing,
    )  # fmt: skip
    filled = "the prompts of 5 fill max_length=24: raise it, or shorten the prompts"
    which = "first train" if is_stream else "train"
    assert f"5 of 12 {which} rows have no label and are dropped: {filled}" in caplog.text
    assert f"3 of 12 {which} rows are longer than max_length=24 and cut: they lose " in caplog.text
    assert "of all label-bearing tokens, the ends of their answers among them. Raise max_length" in caplog.text
    trainer.train()


def test_the_first_rows_of_a_long_stream_alone_are_counted(tmp_path, tokenizer, student, teacher, caplog):
    rows = answers(1, 0, 0).to_iterable_dataset().repeat(PEEKED_ROWS - 1)
    more = answers(9, 0, 4).to_iterable_dataset()
    make_trainer(
        tmp_path, student, teacher, concatenate_datasets([answers(0, 0, 1).to_iterable_dataset(), rows, more]),
        tokenizer, max_length=24,
    )  # fmt: skip
    assert "999 of 1000 first train rows have no label and are dropped: the prompts of 999 fill" in caplog.text
    assert "as they come; its first 1000 rows alone are counted" in caplog.text


def test_rows_that_fit_or_have_no_label_at_any_length_are_told_as_such(tmp_path, tokenizer, student, teacher, caplog):
    make_trainer(tmp_path / "fit", student, teacher, answers(0, 0, 4), tokenizer, max_length=24)
    assert "train rows" not in caplog.text
    ids = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6, 8]], "labels": [[-100, -100, 7], [-100] * 3]})
    make_trainer(tmp_path / "ids", student, teacher, ids, tokenizer, max_length=24)
    assert "1 of 2 train rows have no label and are dropped: 1 have none at any length (see their labels" in caplog.text
    caplog.clear()
    make_trainer(tmp_path / "none", student, teacher, ids, tokenizer, max_length=None)
    assert "1 of 2 train rows have no label and are dropped: 1 have none at any length" in caplog.text


def test_rows_that_are_all_filled_by_their_prompts_are_refused_with_the_reason(tmp_path, tokenizer, student, teacher):
    with pytest.raises(ValueError, match=r"no row .* has a label left .*the prompts of 5 fill max_length=24: raise it"):
        make_trainer(tmp_path, student, teacher, answers(5, 0, 0), tokenizer, max_length=24)


def test_rows_cut_in_two_steps_are_those_that_sft_trainer_cuts_in_one(tmp_path, tokenizer, student, teacher):
    rows = answers(5, 3, 4)
    for changes in ({}, {"shuffle_dataset": True}, {"truncation_mode": "keep_end"}):
        with pytest.warns(FutureWarning) if "truncation_mode" in changes else contextlib.nullcontext():
            ours = make_trainer(tmp_path, student, teacher, rows, tokenizer, max_length=24, **changes)
            theirs = SFTTrainer(
                make_model(seed=4), SFTConfig(**settings(tmp_path, max_length=24, **changes)), train_dataset=rows,
                processing_class=tokenizer,
            )  # fmt: skip
        assert ours.train_dataset[:] == theirs.train_dataset[:]
