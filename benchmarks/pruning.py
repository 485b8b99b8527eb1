"""What a pruned model wins back with adapters: hard labels against distillation at equal budgets, then in stages.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning --teacher stories260K --data tinystories

Rows as in benchmarks/tinystories.py. Two of the teacher's layers are dropped: those that `rank_layers` chooses on rows
of the training data, and the last two. The rest gets LoRA adapters, with hard labels or with forward KL to the whole
model. The stages go on from what forward KL has made of the first choice (A): the first removed layer is restored and
adapters are trained on it alone, or on all layers (A+B), then the second is (A+B+C). To compare with A+B there is a
model that has lost only the second layer, trained for as long as both stages.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from benchmarks.measure import print_table
from benchmarks.tinystories import OBJECTIVES, describe, load_chunks
from hf_distill import KDConfig, KDTrainer, evaluate_fidelity
from hf_distill.pruning import drop_layers, original_layers, rank_layers, restore_layers

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
MEASURES = {
    "perplexity": ("student_perplexity", "{:.2f}"),
    "KL to the teacher": ("kl", "{:.3f}"),
    "agreement": ("agreement", "{:.1%}"),
}


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    objective: str,
    seed: int,
    options: argparse.Namespace,
    *,
    layers: list[int] | None = None,
    stages: int = 1,
) -> PreTrainedModel:
    """The student after training with adapters, on all of its layers or on some, and merging them."""
    with tempfile.TemporaryDirectory() as folder:
        args = KDConfig(
            output_dir=folder, max_steps=stages * options.steps, per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate, lr_scheduler_type="cosine", max_grad_norm=1.0,
            max_length=options.length, seed=seed, bf16=False, gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(), logging_strategy="no", save_strategy="no", report_to="none",
            disable_tqdm=True, **OBJECTIVES[objective],
        )  # fmt: skip
        lora = LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, layers_to_transform=layers
        )
        trainer = KDTrainer(
            student, teacher, args, rows, processing_class=tokenizer, teacher_processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # prints to where the table goes
        trainer.train()
        return trainer.model.merge_and_unload()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or hub id of a causal language model")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--probe-rows", type=int, default=256, help="rows on which layers are ranked")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device)
    rows, held_out = (
        load_chunks(options.data / f"{name}.jsonl", tokenizer, options.length) for name in ("train", "test")
    )
    fidelity = partial(evaluate_fidelity, teacher=teacher, dataset=held_out, tokenizer=tokenizer, batch_size=32)
    table = []

    def add(name: str, make: Callable[[int], PreTrainedModel], seeds: list[int]) -> dict[int, PreTrainedModel]:
        """A row of the table: what is made with each seed, measured."""
        models = {}
        for seed in seeds:
            set_seed(seed)
            models[seed] = make(seed)
        found = [fidelity(model) for model in models.values()]
        cells = {title: describe([values[key] for values in found], form) for title, (key, form) in MEASURES.items()}
        table.append({"": name, "layers": _numbers(original_layers(models[seeds[0]])), **cells})
        print(table[-1], file=sys.stderr, flush=True)  # runs are long; the table comes at the end
        return models

    def trained(student: Callable[[int], PreTrainedModel], objective: str, **changes) -> Callable:
        return lambda seed: train(student(seed), teacher, rows, tokenizer, objective, seed, options, **changes)

    def without(layers: list[int]) -> Callable[[int], PreTrainedModel]:
        return lambda seed: drop_layers(teacher, layers)

    spans = rank_layers(teacher, rows.take(options.probe_rows), tokenizer, 2, batch_size=32)
    ranks = [
        {
            "dropped": _numbers(span.layers),
            "distance": f"{span.distance:.4f}",
            "perplexity without them": f"{fidelity(drop_layers(teacher, span.layers))['student_perplexity']:.2f}",
        }
        for span in spans
    ]
    once, last = options.seeds[:1], teacher.config.num_hidden_layers - 1
    best = spans[0].layers
    recovered: dict[int, PreTrainedModel] = {}
    add("the whole model", lambda seed: teacher, once)
    for name, layers in {"the last two dropped": [last - 1, last], "the lowest distance dropped": best}.items():
        add(name, without(layers), once)
        for objective in ("hard labels", "forward KL"):
            recovered = add(f"{name}, LoRA: {objective}", trained(without(layers), objective), options.seeds)

    with tempfile.TemporaryDirectory() as bundles:
        drop_layers(teacher, best, bundles, {"B": best[:1], "C": best[1:]})

        def with_b(seed: int) -> PreTrainedModel:
            return restore_layers(recovered[seed], bundles, ["B"])

        restored = add("A+B, restored", with_b, options.seeds)
        place = [original_layers(restored[options.seeds[0]]).index(best[0])]
        add("A+B, LoRA on all layers", trained(with_b, "forward KL"), options.seeds)
        staged = add("A+B, LoRA on B", trained(with_b, "forward KL", layers=place), options.seeds)
        whole = add("A+B+C, restored", lambda seed: restore_layers(staged[seed], bundles), options.seeds)
        add("A+B+C, LoRA on C", trained(whole.__getitem__, "forward KL", layers=best[1:]), options.seeds)
    add("only C dropped", without(best[1:]), once)
    add("only C dropped, LoRA", trained(without(best[1:]), "forward KL", stages=2), options.seeds)

    print_table(f"angular distance on {options.probe_rows} training rows", ranks, options.markdown)
    budget = f"{options.steps} steps of {options.batch_size} x {options.length} tokens, rank {options.rank}"
    title = f"{budget}, learning rate {options.learning_rate}; mean (seeds {options.seeds}) on"
    print_table(f"{title} {len(held_out)} held-out rows", table, options.markdown)


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


if __name__ == "__main__":
    main()
