"""Rollouts of batches, against rollouts of single rows, `generate` of the student, and assisted generation.

    OMP_NUM_THREADS=1 python -m benchmarks.rollout --teacher stories260K --data tinystories

`--teacher` is a causal language model. `--data` is a folder with test.jsonl, a `text` in each line; the prompts are the
beginnings of the texts, with different lengths. The student has some of the teacher's layers. No token ends a text,
so every row gets the same number of new tokens. `generate` is that of transformers, for the student alone. Assisted
generation is the speculative decoding of transformers: one row at a time, with exactly the teacher's distribution.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from benchmarks.measure import in_fresh_process, machine, measure, print_table
from benchmarks.stories import load_texts, some_layers
from hf_distill.collators import pad_prompts
from hf_distill.speculative import RolloutConfig, RolloutStats, rollout


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, list[dict[str, Tensor]], int]:
    """Student, teacher, batches of prompts with `options.rows` rows, and a token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).to(options.device).eval()
    student = some_layers(teacher, options.layers).eval()
    texts = load_texts(Path(options.data) / "test.jsonl", tokenizer)
    prompts = [text[: 8 + i % 16] for i, text in enumerate(texts[: max(options.total, 1)])]
    rows = [{"student_prompt_ids": ids, "teacher_prompt_ids": ids} for ids in prompts]
    batches = [pad_prompts(rows[i : i + options.rows], tokenizer) for i in range(0, len(rows), options.rows)]
    return student, teacher, batches, tokenizer.eos_token_id


def write_together(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], config: RolloutConfig, pad: int
) -> RolloutStats:
    """The statistics of a rollout that always reaches `max_new_tokens`."""
    never = len(student.get_input_embeddings().weight)  # a token that is never generated
    generator = torch.Generator().manual_seed(0)
    result = rollout(
        student, teacher, **batch, config=config, eos_token_id=never, pad_token_id=pad, generator=generator
    )
    return result.stats


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="hub id or path")
    parser.add_argument("--data", required=True, help="folder with test.jsonl")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's layers in the student")
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
    title = (
        f"{options.total} rows of {options.max_new_tokens} tokens, draft {options.draft_length}"
        f"{' adaptive' if options.adaptive else ''}, top_k {options.top_k}; {machine(options.device)}"
    )
    print_table(title, rows, options.markdown)
    print(f"assisted generation, 1 row: {assisted:,.0f} tokens/s; rollout, 1 row: {first / assisted:.2f}x of it")


if __name__ == "__main__":
    main()
