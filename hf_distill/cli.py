"""The command line: `hf-distill demo`, `kd`, `kv`, `skd`, `prune`, `merge`, `compare`. Parse, then one call."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_distill.callbacks import CosinePhaseCallback, RolloutSamplesCallback
from hf_distill.collators import LUPICollator
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.lora import ADAPTER_CONFIG, merge_adapter
from hf_distill.pruning import (
    drop_layers,
    missing_bundles,
    original_layers,
    rank_layers,
    read_manifest,
    refuse_bundles,
    restore_layers,
)
from hf_distill.report import (
    EVALUATION_COLUMNS,
    FIDELITY_COLUMNS,
    ROLLOUT_COLUMNS,
    markdown,
    result_rows,
    save_comparison,
    save_report,
    save_settings,
    table,
)
from hf_distill.rows import fill_templates, first_rows, load_rows
from hf_distill.saved_weights import other_adapters
from hf_distill.saving import adapters_on, refuse_folder, save_tokenizer, set_aside, try_saving
from hf_distill.teachers.local import LocalTeacher
from hf_distill.trainers.checkpoints import find_checkpoint, problem_of
from hf_distill.trainers.checks import student_tokenizer
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.resuming import no_state, other_trainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig


@dataclass
class KDArguments:
    """Which models and which data."""

    model: str = field(metadata={"help": "The student: hub id or local path."})
    teacher_model: list[str] = field(
        metadata={"help": "The teacher: hub id, local path, or `base`, the student's own base model; or several."}
    )
    dataset: str = field(
        metadata={"help": "Training rows: hub id, local folder, .jsonl, .json, .parquet or .csv file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(
        default="train",
        metadata={"help": "Split of the dataset to train on, or a part of it: `train[:20000]`, `train[:90%%]`."},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows, as `dataset`. Default: the eval split of the dataset itself."}
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of the held-out rows, or a part. Default: `test`, where there is one."},
    )
    max_eval_rows: int = field(default=500, metadata={"help": "Held-out rows used before and after the training."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of a row, columns in braces: 'Context: {context}\\nQuestion: {question}\\nAnswer:'; the "
            "two characters \\n are a new line."
        },
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "The same for the completion, with prompt_template: ' {answers[text][0]}'."}
    )


@dataclass
class StagedArguments(KDArguments):
    """Which models and which data."""

    stage: str | None = field(
        default=None,
        metadata={"help": "Bundle of layers that is restored first; adapters are trained on these layers alone."},
    )
    bundle_dir: str | None = field(
        default=None, metadata={"help": "Folder of the bundles, with stage: `bundles` in what `prune` wrote."}
    )


@dataclass
class KVArguments(KDArguments):
    """Which models and which data."""

    cosine_steps: int = field(
        default=50, metadata={"help": "Show the cosine of keys and values and its phase every this many steps."}
    )


@dataclass
class SKDArguments(KDArguments):
    """Which models, which prompts, and what only the teacher may read."""

    knowledge_column: str | None = field(
        default=None,
        metadata={"help": "Column of what only the teacher reads (LUPI). Default: rows have `prompt` or `messages`."},
    )
    query_column: str = field(default="query", metadata={"help": "Column of the question, with knowledge_column."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt, without knowledge_column."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of reference answers, for the source `dataset`."}
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Whether a prompt that is text is the user's message, and a completion the assistant's."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "First message to the teacher."})
    few_shot: str | None = field(
        default=None, metadata={"help": "JSON file: a list of turns with query, knowledge and answer, for the teacher."}
    )
    knowledge_template: str | None = field(
        default=None, metadata={"help": "The teacher's message, with {knowledge} and {query}."}
    )
    allow_missing_knowledge: bool = field(
        default=False, metadata={"help": "Whether the teacher of a row without knowledge reads the bare query."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of the teacher's prompt; what is too long loses knowledge."}
    )
    samples_steps: int = field(default=0, metadata={"help": "Show what has been written every this many steps."})


@dataclass
class PruneArguments:
    """Which layers of which model are dropped."""

    model: str = field(metadata={"help": "The model: hub id or local path."})
    output_dir: str = field(metadata={"help": "Where the student goes; the removed layers go to `bundles` in it."})
    num_layers: int | None = field(
        default=None, metadata={"help": "How many consecutive layers are dropped: those that change their input least."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "In place of num_layers: these layers, from 0."})
    groups: str | None = field(
        default=None,
        metadata={"help": 'With layers: the bundles they are kept in, as JSON: \'{"B": [3, 4], "C": [5]}\'.'},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Rows to rank layers on and to measure the student with, as in `kd`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    split: str = field(default="train", metadata={"help": "Split of the dataset, or a part of it."})
    max_rows: int = field(default=256, metadata={"help": "Rows that are read, from the first on."})
    max_length: int = field(default=512, metadata={"help": "Tokens at which rows are cut."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward."})


@dataclass
class MergeArguments:
    """Which adapter is merged."""

    adapter: str = field(metadata={"help": "Folder of the adapter: the output directory of a run with use_peft."})
    output_dir: str = field(metadata={"help": "Where the merged model goes."})
    base: str | None = field(
        default=None, metadata={"help": "Hub id or path of the base model. Default: the one it was trained on."}
    )


def make_kd(arguments: StagedArguments, args: KDConfig, model_config: ModelConfig) -> KDTrainer:
    """The trainer of `hf-distill kd`; `ValueError` for settings and data that it could not train with."""
    if (arguments.stage is None) != (arguments.bundle_dir is None):
        raise ValueError("--stage and --bundle_dir go together: give both or neither")
    options = _trainer_arguments(arguments, args, model_config)
    if arguments.stage is not None:
        peft_config = options["peft_config"]
        if peft_config is None or peft_config.modules_to_save or peft_config.target_parameters:
            raise ValueError(
                "--stage trains adapters on the restored layers alone: it needs --use_peft, and neither "
                "--lora_modules_to_save nor --lora_target_parameters"
            )
        options["model"], layers = _restore(arguments, args)
        # PEFT's layers_to_transform knows neither the names in one string nor "all-linear". The first part of a
        # module's name that is a number is that of its layer.
        numbers = "|".join(map(str, layers))
        peft_config.exclude_modules = rf"(?!(?:[^.]*[^.\d][^.]*\.)+(?:{numbers})\.).*"
    trainer = KDTrainer(**options)
    if arguments.stage is not None and not isinstance(trainer.teacher, LocalTeacher):
        raise ValueError("--stage measures against one teacher with the student's tokenizer; give one --teacher_model")
    return trainer


def make_skd(arguments: SKDArguments, args: SpeculativeKDConfig, model_config: ModelConfig) -> SpeculativeKDTrainer:
    """The trainer of `hf-distill skd`; `ValueError` for settings and data that it could not train with."""
    _refuse_ignored(arguments)
    options = _trainer_arguments(arguments, args, model_config)
    if arguments.knowledge_column is None:
        for name in ("train_dataset", "eval_dataset"):
            options[name] = options[name] and _with_prompts(options[name], arguments)
    else:
        options["processing_class"] = student_tokenizer(arguments.model, args)
        options["data_collator"] = _lupi_collator(arguments, options["processing_class"])
    trainer = SpeculativeKDTrainer(**options)
    if arguments.samples_steps:
        trainer.add_callback(RolloutSamplesCallback(trainer, arguments.samples_steps))
    return trainer


def make_kv(arguments: KVArguments, args: KVProjectionConfig, model_config: ModelConfig) -> KVProjectionTrainer:
    """The trainer of `hf-distill kv`; `ValueError` for settings and data that it could not train with."""
    trainer = KVProjectionTrainer(**_trainer_arguments(arguments, args, model_config))
    trainer.add_callback(CosinePhaseCallback(arguments.cosine_steps))
    return trainer


def run_kd(trainer: KDTrainer) -> None:
    """Distils, measures the student before and after on held-out rows, saves student, table and picture."""
    title = "student against teacher, held-out rows"
    if not isinstance(trainer.teacher, LocalTeacher) or trainer.engine not in ("none", "DDP"):
        # Several teachers, another tokenizer or a student in shards: only the trainer itself can ask them.
        return _run_evaluated(trainer, title, EVALUATION_COLUMNS)
    before = _measure(trainer)
    _train(trainer)
    results = {"before": before, "after": _measure(trainer)}
    _report(trainer, results, title, FIDELITY_COLUMNS)


def run_stage(trainer: KDTrainer, arguments: StagedArguments) -> None:
    """The same with restored layers. Also measures the model without them, and with bundles that are still missing."""
    bundle_dir = str(arguments.bundle_dir)

    def without() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")

    def completed(names: list[str]) -> PreTrainedModel:
        trained = AutoPeftModelForCausalLM.from_pretrained(str(trainer.args.output_dir), dtype="auto")
        return restore_layers(trained.merge_and_unload(), bundle_dir, names, share_weights=True)

    results = {f"without {arguments.stage}": _measure(trainer, without), "before": _measure(trainer)}
    _train(trainer)
    results["after"] = _measure(trainer)
    missing = missing_bundles(trainer.model, bundle_dir)
    for i, name in enumerate(missing):
        results[f"with {name} untrained"] = _measure(trainer, partial(completed, missing[: i + 1]))
    _report(trainer, results, f"stage {arguments.stage}: student against teacher, held-out rows", FIDELITY_COLUMNS)


def run_skd(trainer: SpeculativeKDTrainer) -> None:
    """The same on text that student and teacher write; what is measured is written anew, from held-out prompts."""
    _run_evaluated(trainer, "student against teacher, text written from held-out prompts", ROLLOUT_COLUMNS)


def _run_evaluated(trainer: KDTrainer, title: str, columns: Mapping[str, tuple[str, str]]) -> None:
    # The engines evaluate only what they have prepared for training.
    trainer.args.eval_on_start = trainer.eval_dataset is not None
    _train(trainer)
    before = next((entry for entry in trainer.state.log_history if "eval_kd" in entry), {})
    after = trainer.evaluate() if before else {}
    _report(trainer, {"before": before, "after": after}, title, columns)


def run_prune(arguments: PruneArguments) -> None:
    """Ranks layers, drops some, saves the student with its tokenizer, the bundles and `pruning.md`.

    Raises:
        `ValueError`: options that do not say which layers, or what `rank_layers` and `drop_layers` refuse.
    """
    if (arguments.layers is None) == (arguments.num_layers is None):
        raise ValueError("give either --layers, or --num_layers and --dataset to have them chosen")
    if arguments.layers is None and (arguments.dataset is None or arguments.groups is not None):
        raise ValueError("--num_layers needs --dataset to choose layers on; --groups names layers: it needs --layers")
    bundle_dir = os.path.join(arguments.output_dir, "bundles")
    refuse_bundles(bundle_dir)
    refuse_folder(arguments.output_dir, {"the model": arguments.model})
    groups = None if arguments.groups is None else _groups(arguments.groups)
    rows = None
    if arguments.dataset is not None:
        rows = load_rows(arguments.dataset, arguments.split, arguments.dataset_config)
        rows = first_rows(rows, arguments.max_rows)
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {arguments.model!r} cannot be loaded with its tokenizer: {reason}") from error
    try_saving(model, tokenizer, arguments.output_dir)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    reading = {"batch_size": arguments.batch_size, "max_length": arguments.max_length}

    layers, tables = arguments.layers, {}
    if layers is None:
        spans = rank_layers(model, rows, tokenizer, arguments.num_layers, **reading)  # pyright: ignore[reportArgumentType]
        layers = spans[0].layers
        tables["Layers that change their input least (angle / pi): the first are dropped"] = [
            {"layers": _numbers(span.layers), "distance": f"{span.distance:.4f}"} for span in spans
        ]
    student = drop_layers(model, layers, bundle_dir, groups, share_weights=True)
    set_aside(arguments.output_dir)
    student.save_pretrained(arguments.output_dir)
    save_tokenizer(tokenizer, arguments.output_dir)
    if rows is not None:
        fidelity = {"pruned": evaluate_fidelity(student, model, rows, tokenizer, **reading)}
        tables[f"Against the whole model, {len(rows)} rows"] = result_rows(fidelity)
    groups = {name: bundle["layers"] for name, bundle in read_manifest(bundle_dir)["bundles"].items()}
    tables[f"{student.num_parameters() / model.num_parameters():.1%} of the parameters are kept"] = [
        {"": name, "layers": _numbers(group)} for name, group in {"kept": original_layers(student), **groups}.items()
    ]
    for title, table_rows in tables.items():
        # A title of the table's own would be folded to the table's width.
        Console().print(f"\n{title}", table(table_rows), sep="\n")
    with open(os.path.join(arguments.output_dir, "pruning.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(f"## {title}\n\n{markdown(table_rows)}" for title, table_rows in tables.items()))
    print(f"student, bundles and pruning.md are in {arguments.output_dir}")


def run_merge(arguments: MergeArguments) -> None:
    """Merges an adapter into its base model; `ValueError` for what `merge_adapter` refuses."""
    merge_adapter(arguments.adapter, arguments.output_dir, base=arguments.base)
    print(f"the merged model is in {arguments.output_dir}")


def _train(trainer: KDTrainer) -> None:
    trainer.train(resume_from_checkpoint=_resume(trainer.args))
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(model_name=os.path.basename(os.path.normpath(str(trainer.args.output_dir))))


def _measure(trainer: KDTrainer, load: Callable[[], PreTrainedModel] | None = None) -> dict[str, float]:
    """Fidelity of the student, or of a model to load, on held-out rows; empty without any and in other processes."""
    found = {}
    if trainer.eval_dataset is not None and trainer.is_world_process_zero():
        found = evaluate_fidelity(
            load().to(trainer.args.device) if load else trainer.accelerator.unwrap_model(trainer.model),  # pyright: ignore
            trainer.teacher.model,  # pyright: ignore[reportAttributeAccessIssue]
            trainer.eval_dataset,  # pyright: ignore[reportArgumentType]
            trainer.processing_class,
            batch_size=trainer.args.per_device_eval_batch_size,
            vocab_size=trainer.vocab_size,
        )
    trainer.accelerator.wait_for_everyone()
    return found


def _report(
    trainer: KDTrainer,
    results: Mapping[str, Mapping[str, float]],
    title: str,
    columns: Mapping[str, tuple[str, str]],
) -> None:
    folder = str(trainer.args.output_dir)
    if results["before"] and trainer.is_world_process_zero():
        save_report(folder, results, {"training": trainer.state.log_history}, title, columns)
        print(f"student, report.md and report.png are in {folder}")
    elif trainer.is_world_process_zero():
        print(f"the student is in {folder}; there were no held-out rows (--eval_dataset) to measure it on")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _resume(args: KDConfig) -> str | bool | None:
    resume = args.resume_from_checkpoint
    return True if str(resume).lower() == "true" else resume


def _restore(arguments: StagedArguments, args: KDConfig) -> tuple[str, list[int]]:
    """Folder of the model with the bundle's layers, on which adapters are trained, and which of its layers these are.

    It is written to `restored` in the output directory: an adapter is of no use without the model it was trained on.
    """
    folder, tokenizer = (
        os.path.abspath(os.path.join(str(args.output_dir), "restored")),
        student_tokenizer(arguments.model, args),
    )
    if not _resume(args) and (adapters := adapters_on(folder, str(args.output_dir))):
        raise ValueError(
            f"{folder} is the model that the adapter in {adapters[0]} belongs to: take another output_dir, or delete "
            "both"
        )
    with args.main_process_first(local=False, desc="restoring layers"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        model = restore_layers(model, str(arguments.bundle_dir), [str(arguments.stage)], share_weights=True)
        if args.process_index == 0:
            model.save_pretrained(folder)
            save_tokenizer(tokenizer, folder)
    restored = read_manifest(str(arguments.bundle_dir))["bundles"][arguments.stage]["layers"]
    return folder, [i for i, layer in enumerate(original_layers(model)) if layer in restored]


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _groups(text: str) -> dict[str, list[int]]:
    try:
        return {name: list(layers) for name, layers in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'groups have to be JSON such as {{"B": [3, 4], "C": [5]}}, got {text!r}') from error


def _trainer_arguments(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> dict[str, Any]:
    if model_config.model_name_or_path is not None:
        raise ValueError("--model_name_or_path is not used here: the student is --model, the teacher --teacher_model")
    targets = model_config.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():
        # TRL takes a single name out of its list; PEFT would read it as a pattern of whole paths, which fits none.
        model_config.lora_target_modules = [targets]
    peft_config = get_peft_config(model_config)
    # Before anything is loaded. A student that is a folder of adapters has some whatever the options say.
    adapters = {} if peft_config is None else {"default": peft_config}
    compares = not os.path.exists(os.path.join(arguments.model, ADAPTER_CONFIG))
    find_checkpoint(
        _resume(args),
        str(args.output_dir),
        lambda folder: (
            problem_of(folder)
            or no_state(folder)
            or other_trainer(folder, type(args))
            or (other_adapters(folder, adapters) if compares else None)
        ),
    )
    teachers = arguments.teacher_model  # a single one out of a YAML file is no list
    train_rows = load_rows(arguments.dataset, arguments.train_split, arguments.dataset_config)
    eval_rows = _load_eval_rows(arguments)
    if arguments.prompt_template is not None and arguments.completion_template is not None:
        templates = arguments.prompt_template, arguments.completion_template
        train_rows, eval_rows = (rows and fill_templates(rows, *templates) for rows in (train_rows, eval_rows))
    elif arguments.prompt_template is not None or arguments.completion_template is not None:
        raise ValueError("prompt_template and completion_template go together: give both or neither")
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),  # pyright: ignore[reportGeneralTypeIssues]
    }
    return {
        "model": arguments.model,
        "teacher_model": teachers if isinstance(teachers, str) or len(teachers) > 1 else teachers[0],
        "args": args,
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "peft_config": peft_config,
        "quantization_config": get_quantization_config(model_config),
    }


def _with_prompts(rows: Dataset, arguments: SKDArguments) -> Dataset:
    """Rows with the columns `prompt` and `completion`, whatever they are called in the file."""
    names = {arguments.prompt_column: "prompt", arguments.completion_column: "completion"}
    for column, name in names.items():
        if column not in (None, name):
            rows = rows.rename_column(column, name)

    def as_chat(row: dict[str, str]) -> dict[str, list]:
        roles = {"prompt": "user", "completion": "assistant"}
        return {name: [{"role": role, "content": row[name]}] for name, role in roles.items() if name in row}

    return rows.map(as_chat) if arguments.as_chat else rows


def _refuse_ignored(arguments: SKDArguments) -> None:
    """Raises `ValueError` for options that belong to the other kind of rows."""
    lupi = ("query_column", "system_prompt", "few_shot", "knowledge_template", "allow_missing_knowledge")
    lupi = (*lupi, "max_prompt_length")
    plain = ("prompt_column", "as_chat", "prompt_template", "completion_template")
    ignored = lupi if arguments.knowledge_column is None else plain
    defaults = {entry.name: entry.default for entry in fields(SKDArguments)}
    if given := [name for name in ignored if getattr(arguments, name) != defaults[name]]:
        need = "needs" if arguments.knowledge_column is None else "does not go together with"
        raise ValueError(f"--{given[0]} {need} --knowledge_column")
    renamed = [name for name in ("prompt_column", "completion_column") if getattr(arguments, name) != defaults[name]]
    if renamed and arguments.prompt_template is not None:
        raise ValueError(f"--{renamed[0]} does not go together with --prompt_template, which makes the columns itself")


def _lupi_collator(arguments: SKDArguments, tokenizer: PreTrainedTokenizerBase) -> LUPICollator:
    few_shot = ()
    if arguments.few_shot is not None:
        if not os.path.isfile(arguments.few_shot):
            raise ValueError(f"few_shot file {arguments.few_shot!r} does not exist")
        with open(arguments.few_shot, encoding="utf-8") as file:
            few_shot = json.load(file)
    template = {} if arguments.knowledge_template is None else {"knowledge_template": arguments.knowledge_template}
    return LUPICollator(
        tokenizer,
        query_column=arguments.query_column,
        knowledge_column=str(arguments.knowledge_column),
        system_prompt=arguments.system_prompt,
        few_shot=few_shot,
        completion_column=arguments.completion_column,
        allow_missing_knowledge=arguments.allow_missing_knowledge,
        max_prompt_length=arguments.max_prompt_length,
        **template,
    )


def _load_eval_rows(arguments: KDArguments) -> Dataset | None:
    if arguments.eval_dataset is not None:
        only_split = "train" if os.path.isfile(arguments.eval_dataset) else "test"
        rows = load_rows(arguments.eval_dataset, arguments.eval_split or only_split)
    elif arguments.eval_split is not None:
        rows = load_rows(arguments.dataset, arguments.eval_split, arguments.dataset_config)
    elif os.path.isfile(arguments.dataset):
        return None
    else:
        try:
            rows = load_rows(arguments.dataset, "test", arguments.dataset_config)
        except ValueError:
            return None  # a dataset without a test split, and none was asked for
    return first_rows(rows, arguments.max_eval_rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hf-distill`."""
    parser = argparse.ArgumentParser(prog="hf-distill", description="Distil causal language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,kd,kv,skd,prune,merge,compare}")
    demo = commands.add_parser("demo", help="distil the packaged teacher, offline, on a CPU, in three minutes")
    demo.add_argument("--output_dir", default="demo_out", help="where student, table and picture go")
    commands.add_parser("kd", help="distil a student; --help lists all options", add_help=False)
    commands.add_parser("kv", help="with the teacher's keys and values beside its logits", add_help=False)
    commands.add_parser("skd", help="on text that student and teacher write together", add_help=False)
    commands.add_parser("prune", help="drop the layers that change least, keep them as bundles", add_help=False)
    commands.add_parser("merge", help="merge an adapter into its base model", add_help=False)
    compare = commands.add_parser("compare", help="put finished runs side by side: settings, fidelity, tokens, time")
    compare.add_argument("runs", nargs="+", help="output directories of kd, kv or skd")
    compare.add_argument("--output_dir", default="compare_out", help="where table and picture go")
    argv = sys.argv[1:] if argv is None else argv
    known, rest = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)
    if known.command == "demo":
        from hf_distill.demo import run_demo

        demo.parse_args(argv[1:])
        results = run_demo(known.output_dir)
        if results["distilled"]["student_perplexity"] >= results["hard labels only"]["student_perplexity"]:
            sys.exit("distillation did not win: please report this with the table above")
        return
    if known.command == "compare":
        compare.parse_args(argv[1:])
        try:
            save_comparison(known.output_dir, known.runs)
        except ValueError as error:
            compare.exit(2, f"{compare.prog}: error: {error}\n")
        return
    if known.command in ("prune", "merge"):
        run, options = {"prune": (run_prune, PruneArguments), "merge": (run_merge, MergeArguments)}[known.command]
        command = TrlParser(options, prog=f"hf-distill {known.command}")
        try:
            run(*command.parse_args_and_config(rest))
        except ValueError as error:
            command.exit(2, f"{command.prog}: error: {error}\n")
        return
    make, run, *options = {
        "kd": (make_kd, run_kd, StagedArguments, KDConfig),
        "kv": (make_kv, run_kd, KVArguments, KVProjectionConfig),
        "skd": (make_skd, run_skd, SKDArguments, SpeculativeKDConfig),
    }[known.command]
    command = TrlParser((*options, ModelConfig), prog=f"hf-distill {known.command}")  # pyright: ignore
    try:
        parsed = command.parse_args_and_config(rest)
        settings = _settings(*parsed)
        trainer = make(*parsed)
    except ValueError as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    try:
        run(trainer) if getattr(parsed[0], "stage", None) is None else run_stage(trainer, parsed[0])
    except KeyboardInterrupt:
        sys.exit(130)  # the trainer has said where the student is
    if trainer.is_world_process_zero():
        save_settings(str(trainer.args.output_dir), settings)


def _settings(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> dict[str, Any]:
    """Every option under its name on the command line."""
    return asdict(arguments) | args.to_dict() | asdict(model_config)


if __name__ == "__main__":
    record(main)()  # torchrun repeats at the end what the first process to fail has raised
