"""The fidelity of a stored teacher: the direction of a student's gradient against full distillation, store by store.

    OMP_NUM_THREADS=2 python -m benchmarks.cache_fidelity --teacher SmolLM2-135M-Instruct --text squad/train.jsonl \\
        --column context --folder out/fidelity --picture fidelity.png

Rows of 257 tokens are cut from one stream of the distinct texts, so that each has 256 label-bearing tokens; a block has
four rows. The student is the teacher without some of its layers, untrained. The stores are those of
benchmarks/stored_targets.py, and their losses are the library's. Measured is the angle between the gradient of the
forward KL to what is stored and to the teacher:

- of all parameters, over one block (the mean of ten) and over ten blocks;
- of the head's weight alone, over up to 98 blocks (100,352 tokens). One forward of the student serves all stores.

An unbiased store's angle falls with the square root of the number of tokens. A biased one's stays. Everything that is
measured is kept in `--folder`, and a call that was stopped goes on from there. `--parts` selects what to do: processes
with different parts can share a folder.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.gradient_angles import compare, head_gradients, parameter_gradients
from benchmarks.measure import machine, print_table
from benchmarks.stored_targets import Sizes, Store, make_stores, sizes_for, squared_error, write_hidden
from hf_distill.hidden_bytes import Rounding, choose_rounding, folded_head
from hf_distill.losses.divergence import forward_kl, log_softmax
from hf_distill.losses.fused_linear import Head, TeacherSignal
from hf_distill.modeling import head_of, last_hidden_states
from hf_distill.pruning import drop_layers

CHUNK = 128  # positions whose logits exist at a time
GROUP = 5  # stores that share a forward of the student: their summed gradients are held
SAVED_EVERY = 5  # blocks of the head's part
HEAD_BLOCKS = 10  # blocks whose own angles are measured in the head's part
HEAD_MARKS = (1, 3, 10, 30)  # blocks after which the angles of sums are measured there, and at the end
EXACT = "the teacher itself"
PARTS = ["blocks", "parameters", "head"]


# ---------------------------------------------------------------------------------------------------- rows and blocks


def load_rows(path: Path, column: str, tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> Tensor:
    """The first `number` rows (number, length) of one stream of the distinct texts of a JSON-lines file, in its order.

    Raises:
        `ValueError`: there are fewer.
    """
    with open(path, encoding="utf-8") as file:
        texts = list(dict.fromkeys(json.loads(line)[column] for line in file))
    stream: list[int] = []
    for start in range(0, len(texts), 100):
        stream += tokenizer("\n\n".join(texts[start : start + 100]) + "\n\n", verbose=False)["input_ids"]
        if len(stream) >= number * length:
            return torch.tensor(stream[: number * length]).view(number, length)
    raise ValueError(f"{path} has {len(stream) // length} rows of {length} tokens, {number} are needed")


class Blocks:
    """Blocks of rows with what models say about them, made when they are first asked for and kept in a folder.

    A block is a dict: `input_ids` (R, T), the last hidden states of `teacher` and `student` (n, D), and `stores`, for
    each name its [`Stored`] and its sums over positions.
    """

    def __init__(
        self, folder: Path, rows: Sequence[Tensor], teacher: PreTrainedModel, student: PreTrainedModel, seed: int
    ) -> None:
        self.folder, self.rows, self.teacher, self.student, self.seed = folder, rows, teacher, student, seed
        self.stores: Mapping[str, Store] = {}
        self.roundings: Mapping[str, tuple[Rounding, Head]] = {}  # of stores of hidden states, with their heads
        self.names: Sequence[str] = ()  # of the stores whose gradients are measured

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.folder / f"block-{index:03}.pt"
        block = torch.load(path, weights_only=False) if path.exists() else self._read(index)
        if missing := {name: store for name, store in self.stores.items() if name not in block["stores"]}:
            logits = head_of(self.teacher).logits(block["teacher"])  # (n, V)
            probs = logits.softmax(-1)
            squares = probs.double().square().sum().item()
            for name, store in missing.items():
                stored = store(logits, 1000 * self.seed + index)
                block["stores"][name] = stored, squared_error(stored, probs, squares)
            save(path, block)
            say(f"block {index} is written")
        return block

    def _read(self, index: int) -> dict[str, Any]:
        ids = self.rows[index]
        hidden = {
            name: last_hidden_states(model, input_ids=ids)[:, :-1].flatten(0, 1)
            for name, model in (("teacher", self.teacher), ("student", self.student))
        }
        block = {"input_ids": ids, **hidden, "stores": {}}
        save(self.folder / f"block-{index:03}.pt", block)
        return block

    def signals(self, block: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The signals of these stores, or of the teacher itself, at a block."""
        signals: dict[str, Any] = {}
        for name in names:
            if name == EXACT:
                signals[name] = TeacherSignal(block["teacher"], head_of(self.teacher))
            elif name in self.roundings:
                signals[name] = write_hidden(block["teacher"], *self.roundings[name]).signal
            else:
                signals[name] = block["stores"][name][0].signal
        return signals


def save(path: Path, content: Any) -> None:
    """Writes a file that is whole or absent: JSON, or else what torch saves."""
    beside = path.with_suffix(f".{os.getpid()}")
    if path.suffix == ".json":
        beside.write_text(json.dumps(content, indent=1), "utf-8")
    else:
        torch.save(content, beside)
    beside.replace(path)


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


# ------------------------------------------------------------------------------------------------------- measurements


def measure_parameters(blocks: Blocks, number: int, path: Path) -> dict[str, Any]:
    """For each store the comparison of gradients of all parameters: at each of `number` blocks, and of their sums."""
    while pending := [name for name in blocks.names if name not in load_json(path)][:GROUP]:
        totals: dict[str, list[Tensor]] = {}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in pending}
        for index in range(number):
            block, kept = blocks[index], blocks.folder / f"exact-{index:03}.pt"
            exact, exact_kd = torch.load(kept, mmap=True) if kept.exists() else ((), 0.0)
            signals = blocks.signals(block, pending if kept.exists() else [EXACT, *pending])
            for name, gradient, kd in parameter_gradients(blocks.student, block["input_ids"], signals):
                if name == EXACT:
                    exact, exact_kd = gradient, kd
                    save(kept, (exact, exact_kd))
                else:
                    kl = {"kl": exact_kd / len(block["teacher"]), "kl_error": (kd - exact_kd) / len(block["teacher"])}
                    found[name].append(compare(gradient, exact) | kl)
                    add_(totals, name, gradient)
            add_(totals, EXACT, exact)
            say(f"parameters, block {index}: {'; '.join(pending)}")
        results = {
            name: {"blocks": found[name], "totals": {str(number): compare(totals[name], totals[EXACT])}}
            for name in pending
        }
        save(path, load_json(path) | results)  # another process may have added some
    return load_json(path)


def add_(totals: dict[str, list[Tensor]], name: str, gradient: Sequence[Tensor]) -> None:
    if name in totals:
        torch._foreach_add_(totals[name], list(gradient))
    else:
        totals[name] = [x.clone() for x in gradient]


def measure_head(blocks: Blocks, number: int, path: Path) -> dict[str, Any]:
    """For each store the comparison of gradients of the head's weight: at the first blocks, and of sums at marks."""
    results, state = load_json(path), path.with_suffix(".pt")
    pending = [name for name in blocks.names if name not in results or str(number) not in results[name]["totals"]]
    if not pending:
        return results
    names, start, totals, found = torch.load(state) if state.exists() else ([], 0, {}, {})
    if names != pending:
        start, totals, found = 0, {}, {name: {"blocks": [], "totals": {}} for name in pending}
    for index in range(start, number):
        block = blocks[index]
        signals = blocks.signals(block, [EXACT, *pending])
        gradients = head_gradients(block["student"], head_of(blocks.student), signals)
        for name, gradient in gradients.items():
            add_(totals, name, [gradient])
        for name in pending:
            if index < HEAD_BLOCKS:
                found[name]["blocks"].append(compare([gradients[name]], [gradients[EXACT]]))
            if index + 1 in (*HEAD_MARKS, number):
                found[name]["totals"][str(index + 1)] = compare(totals[name], totals[EXACT])
        if (index + 1) % SAVED_EVERY == 0 or index + 1 == number:
            save(state, (pending, index + 1, totals, found))
            save(path, results | found)
        say(f"head, block {index}")
    state.unlink(missing_ok=True)
    return results | found


def measure_hidden(blocks: Blocks, number: int, path: Path) -> dict[str, Any]:
    """For each store of hidden states the mean bytes, squared error and KL(teacher || stored) of a position."""
    results = load_json(path)
    for name, stored in blocks.roundings.items():
        if name in results or name not in blocks.names:
            continue
        found, num_bytes = [], 0.0
        for index in range(number):
            hidden = blocks[index]["teacher"]
            written = write_hidden(hidden, *stored)
            assert isinstance(written.signal, TeacherSignal)
            num_bytes += written.num_bytes
            for exact, read in zip(hidden.split(CHUNK), written.signal.hidden.split(CHUNK), strict=True):
                exact = log_softmax(head_of(blocks.teacher).logits(exact))
                read = log_softmax(written.signal.head.logits(read))
                error = (exact.exp() - read.exp()).square().sum(-1)
                found.append(torch.stack([error, forward_kl(read, exact)[0].sum(-1)], 1).double())
        found = torch.cat(found)
        error, kl = found.mean(0).tolist()
        results[name] = {"bytes": num_bytes / len(found), "squared_error": error, "kl": kl}
        save(path, results)
    return results


def mean_sums(blocks: Blocks, number: int) -> dict[str, dict[str, float]]:
    """For each sparse store its entries, bytes and squared error, in the mean over the positions of blocks."""
    sums = {name: [0.0, 0.0, 0.0] for name in blocks.stores}
    num_positions = 0
    for index in range(number):
        block = blocks[index]
        num_positions += len(block["teacher"])
        for name, total in sums.items():
            stored, error = block["stores"][name]
            total[:] = (x + y for x, y in zip(total, (stored.num_entries, stored.num_bytes, error), strict=True))
    keys = "entries", "bytes", "squared_error"
    return {name: dict(zip(keys, (x / num_positions for x in total), strict=True)) for name, total in sums.items()}


# ------------------------------------------------------------------------------------------------------------- report


def angles(tokens: int, found: Mapping[str, Any]) -> dict[int, float]:
    """Angles in degrees over the number of tokens: of one block in the mean over blocks, then of sums.

    Args: the tokens of a block, and a store's results in `measure_parameters` or `measure_head`.
    """
    first = {tokens: statistics.mean(one["angle"] for one in found["blocks"])}
    return first | {tokens * int(n): one["angle"] for n, one in found["totals"].items() if n != "1"}


def table(
    tokens: int, sums: Mapping[str, Mapping[str, float]], parameters: Mapping[str, Any], head: Mapping[str, Any]
) -> list[dict[str, str]]:
    """A row for each store. "all" are the angles of all parameters, "head" those of the head's weight."""
    rows = []
    for name, means in sums.items():
        row = {
            "stored": name,
            "entries": f"{means['entries']:.1f}" if "entries" in means else "",
            "bytes": f"{means['bytes']:.1f}",
            "squared error": f"{means['squared_error']:.2g}",
            "KL, nats": f"{means['kl']:.2g}" if "kl" in means else "",
        }
        if name in parameters:
            row["loss, nats"] = f"{statistics.mean(one['kl_error'] for one in parameters[name]['blocks']):+.4f}"
        for part, results in (("all", parameters), ("head", head)):
            if name in results:
                row |= {f"{part}, {n:,}": f"{angle:.3g}°" for n, angle in angles(tokens, results[name]).items()}
        rows.append(row)
    return rows


def save_picture(path: Path, tokens: int, parameters: Mapping[str, Any], head: Mapping[str, Any], title: str) -> None:
    """A PNG: the angles over the number of tokens, of all parameters and of the head's weight; `tokens` of a block."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = dict(zip(("all parameters", "the head's weight"), figure.subplots(1, 2, sharey=True), strict=True))
    methods: dict[str, int] = {}
    for (panel, axes), results in zip(panels.items(), (parameters, head), strict=True):
        for name, found in results.items():
            method, _, size = name.partition(", K = ")
            color = f"C{methods.setdefault(method, len(methods))}"
            style = {"": "-", "12": "-", "25": "--", "50": ":"}.get(size, "-.")
            points = angles(tokens, found)
            axes.plot(list(points), list(points.values()), style, color=color, marker=".", label=name)
        axes.set(xscale="log", yscale="log", xlabel="label-bearing tokens", title=panel)
        axes.grid(which="both", alpha=0.2)
    panels["all parameters"].set_ylabel("angle to the gradient of full distillation, degrees")
    figure.legend(*panels["all parameters"].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # runs are long; the table comes at the end


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="path or hub id of a causal language model")
    parser.add_argument("--text", required=True, type=Path, help="JSON lines")
    parser.add_argument("--column", default="text", help="the text of a line")
    parser.add_argument("--folder", required=True, type=Path, help="everything that is measured, to go on from")
    parser.add_argument("--drop", type=int, nargs="+", default=[9, 13, 17, 21, 25], help="layers the student lacks")
    parser.add_argument("--sizes", type=int, nargs="+", default=[12, 25, 50], help="K")
    parser.add_argument("--rows", type=int, default=4, help="rows of a block")
    parser.add_argument("--length", type=int, default=257, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=10, help="for all parameters")
    parser.add_argument("--head-blocks", type=int, default=98, help="for the head's weight")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", default=[""], help="stores with one of these in their names")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args(arguments)


def open_blocks(options: argparse.Namespace) -> Blocks:
    """The blocks of a folder; `ValueError` if it was begun with other settings."""
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("drop", "rows", "length", "seed", "column")}
    settings |= {"teacher": Path(options.teacher).name, "text": options.text.name, "head_blocks": options.head_blocks}
    kept = load_json(options.folder / "settings.json") or settings
    if kept != settings:
        raise ValueError(f"{options.folder} was begun with {kept}, not {settings}: take another folder")
    save(options.folder / "settings.json", settings)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    student = drop_layers(teacher, options.drop).eval()
    # Two blocks for the probe come after those that are measured.
    number = (options.head_blocks + 2) * options.rows
    rows = load_rows(options.text, options.column, tokenizer, options.length, number).split(options.rows)
    blocks = Blocks(options.folder, rows, teacher, student, options.seed)
    blocks.stores = make_stores(probed_sizes(blocks, options.sizes))
    blocks.roundings = chosen_roundings(blocks)
    names = [*blocks.roundings, *blocks.stores]
    blocks.names = [name for name in names if any(part in name for part in options.only)]
    return blocks


def probe(blocks: Blocks) -> Tensor:
    """The teacher's hidden states (n, D) of the last two blocks, which nothing is measured on."""
    return torch.cat([blocks[len(blocks.rows) - i]["teacher"] for i in (2, 1)])


@torch.no_grad()
def probed_sizes(blocks: Blocks, wanted: Sequence[int]) -> dict[int, Sizes]:
    """The numbers of the stores at these sizes K, from the last two blocks, or as they were found before."""
    path = blocks.folder / "sizes.json"
    sizes = {int(k): Sizes(*numbers) for k, numbers in load_json(path).items()}
    if missing := [k for k in wanted if k not in sizes]:
        logits = head_of(blocks.teacher).logits(probe(blocks))
        sizes |= {k: sizes_for(logits, k) for k in missing}
        save(path, sizes)
    return {k: sizes[k] for k in wanted}


def chosen_roundings(blocks: Blocks) -> dict[str, tuple[Rounding, Head]]:
    """The roundings of hidden states and their heads, chosen on the probe, or as they were chosen before."""
    head, found = head_of(blocks.teacher), {}
    for dtype in ("float16", "int8"):
        path = blocks.folder / f"rounding-{dtype}.pt"
        if not path.exists():
            save(path, choose_rounding(probe(blocks), head, dtype, vocab_size=len(head.weight), seed=blocks.seed)[0])
        rounding = torch.load(path, weights_only=False)
        found[f"hidden, {dtype}"] = rounding, folded_head(head, rounding)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    blocks = open_blocks(options)
    parameters = options.folder / f"parameters-{options.blocks}.json"
    head = options.folder / f"head-{options.head_blocks}.json"
    hidden = options.folder / f"hidden-{options.blocks}.json"
    if "blocks" in options.parts:
        for index in range(options.head_blocks):
            blocks[index]
    if "parameters" in options.parts:
        measure_hidden(blocks, options.blocks, hidden)
        measure_parameters(blocks, options.blocks, parameters)
    if "head" in options.parts:
        measure_head(blocks, options.head_blocks, head)
    found = load_json(parameters), load_json(head)
    sums = load_json(hidden) | mean_sums(blocks, options.blocks)
    tokens = options.rows * (options.length - 1)
    title = (
        f"{Path(options.teacher).name}, student without layers {', '.join(map(str, options.drop))}; "
        f"blocks of {tokens:,} tokens"
    )
    print_table(f"{title}; {machine('cpu')}", table(tokens, sums, *found), options.markdown)
    if options.picture:
        save_picture(options.picture, tokens, *found, title)


if __name__ == "__main__":
    main()
