"""Training from a store of the teacher's outputs, against its teacher online, at equal budgets, on held-out stories.

    OMP_NUM_THREADS=1 python -m benchmarks.teacher_cache --teacher stories260K --data tinystories

Rows are 128-token pieces of the stories, as in `benchmarks.tinystories`; the student is made of some of the teacher's
layers. All runs of a seed see the same rows in the same order, with the divergence alone (`kd_weight` 1), but for hard
labels. A store is written once, by `trainer.write_cache`, and serves all seeds. Bytes are those of all files of a store
per label-bearing position; the head is left out. "top-k, renormalised" is what other stores hold: the most likely
tokens with weights that sum to 1, read here as a sample.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

from benchmarks.measure import machine, print_table
from benchmarks.stories import (
    FIDELITY,
    add_budget,
    budget,
    describe_all,
    load_rows,
    load_teacher,
    make_parser,
    make_trainer,
    some_layers,
    trained_fidelities,
)
from hf_distill import KDConfig, KDTrainer
from hf_distill.losses.sparse import SparseSignal
from hf_distill.teachers.stored import StoredTeacher
from hf_distill.teachers.writing import Method

MEASURED = {**FIDELITY, "KL to the teacher": ("kl", "{:.4f}")}  # a percent of it is to be seen
METHODS = {
    "hidden, float16": Method(),
    "hidden, int8": Method(dtype="int8"),
    "threshold, 12 entries": Method("sampled", entries=12),
    "threshold, 50 entries": Method("sampled", entries=50),
    "multinomial, 50 draws": Method("sampled", sampler="multinomial", entries=50),
    "top-12 and the rest": Method("topk", entries=12),
    "top-50 and the rest": Method("topk", entries=50),
    "top-20 and the rest": Method("topk", entries=20),  # these two are what servers tell by default, and at most
    "top-64 and the rest": Method("topk", entries=64),
}


class Renormalised(StoredTeacher):
    """The K most likely tokens as if there were no others."""

    def __call__(self, inputs: Mapping[str, Any], positions: torch.Tensor) -> SparseSignal:
        found = self.read(inputs, positions)
        return SparseSignal(found["ids"], found["log_probs"].softmax(-1))


def write_stores(folder: Path, teacher: Any, rows: Dataset, tokenizer: Any, options: argparse.Namespace) -> dict:
    """The store of each method, with its bytes per position."""
    settings = {**budget(options, 0), "per_device_eval_batch_size": 32}
    writer = make_trainer(KDTrainer, KDConfig, some_layers(teacher, options.layers), teacher, rows, tokenizer, settings)
    found = {}
    for name, method in ((name, METHODS[name]) for name in METHODS if name in options.methods):
        counts = writer.write_cache(folder / name.replace(" ", "-"), method).counts
        found[name] = (folder / name.replace(" ", "-"), counts["bytes"] / counts["positions"])
    return found


def sources(stores: dict, teacher: Any) -> dict[str, tuple[Any, float | None, dict[str, Any]]]:
    """For each arm its teacher, bytes per position, and changes to the settings."""
    stored = {name: (f"cache:{folder}", size, {"kd_weight": 1.0}) for name, (folder, size) in stores.items()}
    biased = {
        f"top-{k}, renormalised": (
            Renormalised(str(stores[f"top-{k} and the rest"][0])), stores[f"top-{k} and the rest"][1],
            {"kd_weight": 1.0},
        )
        for k in (12, 50) if f"top-{k} and the rest" in stores
    }  # fmt: skip
    online = {"the teacher online": (teacher, None, {"kd_weight": 1.0})}
    return {**online, **stored, **biased, "hard labels": (teacher, None, {"kd_weight": 0.0})}


def main() -> None:
    parser = make_parser(__doc__)
    add_budget(parser, steps=120, learning_rate=3e-3)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for the student")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    options = parser.parse_args()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer)
    rows = rows.select(range(min(len(rows), options.steps * options.batch_size)))  # each is trained on once
    table = []
    with tempfile.TemporaryDirectory() as folder:
        stores = write_stores(Path(folder), teacher, rows, tokenizer, options)
        for name, (source, size, changes) in sources(stores, teacher).items():
            found = trained_fidelities(options, source, teacher, rows, held_out, tokenizer, changes)
            bytes_text = "-" if size is None else f"{size:.1f}"
            table.append({"teacher": name, "bytes a position": bytes_text, **describe_all(found, MEASURED)})
            print(table[-1], flush=True)
    print(machine("cpu"))
    print_table("training from a store, held-out stories", table, options.markdown)


if __name__ == "__main__":
    main()
