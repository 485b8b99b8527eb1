"""The command `evaluate`: base, student and teacher side by side."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import ProcessorMixin

from hf_distill import __version__
from hf_distill.cli.arguments import EvaluateArguments
from hf_distill.cli.data import filled, lupi_collator, placed, refuse_ignored, refuse_one_template, with_prompts
from hf_distill.cli.reporting import PAGE, optional
from hf_distill.collators import PromptCollator
from hf_distill.evaluating.gaps import BASE, STUDENT, TEACHER, measures_data
from hf_distill.evaluating.harness import HarnessTasks, check_tasks
from hf_distill.evaluating.models import Evaluated, Scoring, check_questions, evaluate_models, is_vocabulary_shared
from hf_distill.evaluating.questions import PictureQuestions, Questions, picture_questions, questions_of
from hf_distill.model_files import name_problem
from hf_distill.modeling import tokenizer_of
from hf_distill.named import blindness, load_processor, load_tokenizer
from hf_distill.page import save_page
from hf_distill.picture_rows import has_pictures
from hf_distill.report import evaluation_rows, table
from hf_distill.row_files import first_rows, load_splits, take_split
from hf_distill.rows import fill_templates
from hf_distill.runs import ANSWERS_FILE, EVALUATION_FILE
from hf_distill.saving import base_and_adapter, is_adapter_folder, refuse_folder
from hf_distill.teachers.loading import check_quantization, load_teacher
from hf_distill.teachers.remote import is_address

PARTIAL = "evaluation-unfinished"  # the folder of what was measured before the rest
AUTO = "auto"
OPTIONS = {BASE: "--base", STUDENT: "--model", TEACHER: "--teacher_model"}
HELD_OUT = ("test", "validation")  # splits, in the order in which they are looked for
GAP = (
    "gap recovered: (student - base) / (teacher - base), with its 95% interval over rows; none where teacher and base "
    "do not differ"
)


def evaluate(arguments: EvaluateArguments) -> None:
    """Measures models side by side; prints a table and writes `evaluation.json` and `answers.jsonl`.

    They are written after each part, so that an error in the next one, maybe hours later, loses nothing.

    Raises:
        `ValueError`: models or rows that cannot be read, or options that do not go together.
    """
    _refuse_options(arguments)
    folder = _output_folder(arguments)
    refuse_folder(folder)
    names, notes = _names(arguments)
    rows, split = (None, None) if arguments.dataset is None else _rows(arguments)
    is_seen, seeing_notes = _sees_pictures(names, rows, arguments)
    tokenizers, found_notes = _tokenizers(names, arguments, pictures=is_seen)
    notes += [*seeing_notes, *found_notes, *_notes_on_rows(rows, split, arguments)]
    tasks = _tasks(arguments)
    if tasks is not None:
        check_tasks(tasks, {role: tokenizer_of(each) for role, each in tokenizers.items()})
    if rows is not None and not (arguments.generate or _has_texts(rows, arguments)):
        raise ValueError(
            f"the rows of {arguments.dataset!r} have prompts without completions, so there is nothing to measure on "
            "them: give --generate and --answer_column"
        )
    questions = _questions(rows, arguments, tokenizers) if rows is not None and arguments.generate else None
    models = _load(names, arguments)
    if questions is not None:
        check_questions(models, tokenizers, questions, arguments.max_new_tokens)
    parts: dict[str, dict[str, Any]] = {}
    if rows is not None and _has_texts(rows, arguments):
        parts["rows"] = {"rows": rows, "max_length": arguments.max_length}
    if questions is not None:
        parts["generated answers"] = {"questions": questions, "scoring": _scoring(arguments)}
    if tasks is not None:
        parts["tasks"] = {"tasks": tasks}
    describe = partial(_data, arguments=arguments, names=names, split=split, notes=notes)
    measure = partial(evaluate_models, models, tokenizers, batch_size=arguments.batch_size)
    _show(_measured(parts, measure, describe, folder), arguments, folder)


def _measured(
    parts: dict[str, dict[str, Any]],
    measure: Callable[..., Evaluated],
    describe: Callable[..., dict[str, Any]],
    folder: str,
) -> dict[str, Any]:
    """Measures one part after the other and writes what there is after each; returns what was written last."""
    found = Evaluated([], [], [])
    data: dict[str, Any] = {}
    for number, (name, part) in enumerate(parts.items(), 1):
        try:
            more = measure(**part)
        except ValueError as error:
            if not data:
                raise
            raise ValueError(f"{name}: {error} (what was measured before is in {Path(folder, PARTIAL)})") from error
        found.measures.extend(more.measures)
        found.generated.extend(more.generated)
        found.notes.extend(more.notes)
        missing = " and ".join(list(parts)[number:])
        data = describe(
            found, unfinished=[f"The measuring has not finished: {missing} are missing."] if missing else []
        )
        _write(folder, data, found, is_whole=not missing)
    return data


def _refuse_options(arguments: EvaluateArguments) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluate runs in one process: start it without accelerate launch or torchrun")
    if arguments.dataset is None and arguments.tasks is None:
        raise ValueError("there is nothing to measure: give --dataset, --tasks or both")
    of_rows, of_tasks = ("generate", "dataset_config", "split"), ("include_path", "num_fewshot", "limit")
    for given, needed in ((of_rows, "dataset"), ((*of_tasks, "apply_chat_template"), "tasks")):
        if getattr(arguments, needed) is None and (names := [name for name in given if getattr(arguments, name)]):
            raise ValueError(f"--{names[0]} needs --{needed}")
    refuse_one_template(arguments)
    if arguments.batch_size < 1 or arguments.max_rows < 1:
        raise ValueError("batch_size and max_rows have to be at least 1")
    if arguments.knowledge_column is not None and not arguments.generate:
        raise ValueError("--knowledge_column is for answers: it needs --generate")
    if arguments.answer_column is not None and not arguments.generate:
        raise ValueError("--answer_column needs --generate")
    if arguments.teacher_device in ("sharded", "paired"):
        raise ValueError(f"--teacher_device {arguments.teacher_device} is for several processes, and evaluate is one")
    if arguments.tasks is not None and arguments.teacher_device == "offload":
        raise ValueError("--tasks needs the teacher whole on a device: leave --teacher_device offload out")
    refuse_ignored(arguments)
    _scoring(arguments)
    check_quantization(arguments.teacher_quantization)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {arguments.device!r} is no device of this machine: {error}") from error
    teacher = arguments.teacher_model
    if teacher is not None and (is_address(teacher) or teacher.startswith("cache:")):
        raise ValueError(f"--teacher_model {teacher!r} is no model that can be loaded: evaluate generates with it")


def _scoring(arguments: EvaluateArguments) -> Scoring:
    stop = [text.replace("\\n", "\n") for text in arguments.stop or ()]
    return Scoring(arguments.metrics, arguments.answer_pattern, arguments.max_new_tokens, stop)


def _tasks(arguments: EvaluateArguments) -> HarnessTasks | None:
    if arguments.tasks is None:
        return None
    return HarnessTasks(
        [name for names in arguments.tasks for name in names.split(",") if name],
        arguments.include_path or [],
        arguments.num_fewshot,
        arguments.limit,
        arguments.apply_chat_template,
    )


def _output_folder(arguments: EvaluateArguments) -> str:
    return arguments.output_dir or (arguments.model if os.path.isdir(arguments.model) else "evaluate_out")


# -------------------------------------------------------------------------------------------------------- the models


def _names(arguments: EvaluateArguments) -> tuple[dict[str, str], list[str]]:
    """The models by their roles, and notes; `ValueError` for a name without a model."""
    base, notes = arguments.base, []
    if base == AUTO:
        base = _base_of(arguments.model)
        if base is not None and (problem := name_problem(base, {"trust_remote_code": arguments.trust_remote_code})):
            notes.append(f"The student began as {base}, which is left out: {problem}.")
            base = None
    named = {BASE: base, STUDENT: arguments.model, TEACHER: arguments.teacher_model}
    names = {role: name for role, name in named.items() if name is not None}
    for role, name in names.items():
        for part in dict.fromkeys((name, base_and_adapter(name)[0])):
            if problem := name_problem(part, {"trust_remote_code": arguments.trust_remote_code}):
                of = "" if part == name else f", whose adapters belong to {part!r}"
                raise ValueError(f"{OPTIONS[role]} {name!r}{of}: {problem}")
    return names, notes


def _base_of(model: str) -> str | None:
    """The model that a student was before its training, as its adapter or its run names it.

    If the run continued an adapter, that is the model before, and not what the adapter is for. Otherwise the adapter
    knows better than the run: a stage has restored layers of the model that the run names.
    """
    settings = Path(model, "settings.json")
    began = json.loads(settings.read_text("utf-8")).get("model") if settings.is_file() else None
    began = began if isinstance(began, str) and began != model else None
    base, adapter = base_and_adapter(model)
    continued = began is not None and is_adapter_folder(began)
    return base if adapter is not None and not continued else began


def _sees_pictures(names: dict[str, str], rows: Dataset | None, arguments: EvaluateArguments) -> tuple[bool, list[str]]:
    """True for rows with pictures, and a student that reads them; and notes.

    A base that was found by itself and does not read them is taken out of `names`.

    Raises:
        `ValueError`: another model that does not read them, or options that do not go together with pictures.
    """
    if not has_pictures(rows):
        return False, []
    blind = {
        role: reason
        for role, name in names.items()
        if (reason := blindness(base_and_adapter(name)[0], None, arguments.trust_remote_code))
    }
    if STUDENT in blind:
        return False, [f"The student {blind[STUDENT]}: the pictures of the rows are left out."]
    notes = []
    if BASE in blind and arguments.base == AUTO:
        name, reason = names.pop(BASE), blind.pop(BASE)
        notes.append(f"The student began as {name}, which is left out: it {reason}.")
    if blind:
        role, reason = next(iter(blind.items()))
        raise ValueError(
            f"the rows have pictures, and {OPTIONS[role]} {names[role]!r} {reason}: leave it out, or remove the column "
            "of pictures"
        )
    if arguments.knowledge_column is not None:
        raise ValueError("the rows have pictures, and --knowledge_column makes prompts of text alone: leave it out")
    return True, notes


def _tokenizers(
    names: dict[str, str], arguments: EvaluateArguments, *, pictures: bool
) -> tuple[dict[str, Any], list[str]]:
    """The student's tokenizer, and the teacher's, unless it is the student's without a chat template; and notes.

    For rows with pictures they are processors, and the teacher's is always there. A base that was found by itself and
    has another vocabulary is taken out of `names`; one that was given is refused.
    """
    what, load = ("processor", load_processor) if pictures else ("tokenizer", load_tokenizer)
    own = {role: _saved_with(name, load, arguments) for role, name in names.items()}
    student, teacher, base = own[STUDENT], own.get(TEACHER), own.get(BASE)
    if isinstance(student, str):
        raise ValueError(
            f"--model {names[STUDENT]!r} has no {what} that works here ({student}): save it with the model"
        )
    notes = [f"The {role} has no {what}: it reads with the student's." for role in own if isinstance(own[role], str)]
    if not isinstance(base, str | None) and not is_vocabulary_shared(student, base):
        if arguments.base != AUTO:
            raise ValueError(
                f"--base {names[BASE]!r} has another vocabulary than the student, so it was not the student before its "
                "training: name another one, or give --base None"
            )
        notes.append(f"The student began as {names.pop(BASE)}, which is left out: its vocabulary is another one.")
    if isinstance(teacher, str | None):
        return {STUDENT: student}, notes
    if not pictures and teacher.chat_template is None and is_vocabulary_shared(student, teacher):
        return {STUDENT: student}, notes
    return {STUDENT: student, TEACHER: teacher}, notes


def _saved_with(name: str, load: Callable[..., Any], arguments: EvaluateArguments) -> Any:
    """The tokenizer or processor that was saved with a model, or with the base of adapters; a text says why not."""
    reason = ""
    for place in dict.fromkeys((name, base_and_adapter(name)[0])):
        try:
            return load(place, None, arguments.trust_remote_code)
        except (ImportError, OSError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
    return reason


def _load(names: dict[str, str], arguments: EvaluateArguments) -> dict[str, Any]:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(load_teacher, student_device=device, trust_remote_code=arguments.trust_remote_code)
    found = {}
    for role, name in names.items():
        places: dict[str, Any] = {"device": None}
        if role == TEACHER:
            places = {"device": arguments.teacher_device, "quantization": arguments.teacher_quantization}
        found[role] = load(name, **places, called=f"{OPTIONS[role]} ")
    return found


# ---------------------------------------------------------------------------------------------------------- the rows


def _rows(arguments: EvaluateArguments) -> tuple[Dataset, str]:
    """The rows, and their split."""
    name = str(arguments.dataset)
    splits = load_splits(name, arguments.dataset_config)
    split = arguments.split or next((each for each in HELD_OUT if each in splits), "train")
    rows = placed(first_rows(take_split(splits, name, split), arguments.max_rows), name)
    if has_pictures(rows):
        rows = filled(rows, arguments)
    elif arguments.prompt_template is not None and arguments.completion_template is not None:
        templates = arguments.prompt_template, arguments.completion_template
        rows = fill_templates(rows, *templates, keep=(arguments.answer_column,))
    return with_prompts(rows, arguments) if arguments.knowledge_column is None else rows, split


def _notes_on_rows(rows: Dataset | None, split: str | None, arguments: EvaluateArguments) -> list[str]:
    if rows is None:
        return []
    notes = []
    is_file = os.path.isfile(os.path.expanduser(str(arguments.dataset)))  # its only split is called train
    if split == "train" and arguments.split is None and not is_file:
        notes.append(f"{arguments.dataset} has no split test or validation: these are rows of its split train.")
    if arguments.generate and arguments.knowledge_column is None and not _has_texts(rows, arguments):
        notes.append("The rows are prompts alone: perplexity and distance, which need texts, are left out.")
    return notes


def _has_texts(rows: Dataset, arguments: EvaluateArguments) -> bool:
    """True if rows have texts to measure perplexity on, and not prompts alone."""
    if arguments.knowledge_column is not None:
        return False
    columns = set(rows.column_names)
    if {"messages", "conversations", "text", "input_ids"} & columns:
        return True
    return "completion" in columns if "prompt" in columns else not arguments.generate  # no column is an error later


def _questions(rows: Dataset, arguments: EvaluateArguments, tokenizers: dict[str, Any]) -> Questions | PictureQuestions:
    if isinstance(tokenizers[STUDENT], ProcessorMixin):
        return picture_questions(rows, tokenizers[STUDENT], answer_column=arguments.answer_column)
    make = PromptCollator if arguments.knowledge_column is None else partial(lupi_collator, arguments)
    collators = {role: make(tokenizer) for role, tokenizer in tokenizers.items()}
    column = arguments.answer_column or (arguments.completion_column if arguments.knowledge_column else None)
    if arguments.knowledge_column is not None and column is None:
        raise ValueError("rows with knowledge need --answer_column, the column of the right answers")
    return questions_of(rows, collators[STUDENT], collators.get(TEACHER), answer_column=column)


# ------------------------------------------------------------------------------------------------------- the results


def _data(
    found: Evaluated,
    *,
    arguments: EvaluateArguments,
    names: dict[str, str],
    split: str | None,
    notes: list[str],
    unfinished: list[str],
) -> dict[str, Any]:
    return {
        "models": names,
        "rows": arguments.dataset,
        "split": split,
        "measures": measures_data(found.measures),
        "notes": [*notes, *found.notes, *unfinished],
        "settings": asdict(arguments),
        "versions": {"hf_distill": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }


def _write(folder: str, data: dict[str, Any], found: Evaluated, *, is_whole: bool) -> None:
    """Writes the results; those of a part of the measuring to a place of their own, beside an earlier evaluation."""
    place = Path(folder) if is_whole else Path(folder, PARTIAL)
    place.mkdir(parents=True, exist_ok=True)
    (place / EVALUATION_FILE).write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
    answers = place / ANSWERS_FILE
    answers.unlink(missing_ok=True)  # of an earlier evaluation
    if found.generated:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.generated)
        answers.write_text("".join(lines), encoding="utf-8")
    if not is_whole:
        return
    shutil.rmtree(Path(folder, PARTIAL), ignore_errors=True)
    if Path(folder, "settings.json").is_file():  # a run's folder has a page
        with optional("the page", folder):
            save_page(os.path.join(folder, PAGE), [folder])


def _show(data: dict[str, Any], arguments: EvaluateArguments, folder: str) -> None:
    if arguments.json:
        return print(json.dumps(data, indent=2, ensure_ascii=False))
    console = Console()
    console.print(table(evaluation_rows(data["measures"])))
    if any(each["gap_recovered"] for each in data["measures"].values()):
        console.print(GAP)
    for note in data["notes"]:
        console.print(note)
    print(f"{EVALUATION_FILE} is in {folder}")
