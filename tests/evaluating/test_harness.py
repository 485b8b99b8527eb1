"""Tasks of lm-evaluation-harness on local files, against its own command line."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest

from hf_distill import cli
from hf_distill.evaluating import harness
from hf_distill.evaluating.gaps import gap_recovered
from hf_distill.evaluating.harness import HarnessTasks, check_tasks, task_measures
from tests.conftest import SENTENCES, make_model

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "(\\\\w)"}}, {{function: take_first}}]}}
  - {{name: whole, filter: [{{function: take_first}}]}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with three task files, and their rows beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": text.rsplit(" ", 1)[0], "choices": [f" {text.rsplit(' ', 1)[1]}", " word", " no"], "gold": i % 3}
        for i, text in enumerate(SENTENCES)
    ]
    for name, content in (("choices", rows), ("texts", [{"text": text} for text in SENTENCES])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = (("my_choice", CHOICES, "choices"), ("my_words", WORDS, "texts"), ("my_writing", WRITING, "choices"))
    for name, text, source in sources:
        (folder / f"{name}.yaml").write_text(text.format(name=name, rows=folder / f"{source}.jsonl"))
    return folder


def values(measures, model="student"):
    return {measure.name: measure.values[model] for measure in measures}


@pytest.mark.slow
def test_numbers_are_those_of_the_command_line_of_lm_eval(folder, tasks, tmp_path, tokenizer):
    names = ["my_choice", "my_words", "my_writing"]
    code = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = ["run", "--model", "hf", "--model_args", f"pretrained={folder / 'student'}", "--tasks", ",".join(names)]
    words += ["--include_path", tasks, "--device", "cpu", "--batch_size", "3", "--output_path", tmp_path / "out.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("out*.json")
    results = json.loads(path.read_text())["results"]
    found = values(
        task_measures(
            {"student": make_model(seed=1)}, {"student": tokenizer}, HarnessTasks(names, [str(tasks)]), batch_size=3
        )
    )
    expected = {
        f"{task} {metric}" + (f" ({kind})" if kind != "none" else ""): value
        for task, metrics in results.items()
        for key, value in metrics.items()
        for metric, _, kind in [key.partition(",")]
        if kind and "_stderr" not in metric
    }
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-6)


def test_values_of_questions_give_the_numbers_and_the_gap(tasks, tokenizer):
    models = {name: make_model(seed=1) for name in ("base", "student", "teacher")}
    for name, scale in (("student", 10.0), ("teacher", 30.0)):  # surer and surer of the wrong word, on every row
        models[name].lm_head.weight.data.mul_(scale)
    tokenizers = dict.fromkeys(models, tokenizer)
    names = HarnessTasks(["my_choice", "my_words"], [str(tasks)])
    found = {each.name: each for each in task_measures(models, tokenizers, names, batch_size=4)}
    accuracy = found["my_choice acc"]
    assert set(accuracy.sums["student"]) <= {0.0, 1.0}
    assert accuracy.values["student"] == accuracy.sums["student"].mean()
    words = found["my_words word_perplexity"]
    assert words.weights.tolist() == [len(text.split(" ")) for text in SENTENCES]
    nats = {name: each.sum() / words.weights.sum() for name, each in words.sums.items()}
    assert words.values == pytest.approx({name: np.exp(value) for name, value in nats.items()})
    expected = (nats["student"] - nats["base"]) / (nats["teacher"] - nats["base"])
    assert gap_recovered(words).share == pytest.approx(expected)
    assert found["my_words bits_per_byte"].sums is not None
    assert found["my_words bits_per_byte"].form == "{:.4f}"


def test_the_command_takes_tasks_of_a_folder_and_its_numbers_of_questions(folder, tasks, tmp_path, capsys):
    words = ["--model", folder / "student", "--tasks", "my_choice,my_writing", "--include_path", tasks]
    words += ["--limit", 4, "--num_fewshot", 1, "--output_dir", tmp_path]
    cli.main(["evaluate", *map(str, words)])
    assert "my_choice acc" in capsys.readouterr().out
    measures = json.loads((tmp_path / "evaluation.json").read_text())["measures"]
    assert {each["num_rows"] for each in measures.values()} == {4}
    assert "my_writing exact_match (first)" in measures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gsm8k"], "the task 'gsm8k' needs the data set 'openai/gsm8k', which is not in the cache here"),
        (["gsm9k"], "lm-evaluation-harness has no task 'gsm9k', nor is it a file; did you mean "),
        (["my_choice", "--include_path", "nowhere"], "include_path 'nowhere' is no folder"),
    ],
)
def test_tasks_that_are_not_here_are_one_line(folder, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--model", str(folder / "student"), "--output_dir", str(tmp_path), "--tasks", *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"hf-distill evaluate: error: {message}")


def test_the_files_of_tasks_are_read_once_in_a_process(tasks):
    check_tasks(HarnessTasks(["my_choice"], [str(tasks)]))
    first = harness._manager((str(tasks),))
    check_tasks(HarnessTasks(["my_words"], [str(tasks)]))
    assert harness._manager((str(tasks),)) is first


def test_a_missing_package_is_one_line_with_the_extra_to_install(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    harness._manager.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'hf_distill\[lm-eval\]'"):
        check_tasks(HarnessTasks(["arc_easy"]))


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="there are no tasks"):
        check_tasks(HarnessTasks([]))


def samples_of(metric, values):
    return [{"doc_id": i, metric: value} for i, value in enumerate(values)]


def test_a_number_that_its_questions_do_not_give_has_no_rows():
    """Of a group, or of an aggregation such as a corpus's BLEU or F1."""
    made = harness._measure("t f1", "f1", {"student": 0.7}, {"student": samples_of("f1", [(1, 0), (1, 1)])})
    assert made.values == {"student": 0.7}
    assert made.sums is None
    assert made.form == "{:.1%}"
    assert harness._measure("mmlu acc", "acc", {"student": 0.25}, {"student": []}).sums is None
    text = samples_of("bleu", [("a", "b"), ("c", "d")])
    assert harness._measure("t bleu", "bleu", {"student": 12.5}, {"student": text}).form == "{:.4f}"
