"""`--dataset a:0.7 b:0.3`: which rows are read, and how many of each source."""

import json
from collections import Counter

import pytest
import yaml
from datasets import Dataset

from hf_distill import HardLabelConfig, cli
from hf_distill.cli.arguments import SFTArguments, SKDArguments
from hf_distill.cli.data import load_datasets
from hf_distill.cli.mixing import Source, mixed, read_sources
from tests.test_cli import error_of, options


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of rows whose first letters say which it is, and one of conversations."""
    folder = tmp_path_factory.mktemp("sources")
    for name, number in (("a", 300), ("b", 1000)):
        Dataset.from_dict({"text": [f"{name}{i}" for i in range(number)]}).to_json(folder / f"{name}.jsonl")
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]] * 5
    Dataset.from_dict({"messages": turns}).to_json(folder / "chat.jsonl")
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rows.jsonl", [("rows.jsonl", None)]),
        ("user/rows:0.5", [("user/rows", 0.5)]),
        (["a:0.7", "b:.3"], [("a", 0.7), ("b", 0.3)]),
        (["C:\\rows:2", "b:1e1"], [("C:\\rows", 2.0), ("b", 10.0)]),
        (["C:\\rows"], [("C:\\rows", None)]),
        (["rows:train"], [("rows:train", None)]),
        ([":1"], [(":1", None)]),
    ],
)
def test_the_number_after_the_last_colon_is_the_weight(words, expected):
    assert read_sources(words) == [Source(*each) for each in expected]


def test_a_path_that_ends_in_a_number_is_a_path(tmp_path):
    (tmp_path / "rows:3").mkdir()
    name = str(tmp_path / "rows:3")
    assert read_sources([name]) == [Source(name, None)]
    assert read_sources([f"{name}:0.5", "b:0.5"])[0] == Source(name, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:0.7", "b"], "--dataset: 'b' has no weight; of several sources each needs one, as in a:0.7 b:0.3"),
        (["a", "b"], "--dataset: 'a' has no weight"),
        (["a:0.7", "b:three"], "--dataset: 'b:three' has no weight"),
        (["a:0", "b:1"], "--dataset: the weight of 'a' has to be above 0 and finite, got 0"),
        (["a:1", "b:-2"], "--dataset: the weight of 'b' has to be above 0 and finite, got -2"),
        (["a:nan", "b:1"], "above 0 and finite, got nan"),
        (["a:inf", "b:1"], "above 0 and finite, got inf"),
        (["a:1", "a:2"], "--dataset names 'a' twice"),
    ],
)
def test_wrong_weights_are_told_in_one_line_before_anything_is_loaded(folder, tmp_path, capsys, words, message):
    given = options(folder, output_dir=tmp_path)
    at = given.index("--dataset")
    assert message in error_of(capsys, [*given[: at + 1], *words, *given[at + 2 :]])


def load(*words, kind=SFTArguments, seed=0, **changes):
    args = HardLabelConfig(output_dir="unused", use_cpu=True, bf16=False, seed=seed)
    return load_datasets(kind(model="m", dataset=list(words), **changes), args)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (7, 3)])
def test_shares_are_the_weights_and_no_row_comes_twice(sources, caplog, weights):
    caplog.set_level("INFO", "hf_distill")
    rows, held_out = load(*(f"{sources / name}.jsonl:{weight}" for name, weight in zip("ab", weights, strict=True)))
    assert held_out is None
    texts = rows["text"][:]
    assert len(set(texts)) == len(texts)
    counts = Counter(text[0] for text in texts)
    assert counts["a"] == 300  # the mix ends with this source
    assert abs(counts["b"] / len(texts) - 0.3) < 4 * (0.7 * 0.3 / len(texts)) ** 0.5  # four standard deviations
    used = {text for text in texts if text[0] == "b"}
    assert used != {f"b{i}" for i in range(len(used))}  # a random part, not the first rows
    halves = [Counter(text[0] for text in part) for part in (texts[: len(texts) // 2], texts[len(texts) // 2 :])]
    assert all(half["b"] > 0.2 * half.total() for half in halves)  # mixed, not one after the other
    assert f"300 of 300 rows of {sources / 'a.jsonl'} (" in caplog.text
    assert f"{counts['b']} of 1,000 rows of {sources / 'b.jsonl'} (" in caplog.text


def test_the_seed_decides_the_mix(sources):
    words = [f"{sources / name}.jsonl:1" for name in "ab"]
    first, again, other = (load(*words, seed=seed)[0]["text"][:] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_templates_are_filled_for_each_source_and_splits_taken(tmp_path):
    for name, column in (("a", "question"), ("b", "question")):
        Dataset.from_dict({column: [f"{name}{i}" for i in range(10)], f"only_{name}": ["x"] * 10}).to_json(
            tmp_path / f"{name}.jsonl"
        )
    words = [f"{tmp_path / name}.jsonl:1" for name in "ab"]
    templates = {"prompt_template": "{question}?", "completion_template": " {question}!"}
    rows, held_out = load(*words, **templates, train_split="train[:50%]", eval_dataset=str(tmp_path / "a.jsonl"))
    assert set(rows["prompt"]) <= {f"{name}{i}?" for name in "ab" for i in range(5)}
    assert rows.column_names == held_out.column_names == ["prompt", "completion"]
    assert len(held_out) == 10


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("a", "chat"), {}, r"would be read from different columns \(.*a.jsonl: text; .*chat.jsonl: messages\)"),
        (("a", "b"), {"dataset_config": "main"}, "--dataset_config is for one source of --dataset"),
        (("a", "b"), {"eval_split": "test"}, "--eval_split of several sources needs --eval_dataset"),
        (("a", "none"), {}, "none.jsonl' does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(sources, names, changes, message):
    with pytest.raises(ValueError, match=message):
        load(*(f"{sources / name}.jsonl:1" for name in names), **changes)


def test_columns_of_different_types_are_told_in_one_line():
    rows = {Source("a", 1.0): Dataset.from_dict({"text": ["x"]}), Source("b", 1.0): Dataset.from_dict({"text": [1]})}
    with pytest.raises(ValueError, match=r"the sources of --dataset do not go together: [^\n]*$"):
        mixed(rows, 0)


def test_general_questions_are_mixed_with_rows_that_have_knowledge(folder, tmp_path):
    Dataset.from_dict({"query": [f"general {i}" for i in range(20)]}).to_json(tmp_path / "general.jsonl")
    words = [f"{folder / 'facts.jsonl'}:0.6", f"{tmp_path / 'general.jsonl'}:0.4"]
    rows, _ = load(*words, kind=SKDArguments, teacher_model=["t"], knowledge_column="knowledge")
    assert {row["knowledge"] is None for row in rows if row["query"].startswith("general")} == {True}
    assert all(row["knowledge"] for row in rows if not row["query"].startswith("general"))
    given = options(folder, output_dir=tmp_path / "out", max_new_tokens=8, knowledge_column="knowledge", max_steps=1)
    at = given.index("--dataset")
    cli.main(["skd", *given[: at + 1], *words, *given[at + 2 :], "--allow_missing_knowledge"])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_recipe_and_a_store_take_several_sources_too(folder, tmp_path, capsys):
    for name, part in (("a", slice(0, 5)), ("b", slice(5, 8))):
        lines = (folder / "rows.jsonl").read_text().splitlines()[part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = [f"{tmp_path / 'a.jsonl'}:0.6", f"{tmp_path / 'b.jsonl'}:0.4"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"dataset": words}))
    given = options(
        folder, config=tmp_path / "recipe.yaml", eval_dataset=tmp_path / "a.jsonl", output_dir=tmp_path / "store"
    )
    at = given.index("--dataset")
    given = given[:at] + given[at + 2 :]
    cli.main(["cache", "write", *given])
    shown = capsys.readouterr().out
    assert f"--dataset {words[0]} {words[1]}" in shown
    run = [*given, "--teacher_model", f"cache:{tmp_path / 'store'}", "--output_dir", str(tmp_path / "out")]
    cli.main(["kd", *run])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["dataset"] == words
    assert "--dataset a.jsonl:0.6 b.jsonl:0.4 " in (tmp_path / "out" / "README.md").read_text()
