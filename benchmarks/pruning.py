"""Recovery of a pruned model with adapters: hard labels against distillation at equal budgets, then in stages.

    OMP_NUM_THREADS=1 python -m benchmarks.pruning --teacher stories260K --data tinystories

Rows are those of benchmarks/tinystories.py. Two of the teacher's layers are dropped: the two that `rank_layers` chooses
on training rows, or the last two. The other layers get LoRA adapters, trained on hard labels or on forward KL to the
whole model. The stages continue from the result of forward KL on the first choice (A). The first removed layer is
restored, and adapters are trained on it alone, or on all layers (A+B). Then the second layer is restored (A+B+C). For
comparison with A+B, another model loses only the second layer and is trained for as long as both stages.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from benchmarks.measure import print_table
from benchmarks.stories import (
    add_budget,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    measure_fidelity,
    train_kd,
)
from benchmarks.tinystories import OBJECTIVES
from hf_distill.pruning import drop_layers, original_layers, rank_layers, restore_layers
from hf_distill.row_files import first_rows

TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


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
    """The student after training adapters on all or some of its layers and merging them."""
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, layers_to_transform=layers)
    changes = {"max_steps": stages * options.steps, **OBJECTIVES[objective]}
    return train_kd(
        student, teacher, rows, tokenizer, changes, seed, options, peft_config=lora
    ).model.merge_and_unload()


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_budget(parser, steps=100, learning_rate=1e-2)  # steps of each stage
    parser.add_argument("--probe-rows", type=int, default=256, help="rows on which layers are ranked")
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer)
    fidelity = partial(measure_fidelity, teacher=teacher, held_out=held_out, tokenizer=tokenizer)
    table = []

    def add(name: str, make: Callable[[int], PreTrainedModel], seeds: list[int]) -> dict[int, PreTrainedModel]:
        """Adds a row to the table: the measurements of the model for each seed."""
        models = {}
        for seed in seeds:
            set_seed(seed)
            models[seed] = make(seed)
        found = [fidelity(model) for model in models.values()]
        table.append({"": name, "layers": _numbers(original_layers(models[seeds[0]])), **describe_all(found)})
        print(table[-1], file=sys.stderr, flush=True)  # runs are long; the table comes at the end
        return models

    def trained(student: Callable[[int], PreTrainedModel], objective: str, **changes) -> Callable:
        return lambda seed: train(student(seed), teacher, rows, tokenizer, objective, seed, options, **changes)

    def without(layers: list[int]) -> Callable[[int], PreTrainedModel]:
        return lambda seed: drop_layers(teacher, layers)

    spans = rank_layers(teacher, first_rows(rows, options.probe_rows), tokenizer, 2, batch_size=32)
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
    size = f"{options.steps} steps of {options.batch_size} x {options.length} tokens, rank {options.rank}"
    title = f"{size}, learning rate {options.learning_rate}; mean (seeds {options.seeds}) on"
    print_table(f"{title} {len(held_out)} held-out rows", table, options.markdown)


def _numbers(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


if __name__ == "__main__":
    main()
