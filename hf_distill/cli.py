"""The command line: `hf-distill demo`, `hf-distill kd`. Parse, then one call."""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from hf_distill.evaluation import evaluate_fidelity
from hf_distill.report import save_report
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.kd import KDTrainer

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


def make_trainer(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> KDTrainer:
    """The trainer of `hf-distill kd`; `ValueError` for settings and data that it could not train with."""
    if model_config.model_name_or_path is not None:
        raise ValueError("--model_name_or_path is not used here: the student is --model, the teacher --teacher_model")
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **(args.model_init_kwargs or {}),  # pyright: ignore[reportGeneralTypeIssues]
    }
    train_dataset = load_rows(arguments.dataset, arguments.train_split, arguments.dataset_config)
    eval_dataset = _load_eval_rows(arguments)
    return KDTrainer(
        arguments.model,
        arguments.teacher_model,
        args,
        train_dataset,  # pyright: ignore[reportArgumentType]
        eval_dataset,  # pyright: ignore[reportArgumentType]
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
    )


def run_kd(trainer: KDTrainer) -> None:
    """Distils, measures the student before and after on held-out rows, saves student, table and picture."""
    args = trainer.args
    results = {}

    def measure(name: str) -> None:
        if trainer.eval_dataset is not None and trainer.is_world_process_zero():
            results[name] = evaluate_fidelity(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer.teacher.model,  # pyright: ignore[reportAttributeAccessIssue]
                trainer.eval_dataset,  # pyright: ignore[reportArgumentType]
                trainer.processing_class,
                batch_size=args.per_device_eval_batch_size,
                vocab_size=trainer.vocab_size,
            )
        trainer.accelerator.wait_for_everyone()

    measure("before")
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.create_model_card()
    measure("after")
    if results:
        save_report(str(args.output_dir), results, {"training": trainer.state.log_history})
        print(f"student, report.md and report.png are in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,kd}")
    demo = commands.add_parser("demo", help="distil the packaged teacher, offline, on a CPU, in three minutes")
    demo.add_argument("--output_dir", default="demo_out", help="where student, table and picture go")
    commands.add_parser("kd", help="distil a student; --help lists all options", add_help=False)
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
    else:
        kd_parser = TrlParser((KDArguments, KDConfig, ModelConfig), prog="hf-distill kd")  # pyright: ignore
        try:
            trainer = make_trainer(*kd_parser.parse_args_and_config(rest))
        except ValueError as error:
            kd_parser.exit(2, f"{kd_parser.prog}: error: {error}\n")
        run_kd(trainer)


if __name__ == "__main__":
    main()
