"""Tasks of lm-evaluation-harness (`lm_eval`), an optional package, in this process."""

import copy
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.evaluating.gaps import Measure, mean_measure, perplexity_measure
from hf_distill.modeling import causal_lm, evaluating, keep_4bit_weights

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness, with its own settings of the same names.

    Args:
        names: tasks, groups or tags that it knows, or paths of task files (`.yaml`).
        include_path: folders with more task files.
        num_fewshot (`int`, *optional*): examples before each question; by default the task's own number.
        limit (`int`, *optional*): questions of each task, from the first on.
        apply_chat_template (`bool`): whether questions go through the chat template of each model's tokenizer.
    """

    names: Sequence[str]
    include_path: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False


def check_tasks(tasks: HarnessTasks, tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None) -> None:
    """Loads tasks with their data sets, before any model is loaded.

    Args:
        tasks ([`HarnessTasks`]): what will be asked.
        tokenizers: by the names of models, to look whether they have chat templates where these are needed.

    Raises:
        `ValueError`: a tokenizer without a chat template that is needed; lm_eval is not installed; there is no such
            task or folder; the data set of a task is not here and cannot be downloaded.
    """
    if not tasks.names:
        raise ValueError("there are no tasks: name some")
    if missing := [path for path in tasks.include_path if not os.path.isdir(path)]:
        raise ValueError(f"include_path {missing[0]!r} is no folder: give the one that your task files (.yaml) lie in")
    for name, tokenizer in (tokenizers or {}).items():
        if tasks.apply_chat_template and tokenizer.chat_template is None:
            raise ValueError(
                f"apply_chat_template needs a chat template, and the {name}'s tokenizer has none: leave it out, or set "
                "tokenizer.chat_template and save the tokenizer"
            )
    try:
        manager = _manager(tuple(tasks.include_path))
    except ImportError as error:
        raise ValueError(
            f"tasks need lm-evaluation-harness ({error}): pip install 'hf_distill[lm-eval]', or leave the tasks out"
        ) from error
    for name in tasks.names:
        if name not in manager.all_tasks and not os.path.isfile(name):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; `lm-eval ls tasks` lists those that it has"
            raise ValueError(f"lm-evaluation-harness has no task {name!r}, nor is it a file{hint}")
        try:
            manager.load([name])
        except (OSError, DatasetsError, HfHubHTTPError, ValueError, RuntimeError) as error:
            raise ValueError(_loading_problem(manager, name, error)) from error


def task_measures(
    models: Mapping[str, PreTrainedModel],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    tasks: HarnessTasks,
    *,
    batch_size: int = 8,
) -> list[Measure]:
    """The numbers that `lm-eval run` prints, of each model, by task, metric and filter.

    Those that are means over questions, or perplexities made of such means, have the values of the questions. Others,
    such as those of whole groups of tasks, have none, and so no gap. Global random numbers are seeded as lm_eval does.

    Args:
        models: by the names of [`~hf_distill.evaluating.models.evaluate_models`].
        tokenizers: by the same names.
        tasks ([`HarnessTasks`]): what is asked.
        batch_size (`int`): requests at once.

    Raises:
        `ValueError`: see [`check_tasks`].
    """
    check_tasks(tasks, tokenizers)
    found = {name: _evaluated(model, tokenizers[name], tasks, batch_size) for name, model in models.items()}
    first = next(iter(found.values()))
    measures = []
    for task, metrics in first["results"].items():
        for key in metrics:
            metric, _, filtered = key.partition(",")
            if filtered and "_stderr" not in metric:
                values = {name: each["results"][task][key] for name, each in found.items()}
                samples = {name: _samples(each["samples"].get(task, []), filtered) for name, each in found.items()}
                title = f"{task} {metric}" + (f" ({filtered})" if filtered != "none" else "")
                if all(isinstance(value, int | float) for value in values.values()):
                    measures.append(_measure(title, metric, values, samples))
    return measures


@cache
def _manager(include_path: tuple[str, ...]) -> Any:
    """The tasks that there are: thousands of files are read, once per process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path) or None)


def _loading_problem(manager: Any, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    missing = re.search(r"'([^']+)' on the Hub", reason)
    if missing is None:
        return f"the task {name!r} cannot be loaded: {reason}"
    settings = getattr(manager.task_index.get(name), "cfg", None) or {}
    part = f", {settings['dataset_name']!r}" if settings.get("dataset_name") else ""
    return (
        f"the task {name!r} needs the data set {missing[1]!r}, which is not in the cache here, and the hub cannot be "
        f"reached: run datasets.load_dataset({missing[1]!r}{part}) once with a network, or give a task file with local "
        "rows (dataset_path: json) by --include_path"
    )


def _evaluated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: HarnessTasks, batch_size: int
) -> dict[str, Any]:
    """The results of lm_eval."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = causal_lm(model)
    keep_4bit_weights(model)
    evaluate_tasks: Any = simple_evaluate
    wrap: Any = HFLM
    with evaluating(model), _without_advice():
        # It gives the tokenizer a pad token.
        lm = wrap(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        return evaluate_tasks(
            model=lm,
            tasks=list(tasks.names),
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            apply_chat_template=tasks.apply_chat_template,
            task_manager=_manager(tuple(tasks.include_path)),
            bootstrap_iters=0,
            log_samples=True,
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without the warning that a model was given as an object."""
    logger = logging.getLogger("lm_eval.models.huggingface")

    def is_other(record: logging.LogRecord) -> bool:
        return "`pretrained` model kwarg is not of type" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _samples(samples: Sequence[Sample], filtered: str) -> list[Sample]:
    return sorted((each for each in samples if each["filter"] == filtered), key=lambda each: each["doc_id"])


def _measure(title: str, metric: str, values: Mapping[str, float], samples: Mapping[str, Sequence[Sample]]) -> Measure:
    """A measure with the values of its questions, where these give the value of the whole."""
    rows = {name: [each[metric] for each in of_model if metric in each] for name, of_model in samples.items()}
    for make in (_mean, _perplexity, _weighted_perplexity, _weighted_bits):
        try:
            made = make(title, {name: np.array(each, dtype=np.float64) for name, each in rows.items()})
        except (IndexError, OverflowError, TypeError, ValueError, ZeroDivisionError):
            continue  # these values are of another kind
        if all(math.isclose(made.values[name], values[name], rel_tol=1e-6, abs_tol=1e-9) for name in values):
            return made._replace(values=dict(values), form=_form(metric, values))
    return Measure(title, dict(values), form=_form(metric, values))


def _mean(title: str, rows: Mapping[str, np.ndarray]) -> Measure:
    if any(each.ndim != 1 or not len(each) for each in rows.values()):
        raise ValueError("no numbers")
    return mean_measure(title, rows)


def _perplexity(title: str, rows: Mapping[str, np.ndarray]) -> Measure:
    """Of log-likelihoods (R,)."""
    if any(each.ndim != 1 or not len(each) for each in rows.values()):
        raise ValueError("no numbers")
    return perplexity_measure(title, {name: -each for name, each in rows.items()}, np.ones(_num_rows(rows)))


def _weighted_perplexity(title: str, rows: Mapping[str, np.ndarray]) -> Measure:
    """Of log-likelihoods and weights (R, 2), such as the words of a text."""
    weights = next(iter(rows.values()))[:, 1]
    return perplexity_measure(title, {name: -each[:, 0] for name, each in rows.items()}, weights)


def _weighted_bits(title: str, rows: Mapping[str, np.ndarray]) -> Measure:
    weights = next(iter(rows.values()))[:, 1]
    return mean_measure(title, {name: -each[:, 0] / math.log(2) for name, each in rows.items()}, weights)


def _num_rows(rows: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(rows.values())))


def _form(metric: str, values: Mapping[str, float]) -> str:
    is_score = "perplexity" not in metric and "bits" not in metric
    return "{:.1%}" if is_score and all(0 <= value <= 1 for value in values.values()) else "{:.4f}"
