"""The command line: `hf-distill demo`, `kd`, `kv`, `skd`. Parse, then one call."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_distill.callbacks import CosinePhaseCallback, RolloutSamplesCallback
from hf_distill.collators import LUPICollator
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.report import FIDELITY_COLUMNS, ROLLOUT_COLUMNS, save_report
from hf_distill.trainers.checkpoints import find_checkpoint
from hf_distill.trainers.checks import student_tokenizer
from hf_distill.trainers.config import KDConfig, KVProjectionConfig, SpeculativeKDConfig
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class KDArguments:
    """Which models and which data."""

    model: str = field(metadata={"help": "The student: hub id or local path."})
    teacher_model: str = field(metadata={"help": "The teacher: hub id or local path."})
    dataset: str = field(
        metadata={"help": "Training rows: hub id, local folder, .jsonl, .json, .parquet or .csv file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows, as `dataset`. Default: the eval split of the dataset itself."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out rows. Default: `test`, where there is one."}
    )
    max_eval_rows: int = field(default=500, metadata={"help": "Held-out rows used before and after the training."})


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


def load_rows(name: str, split: str, config: str | None = None) -> Dataset | IterableDataset:
    """Rows of a hub dataset, a folder (of files, or written by `save_to_disk`) or a single file.

    Raises:
        `ValueError`: the file's kind is unknown, or the split does not exist.
    """
    extension = os.path.splitext(name)[1]
    if os.path.isfile(name):
        if extension not in FILE_FORMATS:
            raise ValueError(f"dataset {name!r} has to be one of {', '.join(FILE_FORMATS)}, a folder or a hub id")
        return load_dataset(FILE_FORMATS[extension], data_files=name, split="train")
    if extension in FILE_FORMATS:
        raise ValueError(f"dataset {name!r} does not exist")
    saved = os.path.exists(os.path.join(name, "state.json")) or os.path.exists(os.path.join(name, "dataset_dict.json"))
    loaded = load_from_disk(name) if saved else load_dataset(name, config)
    if isinstance(loaded, Dataset):
        loaded = DatasetDict({"train": loaded})
    if split not in loaded:
        raise ValueError(f"dataset {name!r} has the splits {', '.join(map(str, loaded))}, not {split!r}")
    return loaded[split]


def make_kd(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> KDTrainer:
    """The trainer of `hf-distill kd`; `ValueError` for settings and data that it could not train with."""
    return KDTrainer(**_trainer_arguments(arguments, args, model_config))


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

    def measure() -> dict[str, float]:
        found = {}
        if trainer.eval_dataset is not None and trainer.is_world_process_zero():
            found = evaluate_fidelity(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.teacher.model,  # pyright: ignore[reportAttributeAccessIssue]
                trainer.eval_dataset,  # pyright: ignore[reportArgumentType]
                trainer.processing_class,
                batch_size=trainer.args.per_device_eval_batch_size,
                vocab_size=trainer.vocab_size,
            )
        trainer.accelerator.wait_for_everyone()
        return found

    before = measure()
    _train(trainer)
    _report(trainer, before, measure(), "student against teacher, held-out rows", FIDELITY_COLUMNS)


def run_skd(trainer: SpeculativeKDTrainer) -> None:
    """The same on text that student and teacher write; what is measured is written anew, from held-out prompts."""
    # The engines evaluate only what they have prepared for training.
    trainer.args.eval_on_start = trainer.eval_dataset is not None
    _train(trainer)
    before = next((entry for entry in trainer.state.log_history if "eval_kd" in entry), {})
    after = trainer.evaluate() if before else {}
    title = "student against teacher, text written from held-out prompts"
    _report(trainer, before, after, title, ROLLOUT_COLUMNS)


def _train(trainer: KDTrainer) -> None:
    trainer.train(resume_from_checkpoint=_resume(trainer.args))
    trainer.save_model()
    trainer.create_model_card(model_name=os.path.basename(os.path.normpath(str(trainer.args.output_dir))))


def _report(
    trainer: KDTrainer,
    before: dict[str, float],
    after: dict[str, float],
    title: str,
    columns: Mapping[str, tuple[str, str, bool]],
) -> None:
    folder = str(trainer.args.output_dir)
    if before and trainer.is_world_process_zero():
        results = {"before": before, "after": after}
        save_report(folder, results, {"training": trainer.state.log_history}, title, columns)
        print(f"student, report.md and report.png are in {folder}")
    elif trainer.is_world_process_zero():
        print(f"the student is in {folder}; there were no held-out rows (--eval_dataset) to measure it on")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _resume(args: KDConfig) -> str | bool | None:
    resume = args.resume_from_checkpoint
    return True if str(resume).lower() == "true" else resume


def _trainer_arguments(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> dict[str, Any]:
    if model_config.model_name_or_path is not None:
        raise ValueError("--model_name_or_path is not used here: the student is --model, the teacher --teacher_model")
    find_checkpoint(_resume(args), str(args.output_dir))  # before anything is loaded
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),  # pyright: ignore[reportGeneralTypeIssues]
    }
    return {
        "model": arguments.model,
        "teacher_model": arguments.teacher_model,
        "args": args,
        "train_dataset": load_rows(arguments.dataset, arguments.train_split, arguments.dataset_config),
        "eval_dataset": _load_eval_rows(arguments),
        "peft_config": get_peft_config(model_config),
        "quantization_config": get_quantization_config(model_config),
    }


def _with_prompts(rows: Dataset | IterableDataset, arguments: SKDArguments) -> Dataset | IterableDataset:
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
    ignored = (*lupi, "max_prompt_length") if arguments.knowledge_column is None else ("prompt_column", "as_chat")
    defaults = {entry.name: entry.default for entry in fields(SKDArguments)}
    if given := [name for name in ignored if getattr(arguments, name) != defaults[name]]:
        need = "needs" if arguments.knowledge_column is None else "does not go together with"
        raise ValueError(f"--{given[0]} {need} --knowledge_column")


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


def _load_eval_rows(arguments: KDArguments) -> Dataset | IterableDataset | None:
    if arguments.eval_dataset is not None:
        is_file = os.path.isfile(arguments.eval_dataset)
        rows = load_rows(arguments.eval_dataset, "train" if is_file else arguments.eval_split or "test")
    elif arguments.eval_split is not None:
        rows = load_rows(arguments.dataset, arguments.eval_split, arguments.dataset_config)
    elif os.path.isfile(arguments.dataset):
        return None
    else:
        try:
            rows = load_rows(arguments.dataset, "test", arguments.dataset_config)
        except ValueError:
            return None  # a dataset without a test split, and none was asked for
    return rows.take(arguments.max_eval_rows)


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hf-distill`."""
    parser = argparse.ArgumentParser(prog="hf-distill", description="Distil causal language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,kd,kv,skd}")
    demo = commands.add_parser("demo", help="distil the packaged teacher, offline, on a CPU, in three minutes")
    demo.add_argument("--output_dir", default="demo_out", help="where student, table and picture go")
    commands.add_parser("kd", help="distil a student; --help lists all options", add_help=False)
    commands.add_parser("kv", help="with the teacher's keys and values beside its logits", add_help=False)
    commands.add_parser("skd", help="on text that student and teacher write together", add_help=False)
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
    make, run, *options = {
        "kd": (make_kd, run_kd, KDArguments, KDConfig),
        "kv": (make_kv, run_kd, KVArguments, KVProjectionConfig),
        "skd": (make_skd, run_skd, SKDArguments, SpeculativeKDConfig),
    }[known.command]
    command = TrlParser((*options, ModelConfig), prog=f"hf-distill {known.command}")  # pyright: ignore
    try:
        trainer = make(*command.parse_args_and_config(rest))
    except ValueError as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    try:
        run(trainer)
    except KeyboardInterrupt:
        sys.exit(130)  # the trainer has said where the student is


if __name__ == "__main__":
    record(main)()  # torchrun repeats at the end what the first process to fail has raised
