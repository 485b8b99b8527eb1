"""Writing, reading and training from a store of a teacher's outputs, against the least that each has to take.

    OMP_NUM_THREADS=1 python -m benchmarks.store_speed
    OMP_NUM_THREADS=1 python -m benchmarks.store_speed --tables reading --stores hidden --width 4096 --length 1024 \
        --layers 1 --vocab-size 1000

Models are random Llamas (their cost does not depend on their weights) with the width and vocabulary of SmolLM2-135M;
`--vocab-size 151936` is that of Qwen. The second command reads hidden states as wide as those of a 7B teacher. All
variants of a table take turns, a few times over, and ratios are those of their medians.

- Writing, for each batch of texts: the teacher's body alone (for hidden states), or body and head product at the
  label-bearing positions (for probabilities), against the same with all that a store adds: encoding, checksums, files.
- Reading: decoding the documents of a batch (`collate`, in the workers of a data loader) against copying as many bytes
  out of the mapped file.
- A step: `trainer.training_step` on a ready batch from a store, against the one on hard labels, which for hidden states
  has the teacher head's product added.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from benchmarks.measure import machine, print_table
from hf_distill import KDConfig, KDTrainer
from hf_distill.losses.head import default_chunk_size
from hf_distill.store.formats import chunks
from hf_distill.teachers.stored import open_store
from hf_distill.teachers.writing import Method, StoreWriter
from hf_distill.trainers.caching import store_writer

TABLES = ["writing", "reading", "step"]
METHODS = {
    "hidden, float16": Method(),
    "hidden, int8": Method(dtype="int8"),
    "threshold, 12 entries": Method("sampled"),
    "multinomial, 50 draws": Method("sampled", sampler="multinomial", entries=50),
    "top-12": Method("topk"),
}


def make_model(layers: int, options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    heads = options.width // 64
    config = LlamaConfig(
        vocab_size=options.vocab_size, hidden_size=options.width, intermediate_size=options.width * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads if heads % 3 else heads // 3,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(8)  # distributions that are neither flat nor sure
    return model


def make_trainer(folder: str, teacher: Any, rows: Dataset, options: argparse.Namespace, **changes: Any) -> KDTrainer:
    settings = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "per_device_train_batch_size": options.batch_size, "max_length": None, "kd_weight": 0.5,
        "per_device_eval_batch_size": options.batch_size, "dataset_kwargs": {"skip_prepare_dataset": True}, **changes,
    }  # fmt: skip
    words = models.WordLevel({f"t{i}": i for i in range(options.vocab_size)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="t1", pad_token="t0")
    student = make_model(options.student_layers, options)
    trainer = KDTrainer(student, teacher, KDConfig(**settings), rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_turns(variants: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median seconds of each variant, which take turns after a call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(times + 1):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def written(trainer: KDTrainer, folder: Path, options: argparse.Namespace) -> dict[str, StoreWriter]:
    """The writer of each store, which has written it once: its probe is made then, whatever the store's size."""
    writers = {name: store_writer(trainer, method) for name, method in options.methods.items()}
    for name, each in writers.items():
        each.write(folder / name)
    return writers


def writing(writers: dict[str, StoreWriter], folder: Path, options: argparse.Namespace) -> list[dict[str, str]]:
    """Seconds of writing all rows, against the teacher's body, and body and head product, over the same batches."""
    documents = next(iter(writers.values())).documents
    order = np.argsort(-documents.num_tokens, kind="stable")
    batches = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    writer = [*writers.values()][-1]

    def body() -> None:
        for batch in batches:
            writer.ask(*zip(*(documents[int(i)] for i in batch), strict=True))

    def product() -> None:
        for batch in batches:
            signal = writer.ask(*zip(*(documents[int(i)] for i in batch), strict=True))
            for _ in chunks(signal, options.vocab_size):
                pass

    def write(name: str) -> Callable[[], Any]:
        def again() -> None:
            for path in (folder / name).glob("*-*-*.safetensors"):
                path.unlink()
            writers[name].write(folder / name)

        return again

    writes = {name: write(name) for name in options.methods}
    found = in_turns({"body": body, "body and head": product, **writes}, options.times)
    rows = []
    for name in options.methods:
        floor = "body" if name.startswith("hidden") else "body and head"
        counts = open_store(str(folder / name), index=0, num_proc=None).manifest.counts
        size = counts["bytes"] / counts["positions"]
        rows.append({
            "store": name, "floor": floor, "floor, s": f"{found[floor]:.2f}", "writing, s": f"{found[name]:.2f}",
            "ratio": f"{found[name] / found[floor]:.2f}", "bytes a position": f"{size:.1f}",
        })  # fmt: skip
    return rows


def reading(folder: Path, rows: Dataset, options: argparse.Namespace) -> list[dict[str, str]]:
    """Seconds of a batch's `collate`, against a copy of its bytes."""
    batch = [rows[i] for i in range(options.batch_size)]
    variants: dict[str, Callable[[], Any]] = {}
    sizes = {}
    for name in options.methods:
        teacher = open_store(str(folder / name), index=0, num_proc=None)
        collate = teacher.collate
        shard = teacher.store.shards[0]
        positions = sum(len(row["input_ids"]) - 1 for row in batch)
        sizes[name] = size = int(shard.num_bytes * positions / shard.num_labels.sum())
        collate(batch)
        data = np.memmap(shard.path, np.uint8, mode="r")[:size]
        variants[name] = lambda collate=collate: collate(batch)
        variants[f"copy of {name}"] = lambda data=data: np.array(data)
    found = in_turns(variants, 20)
    return [
        {
            "store": name, "bytes of a batch": f"{sizes[name]:,}", "decoding, ms": f"{1e3 * found[name]:.2f}",
            "MB/s": f"{sizes[name] / found[name] / 1e6:.0f}", "copy, ms": f"{1e3 * found[f'copy of {name}']:.2f}",
        }
        for name in options.methods
    ]  # fmt: skip


def stepping(folder: Path, teacher: Any, rows: Dataset, options: argparse.Namespace) -> list[dict[str, str]]:
    """Seconds of a training step on a ready batch."""
    steps: dict[str, Callable[[], Any]] = {}
    sources = {"hard labels": (teacher, 0.0), "online": (teacher, 0.5)}
    sources |= {name: (f"cache:{folder / name}", 0.5) for name in options.methods}
    for name, (source, weight) in sources.items():
        trainer = make_trainer(str(folder / "run"), source, rows, options, kd_weight=weight)
        batch = trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, options.batch_size))

        def step(trainer=trainer, batch=batch) -> None:
            trainer.model.zero_grad(set_to_none=True)
            trainer.training_step(trainer.model, dict(batch), torch.tensor(1000))

        steps[name] = step
    head = make_model(1, options).lm_head.weight.data
    positions = sum(len(rows[i]["input_ids"]) - 1 for i in range(options.batch_size))
    hidden = torch.randn(positions, options.width)
    rows_per_chunk = default_chunk_size(hidden.device, options.vocab_size)

    def product() -> None:
        for part in hidden.split(rows_per_chunk):
            part @ head.T

    found = in_turns({**steps, "head product": product}, options.times)
    table = []
    for name in steps:
        floor = found["hard labels"] + found["head product"] * name.startswith(("hidden", "online"))
        table.append({
            "teacher": name, "step, s": f"{found[name]:.3f}", "floor, s": f"{floor:.3f}",
            "ratio": f"{found[name] / floor:.2f}",
        })  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576, help="of both models, a multiple of 64")
    parser.add_argument("--layers", type=int, default=30, help="of the teacher")
    parser.add_argument("--student-layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest row")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--stores", default="", help="how the names of the stores begin")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    options.methods = {name: method for name, method in METHODS.items() if name.startswith(options.stores)}
    disable_progress_bars()
    torch.manual_seed(0)
    lengths = torch.linspace(options.length / 2, options.length, options.rows).int().tolist()
    ids = [torch.randint(2, options.vocab_size, (length,)).tolist() for length in lengths]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    teacher = make_model(options.layers, options)
    print(machine("cpu"), f"V = {options.vocab_size:,}, D = {options.width:,}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(str(folder / "run"), teacher, rows, options)
        writers = written(trainer, folder, options)
        if "writing" in options.tables:
            print_table("writing", writing(writers, folder, options), options.markdown)
        if "reading" in options.tables:
            print_table("reading", reading(folder, rows, options), options.markdown)
        if "step" in options.tables:
            print_table("a step", stepping(folder, teacher, rows, options), options.markdown)


if __name__ == "__main__":
    main()
