"""Rollouts of batches, against rollouts of single rows, `generate` of the student, and assisted generation.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout --teacher stories260K --data tinystories
    OMP_NUM_THREADS=1 python -m benchmarks.rollout --teacher stories260K --data tinystories --noise 0.05 0.1 \
        --rows 8 --total 16 --adaptive

`--teacher` is a causal language model. `--data` is a folder with test.jsonl, a `text` in each line; the prompts are the
beginnings of the texts, with different lengths. The student has some of the teacher's layers. No token ends a text,
so every row gets the same number of new tokens. `generate` is that of transformers, for the student alone. Assisted
generation is the speculative decoding of transformers: one row at a time, with exactly the teacher's distribution.

With `--noise`, the student is the teacher with noise on its weights, of this share of each weight's norm, and the first
of `--rows` counts. Rollouts, with and without a compiled step, and `generate` take turns in one process.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from benchmarks.measure import in_fresh_process, machine, measure, print_table
from benchmarks.stories import load_texts, some_layers
from hf_distill.collators import pad_prompts
from hf_distill.modeling import CachedReader, CompiledReader, CompiledStep, Reader
from hf_distill.speculative import RolloutConfig, RolloutStats, verified_rollout
from hf_distill.verifying import LocalVerifier


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, list[dict[str, Tensor]], int]:
    """Student, teacher, batches of prompts with `options.rows` rows, and a token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).to(options.device).eval()
    student = (some_layers(teacher, options.layers) if options.noise is None else noisy(teacher, options.noise)).eval()
    texts = load_texts(Path(options.data) / "test.jsonl", tokenizer)
    prompts = [text[: 8 + i % 16] for i, text in enumerate(texts[: max(options.total, 1)])]
    rows = [{"student_prompt_ids": ids, "teacher_prompt_ids": ids} for ids in prompts]
    batches = [pad_prompts(rows[i : i + options.rows], tokenizer) for i in range(0, len(rows), options.rows)]
    return student, teacher, batches, tokenizer.eos_token_id


def noisy(model: PreTrainedModel, share: float) -> PreTrainedModel:
    """A copy of the model, each weight plus noise of this share of its norm."""
    generator, result = torch.Generator().manual_seed(0), copy.deepcopy(model)
    with torch.no_grad():
        for weight in result.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += share * weight.norm() / noise.norm() * noise
    return result


def write_together(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: dict[str, Tensor],
    config: RolloutConfig,
    pad: int,
    make_reader: Reader = CachedReader,
) -> RolloutStats:
    """The statistics of a rollout that always reaches `max_new_tokens`."""
    vocab_size = len(student.get_input_embeddings().weight)
    verifier = LocalVerifier(teacher, batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], config, vocab_size)
    return verified_rollout(
        student, verifier, batch["student_prompt_ids"], batch["student_prompt_mask"], config,
        eos_token_id=vocab_size, pad_token_id=pad,  # a token that is never generated ends a text
        generator=torch.Generator().manual_seed(0), vocab_size=vocab_size, make_reader=make_reader,
    ).stats  # fmt: skip


def write_alone(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    new_tokens: int,
    pad: int,
    assistant: PreTrainedModel | None = None,
) -> None:
    """Generates this many tokens per row with `generate` of transformers."""
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=True, pad_token_id=pad)
    inputs = {"input_ids": batch["student_prompt_ids"], "attention_mask": batch["student_prompt_mask"].long()}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    model.generate(**inputs, generation_config=config, assistant_model=assistant)


def run(what: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second, and the statistics of the blocks of rollouts."""
    student, teacher, batches, pad = load(options)
    config = RolloutConfig(options.max_new_tokens, options.draft_length, adaptive=options.adaptive, top_k=options.top_k)
    stats: list[RolloutStats] = []

    def write(batch: dict[str, Tensor]) -> None:
        if what == "rollout":
            stats.append(write_together(student, teacher, batch, config, pad))
        else:
            model, assistant = (student, None) if what == "generate" else (teacher, student)
            write_alone(model, batch, options.max_new_tokens, pad, assistant)

    measurement = measure(write, batches, reset=stats.copy, device=options.device)
    num_rows = sum(len(batch["student_prompt_ids"]) for batch in batches)
    found = {"speed": num_rows * options.max_new_tokens / sum(measurement.times), "memory": measurement.memory}
    if stats:
        stats = stats[1:]  # the first was a warm-up
        accepted, drafted = (sum(int(getattr(s.blocks, name).sum()) for s in stats) for name in ("accepted", "drafted"))
        found["accepted"] = accepted / drafted
        # Per row, because one forward serves all rows of a batch.
        found["forwards"] = 100 * sum(len(s.blocks.row) for s in stats) / (num_rows * options.max_new_tokens)
        found["batch_forwards"] = 100 * sum(s.teacher_forwards for s in stats) / (num_rows * options.max_new_tokens)
    return found


def in_turns(options: argparse.Namespace) -> dict[str, float]:
    """Of a student near its teacher: seconds of both kinds of rollouts, each over those of `generate`, and forwards."""
    student, teacher, batches, pad = load(options)
    config = RolloutConfig(options.max_new_tokens, options.draft_length, adaptive=options.adaptive, top_k=options.top_k)
    longest = max(batch["student_prompt_ids"].shape[1] for batch in batches)
    step = CompiledStep(student, options.rows, options.max_new_tokens, longest)
    readers: dict[str, Reader] = {"plain": CachedReader, "compiled": partial(CompiledReader, step=step)}
    writers: dict[str, Callable] = {
        "generate": lambda batch: write_alone(student, batch, options.max_new_tokens, pad),
        **{
            name: partial(write_together, student, teacher, config=config, pad=pad, make_reader=reader)
            for name, reader in readers.items()
        },
    }
    ratios: dict[str, list[float]] = {name: [] for name in readers}
    stats: list[RolloutStats] = []
    for i in range(options.rounds + 1):
        for batch in batches:
            seconds, found = {}, {}
            for name, write in writers.items():
                start = time.process_time()
                found[name] = write(batch=batch)
                seconds[name] = time.process_time() - start
            if i > 0:  # the first is a warm-up, and compiles
                stats.append(found["plain"])
                for name, each in ratios.items():
                    each.append(seconds[name] / seconds["generate"])
    accepted, drafted = (sum(int(getattr(s.blocks, name).sum()) for s in stats) for name in ("accepted", "drafted"))
    forwards = sum(s.student_forwards + s.teacher_forwards for s in stats)
    return {
        **{name: statistics.median(each) for name, each in ratios.items()},
        "accepted": accepted / drafted,
        "forwards": forwards / len(stats) / options.max_new_tokens,
    }


def print_near(options: argparse.Namespace) -> None:
    """The table of students near their teacher."""
    shares, rows = options.noise, []
    options.rows = options.rows[0]
    for options.noise in shares:
        found = in_fresh_process(in_turns, options)
        rows.append(
            {
                "noise": f"{options.noise:g}",
                "drafts accepted": f"{found['accepted']:.0%}",
                "forwards of both sides / of `generate`": f"{found['forwards']:.2f}x",
                "rollout / `generate`": f"{found['plain']:.2f}x",
                "with a compiled step": f"{found['compiled']:.2f}x",
            }
        )
    print_table(f"CPU seconds; {options.rows} rows, {described(options)}", rows, options.markdown)


def described(options: argparse.Namespace) -> str:
    return (
        f"{options.total} rows of {options.max_new_tokens} tokens, draft {options.draft_length}"
        f"{' adaptive' if options.adaptive else ''}, top_k {options.top_k}; {machine(options.device)}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="hub id or path")
    parser.add_argument("--data", required=True, help="folder with test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's layers in the student")
    parser.add_argument("--noise", type=float, nargs="+", help="students are noisy teachers, instead of --layers")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each batch, with --noise")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16], help="rows that are generated at a time")
    parser.add_argument("--total", type=int, default=16, help="rows that every variant writes")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--adaptive", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.noise is not None:
        return print_near(options)
    sizes, rows = options.rows, []
    for options.rows in sizes:
        found = {what: in_fresh_process(run, what, options) for what in ("rollout", "generate")}
        if options.rows == sizes[0]:
            first = found["rollout"]["speed"]
        ours = found["rollout"]
        rows.append(
            {
                "rows": options.rows,
                "rollout, tokens/s": f"{ours['speed']:,.0f}",
                f"against {sizes[0]}": f"{ours['speed'] / first:.1f}x",
                "student's generate": f"{found['generate']['speed']:,.0f}",
                "against it": f"{ours['speed'] / found['generate']['speed']:.2f}x",
                "drafts accepted": f"{ours['accepted']:.0%}",
                "teacher forwards per 100 tokens": f"{ours['batch_forwards']:.1f}",
            }
        )
    options.rows = 1
    assisted = in_fresh_process(run, "assisted", options)["speed"]
    print_table(described(options), rows, options.markdown)
    print(f"assisted generation, 1 row: {assisted:,.0f} tokens/s; rollout, 1 row: {first / assisted:.2f}x of it")


if __name__ == "__main__":
    main()
