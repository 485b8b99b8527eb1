"""Dirty data files: one line names data set, row and column before a weight is read, in Python and on the shell."""

import copy
import json

import pytest
from transformers import PreTrainedModel

from hf_distill import KDTrainer, SpeculativeKDTrainer, cli
from hf_distill.row_files import load_rows
from tests.conftest import SENTENCES
from tests.test_cli import options

TEXTS = [{"text": text} for text in SENTENCES]
PAIRS = [{"prompt": text[:10], "completion": text[10:]} for text in SENTENCES]
CHATS = [
    {"messages": [{"role": "user", "content": text[:10]}, {"role": "assistant", "content": text[10:]}]}
    for text in SENTENCES
]
# A row that is changed, in the middle of good ones, so that looking at the first row is not enough.
CHANGED = 3


def changed(rows, **cells):
    rows = copy.deepcopy(rows)
    rows[CHANGED] |= cells
    return rows


def user(content, **more):
    return [{"role": "user", "content": content, **more}]


ROW = f"row {CHANGED} of the train dataset"
DIRTY = {
    "no text": (changed(TEXTS, text=None), f"{ROW} has no 'text'"),
    "a number as text": (changed(TEXTS, text=5), f"{ROW} has 5 as its 'text', which has to be text"),
    "a list as text": (changed(TEXTS, text=["a", "b"]), rf"{ROW} has \['a', 'b'\] as its 'text'"),
    "a dict as text": (changed(TEXTS, text={"a": 1}), rf"{ROW} has \{{'a': 1\}} as its 'text'"),
    "true as text": (changed(TEXTS, text=True), f"{ROW} has True as its 'text'"),
    "numbers as texts": ([{"text": i} for i in range(9)], "row 0 of the train dataset has 0 as its 'text'"),
    "lists as texts": ([{"text": [t]} for t in SENTENCES], r"row 0 of the train dataset has \['.*as its 'text'"),
    "a row of another column": ([*TEXTS[:CHANGED], {"other": "a"}, *TEXTS[CHANGED:]], f"{ROW} has no 'text'"),
    "texts, then pairs": ([*PAIRS[:CHANGED], *TEXTS], f"{ROW} has no 'prompt'"),
    "conversations, then texts": ([*CHATS[:CHANGED], *TEXTS], f"{ROW} has no 'messages'"),
    "no prompt": (changed(PAIRS, prompt=None), f"{ROW} has no 'prompt'"),
    "no completion": (changed(PAIRS, completion=None), f"{ROW} has no 'completion'"),
    "a number as completion": (changed(PAIRS, completion=7), f"{ROW} has 7 as its 'completion'"),
    "a list as completion": (changed(PAIRS, completion=["a"]), rf"{ROW} has \['a'\] as its 'completion'"),
    "messages before a text": (changed(PAIRS, prompt=user("a")), f"{ROW} has 'prompt' as messages and 'completion' as"),
    "prompts alone": ([{"prompt": text} for text in SENTENCES], "the train dataset has the columns prompt; it needs"),
    "other names": ([{"question": "a", "answer": "b"}] * 4, "the train dataset has the columns answer, question;"),
    "an empty conversation": (changed(CHATS, messages=[]), f"{ROW} has no 'messages'"),
    "no conversation": (changed(CHATS, messages=None), f"{ROW} has no 'messages'"),
    "a text as conversation": (changed(CHATS, messages="hello"), f"{ROW} has 'hello' as its 'messages', which"),
    "a message as conversation": (changed(CHATS, messages=user("a")[0]), f"{ROW} has .* as its 'messages', which"),
    "texts as messages": (changed(CHATS, messages=["a", "b"]), rf"{ROW} has \['a', 'b'\] as its 'messages', which has"),
    "a text among messages": (changed(CHATS, messages=[*user("a"), "b"]), f"a message of {ROW} is 'b'; messages"),
    "a message without a role": (changed(CHATS, messages=[{"content": "a"}]), f"a message of {ROW} has no role"),
    "a message with no role": (
        changed(CHATS, messages=[{"role": None, "content": "a"}]), f"a message of {ROW} has no role"
    ),
    "a message without content": (changed(CHATS, messages=[{"role": "user"}]), f"a message of {ROW} has no content"),
    "a message with no content": (changed(CHATS, messages=user(None)), f"a message of {ROW} has no content"),
    "a number as content": (changed(CHATS, messages=user(5)), f"a message of {ROW} has 5 as its content, which"),
    "a dict as content": (changed(CHATS, messages=user({"a": 1})), f"a message of {ROW} has .*as its content"),
    "an image as content": (changed(CHATS, messages=user([{"type": "image"}])), f"a message of {ROW} has content in"),
    "an unknown role": (
        [{"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 4,
        "a message of row 0 of the train dataset has the role 'alien'; messages need",
    ),
    "tools that are no JSON": (
        [{**row, "tools": "search" if i == CHANGED else "[]"} for i, row in enumerate(CHATS)],
        f"{ROW} has 'search' as its 'tools', which has to be a list of tools",
    ),
    "an image": ([{**row, "image": "a.png"} for row in TEXTS], "the rows have pictures, and the student reads text"),
}  # fmt: skip
TABLES = {
    "an empty cell": ("prompt,completion\na,b\nc,\n", "row 1 of the train dataset has no 'completion'"),
    "a column of numbers": ("text\n1\n2\n", "row 0 of the train dataset has 1 as its 'text'"),
    "an empty text": ("text,n\nhello,1\n,2\n", "row 1 of the train dataset has no 'text'"),
    "the word NaN": ("text\nhello\nNaN\n", "row 1 of the train dataset has no 'text'"),
    "no known column": ("a,b\n1,2\n", "the train dataset has the columns a, b; it needs"),
}
# Token ids are checked against the vocabulary that student and teacher share, so the teacher is loaded before.
TOKENS = {
    "no ids": ([{"input_ids": [1, 2, 3]}, {"input_ids": None}], "row 1 of the train dataset has no input_ids"),
    "ids that are no integers": ([{"input_ids": [1.5, 2, 3]}], "row 0 of the train dataset has input_ids that are not"),
    "a text as ids": ([{"input_ids": "abc"}], "row 0 of the train dataset has input_ids that is not a list"),
    "an unknown id": ([{"input_ids": [1, 99999, 3]}], "row 0 of the train dataset has token id 99999 at place 1"),
    "a negative id": ([{"input_ids": [1, -2, 3]}], "row 0 of the train dataset has token id -2 at place 1"),
    "too few labels": ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "row 0 .* has 3 input_ids and 2 labels"),
    "a single token": ([{"input_ids": [1]}], "no row of the train dataset has a label left to train on"),
}  # fmt: skip


ROLLOUTS = {
    "no prompt": (changed(PAIRS, prompt=None), f"{ROW} has no prompt: it needs a 'prompt'"),
    "an empty prompt": (changed(PAIRS, prompt=""), f"{ROW} has no prompt"),
    "a number as prompt": (changed(PAIRS, prompt=5), f"{ROW} has 5 as its 'prompt', which has to be text or"),
    "a list as prompt": (changed(PAIRS, prompt=["a"]), rf"{ROW} has \['a'\] as its 'prompt'"),
    "messages before a text": (changed(PAIRS, prompt=user("a")), f"{ROW} has 'prompt' as messages and 'completion'"),
    "no completion": (changed(PAIRS, completion=None), f"{ROW} has no completion, and rollout_mix has a share"),
    "no conversation": (changed(CHATS, messages=None), f"{ROW} has no prompt"),
    "a text as conversation": (changed(CHATS, messages="hello"), f"{ROW} has 'hello' as its 'messages', which"),
    "a message without content": (changed(CHATS, messages=[{"role": "user"}]), f"a message of {ROW} has no content"),
    "an unknown role": (
        changed(CHATS, messages=[{"from": "alien", "value": "a"}]), f"a message of {ROW} has the role 'alien'"
    ),
    "tools that are no JSON": (
        [{**row, "tools": "search" if i == CHANGED else "[]"} for i, row in enumerate(CHATS)],
        f"{ROW} has 'search' as its 'tools', which has to be a list of tools",
    ),
}  # fmt: skip


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    return path


CASES = {name: (*case, "jsonl") for name, case in DIRTY.items()}
CASES |= {name: (*case, "csv") for name, case in TABLES.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_dirty_row_is_named_before_a_weight_is_read(folder, tmp_path, capsys, monkeypatch, case):
    rows, message, ending = CASES[case]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    path = write(tmp_path / f"rows.{ending}", rows)
    refuse(folder, tmp_path, capsys, path, message)


@pytest.mark.parametrize("case", ROLLOUTS)
def test_a_dirty_row_of_rollouts_is_named_before_a_weight_is_read(folder, tmp_path, capsys, monkeypatch, case):
    rows, message = ROLLOUTS[case]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    path = write(tmp_path / "rows.jsonl", rows)
    mix = {"dataset": 0.5, "speculative": 0.5}
    refuse(folder, tmp_path, capsys, path, message, "skd", SpeculativeKDTrainer, rollout_mix=mix)


@pytest.mark.parametrize("case", TOKENS)
def test_a_row_of_wrong_tokens_is_named(folder, tmp_path, capsys, case):
    rows, message = TOKENS[case]
    refuse(folder, tmp_path, capsys, write(tmp_path / "rows.jsonl", rows), message)


def refuse(folder, tmp_path, capsys, path, message, command="kd", trainer=KDTrainer, **settings):
    """Sees that command line and trainer refuse a file in the same line; held-out rows as well as those to train on."""
    flags = {name: json.dumps(value) for name, value in settings.items()}
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *options(folder, dataset=path, output_dir=tmp_path / "out", **flags)])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    shared = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, "report_to": []}
    models = str(folder / "student"), str(folder / "teacher")
    with pytest.raises(ValueError, match=message) as error:
        trainer(*models, trainer._config(**shared, **settings), load_rows(str(path), "train"))
    assert line == f"hf-distill {command}: error: {error.value}"
