"""A complete distillation, offline, on a CPU, in a minute or two, with a packaged teacher."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from hf_distill.demo.text import stories
from hf_distill.demo.train_teacher import special_token_ids
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.page import page_of, write_page
from hf_distill.quiet import quiet
from hf_distill.report import measured_on, result_rows, save_report
from hf_distill.runs import Run
from hf_distill.saving import set_aside
from hf_distill.token_comparison import compare_tokens
from hf_distill.token_data import comparison_data
from hf_distill.trainers.config import KDConfig
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig, checkpointing
from hf_distill.trainers.kd import KDTrainer

TEACHER = str(files("hf_distill.demo") / "teacher")
# The teacher has read tens of thousands of stories. The student gets few, so it matters what it learns from each.
NUM_TRAIN, NUM_HELD_OUT, STEPS = 200, 100, 200
RUNS = ("hard labels only", "distilled")
NUM_WORDS, NUM_WRITTEN = 12, 40  # words of a held-out story that models go on with, and tokens that they write


@contextmanager
def _on_one_thread() -> Iterator[None]:
    """Computes on one thread: a second one slows models this small down."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@quiet()
@_on_one_thread()
def run_demo(output_dir: str, num_seeds: int = 1, num_steps: int = STEPS) -> dict[str, dict[str, float]]:
    """Trains the same student on hard labels and on the teacher, and returns the mean results over seeds.

    Writes the distilled student of the first seed to `output_dir/student`, and `report.md`, `report.json`,
    `report.png` and `report.html` beside it. Files of an earlier demo are moved aside.

    Args:
        output_dir: a folder.
        num_seeds: pairs of trainings, each with its own student and stories.
        num_steps: updates of a training.
    """
    console = Console(highlight=False)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    console.print(f"[bold]One of the {NUM_TRAIN} stories that a student sees:[/bold]\n{stories(1, seed=1000)[0]}\n")

    results: dict[str, list[dict[str, float]]] = {name: [] for name in ("teacher", "untrained student", *RUNS)}
    runs: dict[str, Run] = {}
    beginning = " ".join(stories(1, seed=2000)[0].split()[:NUM_WORDS])
    written = {"teacher": continuation(teacher, tokenizer, beginning)}
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
    )
    for folder in (output_dir, f"{output_dir}/student"):
        set_aside(folder)
    with Progress(*columns, console=console) as progress, TemporaryDirectory() as nowhere:
        task = progress.add_task("", total=num_seeds * len(RUNS) * num_steps)
        for seed in range(num_seeds):
            for name in RUNS:
                progress.update(task, description=f"seed {seed}: {name}" if num_seeds > 1 else name)
                trainer = make_trainer(name, nowhere, seed, teacher, tokenizer, num_steps)
                trainer.remove_callback(PrinterCallback)  # one bar over all runs instead
                trainer.add_callback(_Advance(progress, task))
                if name == RUNS[0]:
                    results["teacher"].append(measure(trainer, teacher, teacher))
                    results["untrained student"].append(measure(trainer, trainer.model, teacher))
                    if seed == 0:
                        _show_start(console, results)
                trainer.train()
                results[name].append(measure(trainer, trainer.model, teacher))
                if seed == 0:
                    runs[name] = _run(trainer, results, name, teacher)
                    written[name] = continuation(trainer.model, tokenizer, beginning)
                    if name == RUNS[1]:
                        trainer.save_model(f"{output_dir}/student")

    means = {name: {key: mean(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()}
    over = f", means over {num_seeds} seeds" if num_seeds > 1 else ""
    histories = {name: run.history for name, run in runs.items()}
    save_report(output_dir, means, histories, f"held-out stories{over}", num_rows=NUM_HELD_OUT)
    note = f"Measured on {measured_on(means)}{over}. Curves and rows are those of the first seed."
    texts = [{"": name, f"{beginning} ...": f"... {text}"} for name, text in written.items()]
    page = {
        **page_of(runs), "title": "hf-distill demo", "tables": [{"rows": result_rows(means), "note": note}],
        "texts": [{"rows": texts, "note": "The most likely tokens after the beginning of a held-out story."}],
    }  # fmt: skip
    write_page(Path(output_dir, "report.html"), page)

    _show_end(console, results, beginning, written, output_dir)
    return means


def _show_end(
    console: Console,
    results: dict[str, list[dict[str, float]]],
    beginning: str,
    written: dict[str, str],
    output_dir: str,
) -> None:
    """The numbers of each seed, and how each model goes on with a story."""
    for seed, (hard, soft) in enumerate(zip(*(results[name] for name in RUNS), strict=True)):
        console.print(
            f"{f'seed {seed}: ' if len(results[RUNS[0]]) > 1 else ''}perplexity {hard['student_perplexity']:.3f} -> "
            f"{soft['student_perplexity']:.3f}, KL to the teacher {hard['kl']:.3f} -> {soft['kl']:.3f} nats "
            f"({soft['kl'] / hard['kl'] - 1:+.0%}), from {' to '.join(RUNS)}"
        )
    console.print(f"\n[bold]How they go on with[/bold] {beginning} ...")
    for name, text in written.items():
        console.print(f"[bold]{name}:[/bold] ... {text}", soft_wrap=True)
    console.print(
        f"\nOpen {Path(output_dir, 'report.html')} in a browser: it shows where, token by token. "
        f"The distilled student is in {Path(output_dir, 'student')}.",
        soft_wrap=True,  # a path that is cut cannot be copied
    )


def _show_start(console: Console, results: dict[str, list[dict[str, float]]]) -> None:
    """The first numbers, before any training."""
    found = {name: results[name][0]["student_perplexity"] for name in ("teacher", "untrained student")}
    console.print(
        f"Perplexity on {NUM_HELD_OUT} other stories: {found['teacher']:.2f} of the teacher, "
        f"{found['untrained student']:.0f} of the untrained student. It trains on the words of {NUM_TRAIN} stories. "
        "Then, new again, it trains on what the teacher expects at each of these words.\n"
    )


@torch.no_grad()
def continuation(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The most likely tokens after a text, as far as the end of a story or `NUM_WRITTEN`."""
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.eval().generate(**inputs, do_sample=False, max_new_tokens=NUM_WRITTEN)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def make_trainer(
    name: str,
    output_dir: str,
    seed: int,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_steps: int = STEPS,
) -> HardLabelTrainer:
    """A fresh student with its texts: the same settings for the trainer on hard labels and for the distillation."""
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": num_steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,  # near the best for both losses: 2.5e-3, 5e-3 and 1e-2 were tried
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "logging_steps": 20,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **checkpointing(False),
        "bf16": False,
        "use_cpu": True,
    }
    student = make_student(tokenizer, seed)
    data: dict[str, Any] = {  # the teacher has read the stories of seed 0
        "train_dataset": Dataset.from_dict({"text": stories(NUM_TRAIN, seed=1000 + seed)}),
        "eval_dataset": Dataset.from_dict({"text": stories(NUM_HELD_OUT, seed=2000)}),
        "processing_class": tokenizer,
    }
    if name == "hard labels only":
        return HardLabelTrainer(student, HardLabelConfig(**settings), **data)
    return KDTrainer(student, teacher, KDConfig(**settings, kd_weight=1.0), **data, teacher_processing_class=tokenizer)


def make_student(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A random Llama with half the teacher's layers and less than a third of its parameters."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **special_token_ids(tokenizer),
        )
    )


def measure(trainer: HardLabelTrainer, model: Any, teacher: PreTrainedModel) -> dict[str, float]:
    """Fidelity on the held-out rows that the trainer has tokenised."""
    rows: Any = trainer.eval_dataset
    tokenizer: Any = trainer.processing_class
    return evaluate_fidelity(model, teacher, rows, tokenizer, batch_size=50)


def _run(
    trainer: HardLabelTrainer, results: dict[str, list[dict[str, float]]], name: str, teacher: PreTrainedModel
) -> Run:
    """A training that has just ended, for the page."""
    student: Any = trainer.model
    rows: Any = trainer.eval_dataset
    tokenizer: Any = trainer.processing_class
    compared = compare_tokens(student, teacher, rows, tokenizer, batch_size=50)
    shown = ("kd_weight", "learning_rate", "per_device_train_batch_size", "max_steps", "seed")
    settings: dict[str, Any] = {"model": f"a random Llama of {student.config.num_hidden_layers} layers"}
    if name == "distilled":
        settings["teacher_model"] = f"the packaged Llama of {teacher.config.num_hidden_layers} layers"
    settings |= {setting: getattr(trainer.args, setting) for setting in shown if hasattr(trainer.args, setting)}
    measured = {"before": results["untrained student"][-1], "after": results[name][-1]}
    recorded = {"command": "demo", "num_rows": {"training": NUM_TRAIN, "held-out": NUM_HELD_OUT}}
    return Run(settings, trainer.state.log_history, measured, recorded, comparison_data(compared))


class _Advance(TrainerCallback):
    def __init__(self, progress: Progress, task: TaskID):
        self.progress, self.task = progress, task

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.task)
