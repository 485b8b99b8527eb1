"""The commands that train: `kd`, `kv`, `skd`, `sft`."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_distill.callbacks import CosinePhaseCallback, RolloutSamplesCallback
from hf_distill.cards import CardFacts
from hf_distill.cli.arguments import KDArguments, KVArguments, SFTArguments, SKDArguments, StagedArguments
from hf_distill.cli.baseline import check_baseline, run_baseline
from hf_distill.cli.brief_logs import shorten_logs
from hf_distill.cli.data import load_datasets, lupi_collator, refuse_ignored, with_prompts
from hf_distill.cli.mixing import read_sources
from hf_distill.cli.reporting import (
    PAGE,
    collected_warnings,
    command_line,
    finish,
    optional,
    without_secrets,
    write_card,
    write_tokens,
)
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.lora import ADAPTER_CONFIG
from hf_distill.named import student_tokenizer
from hf_distill.pruning import missing_bundles, original_layers, read_manifest, restore_layers
from hf_distill.report import (
    EVALUATION_COLUMNS,
    FIDELITY_COLUMNS,
    HARD_LABEL_COLUMNS,
    ROLLOUT_COLUMNS,
    save_report,
    verdict,
)
from hf_distill.rows import tokenized_row
from hf_distill.runs import BASELINE, TOKENS_FILE, as_list, read_history
from hf_distill.saved_weights import other_adapters
from hf_distill.saving import adapters_on, save_tokenizer
from hf_distill.servers.client import public_address
from hf_distill.teachers.kinds import brought_from
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.remote import RemoteTeacher, is_address
from hf_distill.teachers.stored import StoredHiddenTeacher, StoredTeacher
from hf_distill.trainers.checkpoints import find_checkpoint, problem_of
from hf_distill.trainers.config import KDConfig, keywords
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig
from hf_distill.trainers.kd import KDTrainer
from hf_distill.trainers.kv_projection import KVProjectionTrainer
from hf_distill.trainers.kv_projection_config import KVProjectionConfig
from hf_distill.trainers.resuming import no_state, other_trainer
from hf_distill.trainers.speculative_kd import SpeculativeKDTrainer
from hf_distill.trainers.speculative_kd_config import SpeculativeKDConfig

# Trains and measures a baseline, with a function that measures the trainer's student, and its measures before.
Baseline = Callable[[Callable[[], Mapping[str, float]], Mapping[str, float]], Mapping[str, float]]

# ------------------------------------------------------------------------------------------------------- the commands


def start_kd(arguments: StagedArguments, args: KDConfig, model_config: ModelConfig) -> Callable[[], None]:
    """Makes the trainer of `hf-distill kd`; returns the run."""
    run = run_kd if arguments.stage is None else partial(run_stage, arguments)
    return _start("kd", make_kd, run, arguments, args, model_config)


def start_kv(arguments: KVArguments, args: KVProjectionConfig, model_config: ModelConfig) -> Callable[[], None]:
    """Makes the trainer of `hf-distill kv`; returns the run."""
    return _start("kv", make_kv, run_kd, arguments, args, model_config)


def start_skd(arguments: SKDArguments, args: SpeculativeKDConfig, model_config: ModelConfig) -> Callable[[], None]:
    """Makes the trainer of `hf-distill skd`; returns the run."""
    return _start("skd", make_skd, run_skd, arguments, args, model_config)


def start_sft(arguments: SFTArguments, args: HardLabelConfig, model_config: ModelConfig) -> Callable[[], None]:
    """Makes the trainer of `hf-distill sft`; returns the run."""
    return _start("sft", make_sft, run_sft, arguments, args, model_config)


def _start(
    command: str, make: Callable[..., Any], run: Callable[[Any], None], arguments: Any, args: Any, model_config: Any
) -> Callable[[], None]:
    settings, run_it = _settings(arguments, args, model_config), run
    names = [source.name for source in read_sources(arguments.dataset)]
    facts = CardFacts(names, command_line(command, (arguments, args, model_config)))
    with collected_warnings() as warnings:
        trainer = make(arguments, args, model_config)
    trainer.card_facts = facts
    shorten_logs(trainer)
    if getattr(arguments, "baseline", False):
        check_baseline(trainer)
        model = _restored(args) if getattr(arguments, "stage", None) else arguments.model
        run_it = partial(
            run, baseline=partial(  # pyright: ignore[reportCallIssue]
                run_baseline, trainer, model=model, quantization_config=get_quantization_config(model_config),
                settings=settings,
            ),
        )  # fmt: skip
    return partial(_run, trainer, run_it, settings, command, warnings)


def _settings(arguments: SFTArguments, args: HardLabelConfig, model_config: ModelConfig) -> dict[str, Any]:
    """Every option under its name on the command line, without secrets."""
    given = as_list(getattr(arguments, "teacher_model", []))
    public = [public_address(teacher) if is_address(teacher) else teacher for teacher in given]
    sources = as_list(arguments.dataset)
    words = {"dataset": sources if len(sources) > 1 else sources[0], **({"teacher_model": public} if given else {})}
    found = asdict(arguments) | args.to_dict() | asdict(model_config) | words
    return {name: without_secrets(value) for name, value in found.items()}


def _run(trainer: Any, run: Callable[[Any], None], settings: dict[str, Any], command: str, warnings: list[str]) -> None:
    run(trainer)
    if sources := brought_from(_teachers(trainer)):
        settings["teacher_outputs"] = "; ".join(sources.values())
    if trainer.is_world_process_zero():
        finish(trainer, settings, command, warnings)
        print(f"{PAGE} is in {trainer.args.output_dir}: open it in a browser")


# ------------------------------------------------------------------------------------------------------- the trainers


def make_kd(arguments: StagedArguments, args: KDConfig, model_config: ModelConfig) -> KDTrainer:
    """The trainer of `hf-distill kd`; `ValueError` for settings and data that it could not train with."""
    if (arguments.stage is None) != (arguments.bundle_dir is None):
        raise ValueError("--stage and --bundle_dir go together: give both or neither")
    options = trainer_arguments(arguments, args, model_config)
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
    if arguments.stage is not None and _measured_teacher(trainer) is None:
        raise ValueError("--stage measures against one teacher with the student's tokenizer; give one --teacher_model")
    return trainer


def make_kv(arguments: KVArguments, args: KVProjectionConfig, model_config: ModelConfig) -> KVProjectionTrainer:
    """The trainer of `hf-distill kv`; `ValueError` for settings and data that it could not train with."""
    trainer = KVProjectionTrainer(**trainer_arguments(arguments, args, model_config))
    trainer.add_callback(CosinePhaseCallback(arguments.cosine_steps))
    return trainer


def make_skd(arguments: SKDArguments, args: SpeculativeKDConfig, model_config: ModelConfig) -> SpeculativeKDTrainer:
    """The trainer of `hf-distill skd`; `ValueError` for settings and data that it could not train with."""
    trainer = SpeculativeKDTrainer(**written_arguments(arguments, args, model_config))
    if arguments.samples_steps:
        trainer.add_callback(RolloutSamplesCallback(trainer, arguments.samples_steps))
    return trainer


def make_sft(arguments: SFTArguments, args: HardLabelConfig, model_config: ModelConfig) -> HardLabelTrainer:
    """The trainer of `hf-distill sft`; `ValueError` for settings and data that it could not train with."""
    return HardLabelTrainer(**student_arguments(arguments, args, model_config))


def trainer_arguments(arguments: KDArguments, args: KDConfig, model_config: ModelConfig) -> dict[str, Any]:
    """The arguments of a trainer, with the rows; `ValueError` for options that do not go together."""
    teachers = arguments.teacher_model  # a single one out of a YAML file is no list
    teacher = teachers if isinstance(teachers, str) or len(teachers) > 1 else teachers[0]
    return {**student_arguments(arguments, args, model_config), "teacher_model": teacher}


def written_arguments(arguments: SKDArguments, args: SpeculativeKDConfig, model_config: ModelConfig) -> dict[str, Any]:
    """The same of a trainer that generates its text: rows with prompts, or a collator that makes them."""
    refuse_ignored(arguments)
    options = trainer_arguments(arguments, args, model_config)
    if arguments.knowledge_column is None:
        for name in ("train_dataset", "eval_dataset"):
            options[name] = options[name] and with_prompts(options[name], arguments)
    else:
        options["processing_class"] = student_tokenizer(arguments.model, args)
        options["data_collator"] = lupi_collator(arguments, options["processing_class"])
    return options


def student_arguments(arguments: SFTArguments, args: HardLabelConfig, model_config: ModelConfig) -> dict[str, Any]:
    """The same without the teacher."""
    if model_config.model_name_or_path is not None:
        raise ValueError("--model_name_or_path is not used here: the student is --model, the teacher --teacher_model")
    peft_config = lora_config(model_config)
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
    train_rows, eval_rows = load_datasets(arguments, args)
    args.model_init_kwargs = init_kwargs(args, model_config)
    return {
        "model": arguments.model,
        "args": args,
        "train_dataset": train_rows,
        "eval_dataset": eval_rows,
        "peft_config": peft_config,
        "quantization_config": get_quantization_config(model_config),
    }


def lora_config(model_config: ModelConfig) -> Any:
    """The `LoraConfig` of the options, or None."""
    targets = model_config.lora_target_modules
    if isinstance(targets, str) and targets.isidentifier():
        # TRL takes a single name out of its list; PEFT would read it as a pattern of whole paths, which fits none.
        model_config.lora_target_modules = [targets]
    return get_peft_config(model_config)


def init_kwargs(args: Any, model_config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of the student's `from_pretrained`."""
    return {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        **keywords(args.model_init_kwargs),
    }


def _restore(arguments: StagedArguments, args: KDConfig) -> tuple[str, list[int]]:
    """Folder of the model with the bundle's layers, on which adapters are trained, and the indices of these layers.

    It is written to `restored` in the output directory: an adapter is of no use without the model it was trained on.
    """
    folder = _restored(args)
    tokenizer = student_tokenizer(arguments.model, args)
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


def _restored(args: KDConfig) -> str:
    """The folder of the model with restored layers."""
    return os.path.abspath(os.path.join(str(args.output_dir), "restored"))


def _resume(args: HardLabelConfig) -> str | bool | None:
    resume = args.resume_from_checkpoint
    return True if str(resume).lower() == "true" else resume


# ----------------------------------------------------------------------------------------------------------- the runs


def run_kd(trainer: KDTrainer, baseline: Baseline | None = None) -> None:
    """Distils, measures the student before and after on held-out rows, saves student, table and picture."""
    title = "student against teacher, held-out rows"
    if _measured_teacher(trainer) is None or trainer.engine not in ("none", "DDP"):  # only the trainer can ask them
        return _run_evaluated(trainer, title, EVALUATION_COLUMNS, baseline)
    before = _measure(trainer)
    _train(trainer)
    results = {"before": before, "after": _measure(trainer)}
    _report(trainer, results, title, FIDELITY_COLUMNS, baseline and partial(baseline, partial(_measure, trainer)))


def run_stage(arguments: StagedArguments, trainer: KDTrainer, baseline: Baseline | None = None) -> None:
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
    title = f"stage {arguments.stage}: student against teacher, held-out rows"
    _report(trainer, results, title, FIDELITY_COLUMNS, baseline and partial(baseline, partial(_measure, trainer)))


def run_skd(trainer: SpeculativeKDTrainer, baseline: Baseline | None = None) -> None:
    """Distils, and measures the student before and after on text that is generated from held-out prompts."""
    _run_evaluated(trainer, "student against teacher, text written from held-out prompts", ROLLOUT_COLUMNS, baseline)


def run_sft(trainer: HardLabelTrainer) -> None:
    """Trains on hard labels, and measures the student before and after on held-out rows."""
    _run_evaluated(trainer, "student, held-out rows", HARD_LABEL_COLUMNS)


def _run_evaluated(
    trainer: Any, title: str, columns: Mapping[str, tuple[str, str]], baseline: Baseline | None = None
) -> None:
    # The engines evaluate only what they have prepared for training.
    trainer.args.eval_on_start = trainer.eval_dataset is not None
    _train(trainer)
    before = next((entry for entry in trainer.state.log_history if "eval_ce" in entry or "eval_kd" in entry), {})
    num_tokens = _num_tokens(trainer) if before else 0

    def completed(values: Mapping[str, float]) -> Mapping[str, float]:
        return {**_compared(trainer, values), "num_tokens": num_tokens} if num_tokens else values

    def measure() -> Mapping[str, float]:
        return completed(trainer.evaluate()) if before else {}

    results = {"before": completed(before), "after": measure()}
    _report(trainer, results, title, columns, baseline and partial(baseline, measure))


def _compared(trainer: Any, evaluated: Mapping[str, float]) -> dict[str, float]:
    """The results of an evaluation on held-out rows, with those that `evaluate_fidelity` also has under its names."""
    found = {**evaluated, "student_perplexity": math.exp(min(evaluated["eval_ce"], 700))}
    if "eval_agreement" in evaluated:
        found["agreement"] = evaluated["eval_agreement"]
    teacher = getattr(trainer, "teacher", None)
    is_sample = isinstance(teacher, StoredTeacher) and teacher.manifest.method != "topk"
    if not is_sample and not (isinstance(teacher, RemoteTeacher) and teacher.is_whole):
        return found
    if trainer.args.divergence == "forward_kl" and trainer.setting("temperature") == 1:
        found["kl"] = evaluated["eval_kd"]  # of a sample its mean is right, of top-k it is a lower bound
    return found


def _num_tokens(trainer: Any) -> int:
    """Label-bearing tokens of the held-out rows; 0 if they are still to be generated."""
    rows: Any = trainer.eval_dataset
    if "input_ids" not in rows.column_names:
        return 0
    labels = (tokenized_row(row, trainer.tokenizer)["labels"][1:] for row in rows)
    return sum(label != -100 for row in labels for label in row)


def _measured_teacher(trainer: KDTrainer) -> PreTrainedModel | StoredHiddenTeacher | None:
    """The one teacher with the student's tokenizer, a model or its hidden states, that a student is measured against.

    None for several teachers, for one with another tokenizer or without either, and for the student's own base, which
    is the student while it is measured. A store has hidden states of the teacher's own prompts, if there are some.
    """
    teacher = trainer.teacher
    if trainer.has_pictures:
        return None  # only the trainer makes batches of its rows
    if isinstance(teacher, StoredHiddenTeacher):
        rows: Any = trainer.eval_dataset
        return None if "teacher_input_ids" in next(iter(rows or []), {}) else teacher
    return teacher.model if isinstance(teacher, LocalTeacher) else None


def _teachers(trainer: Any) -> Mapping[str, Any]:
    """The teachers by name; none of a training on hard labels."""
    return getattr(trainer, "teachers", {})


def _train(trainer: HardLabelTrainer) -> None:
    trainer.train(resume_from_checkpoint=_resume(trainer.args))
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(model_name=os.path.basename(os.path.normpath(str(trainer.args.output_dir))))


def _measure(trainer: KDTrainer, load: Callable[[], PreTrainedModel] | None = None) -> dict[str, float]:
    """Fidelity of the student, or of a model to load, on held-out rows; empty without any and in other processes."""
    found = {}
    rows: Any = trainer.eval_dataset
    teacher = _measured_teacher(trainer)
    assert teacher is not None
    if rows is not None and trainer.is_world_process_zero():
        model: Any = load() if load else trainer.accelerator.unwrap_model(trainer.model)
        found = evaluate_fidelity(
            model.to(trainer.args.device) if load else model,
            teacher,
            rows,
            trainer.tokenizer,
            batch_size=trainer.args.per_device_eval_batch_size,
            vocab_size=trainer.vocab_size,
        )
    trainer.accelerator.wait_for_everyone()
    return found


def _report(
    trainer: Any,
    results: Mapping[str, Mapping[str, float]],
    title: str,
    columns: Mapping[str, tuple[str, str]],
    run_baseline: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
) -> None:
    folder = str(trainer.args.output_dir)
    histories = {"training": trainer.state.log_history}
    writes = bool(results["before"]) and trainer.is_world_process_zero()
    sources = "; ".join(brought_from(_teachers(trainer)).values())

    def save() -> None:
        rows: Any = trainer.eval_dataset
        advice = run_baseline is None or BASELINE in results  # a baseline that is still to come needs no advice
        notes = [verdict(results, columns, advice=advice)]
        notes += [f"The teacher's outputs came from {sources}."] if sources else []
        note = " ".join(filter(None, notes))
        save_report(folder, results, histories, title, columns, num_rows=len(rows), note=note)

    if trainer.is_world_process_zero():
        for name in (TOKENS_FILE, *(() if writes else ("report.json",))):
            Path(folder, name).unlink(missing_ok=True)  # of an earlier run
    if writes:
        save()  # before anything that could fail
        with optional("the page of its tokens", folder):
            write_tokens(trainer)
        write_card(trainer, results, columns)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # without the baseline, which is a model of its own
    if run_baseline is not None:
        if trainer.is_world_process_zero():
            print("now the baseline, on hard labels alone")
        results = {**results, BASELINE: run_baseline(results["before"])}
        histories[BASELINE] = read_history(os.path.join(folder, BASELINE))
        if writes:
            save()
            write_card(trainer, results, columns)
    if writes:
        print(f"student, report.md and report.png are in {folder}")
    elif trainer.is_world_process_zero():
        print(f"the student is in {folder}; there were no held-out rows (--eval_dataset) to measure it on")
