"""The operators of one update, and of a rollout: how often they are called, and their shares of the time.

    OMP_NUM_THREADS=1 python -m benchmarks.operators SmolLM2-135M-Instruct --tokenizer gpt2-base --data tinystories \
        --output before.json
    ... the change ...
    OMP_NUM_THREADS=1 python -m benchmarks.operators ... --output after.json --against before.json --markdown

The teacher is the given model. The student has each third of its layers; in the rollout, it is a copy with noise. An
update is the second one of a run of two rows on the CPU, in float32. A share is that of an operator's own time, without
the operators that it calls. The profiler costs time for each call, so many small calls look larger than they are.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.measure import machine, print_table
from benchmarks.rollout import write_together
from benchmarks.stories import load_texts
from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer, drop_layers
from hf_distill.collators import pad_prompts
from hf_distill.speculative import RolloutConfig

Calls = dict[str, tuple[int, float]]  # of each operator, and its share of the time
KD = KDTrainer, KDConfig
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "KD": (*KD, {}),
    "hidden layers": (*KD, {"hidden_weight": 0.5, "hidden_layers": "uniform"}),
    "keys and values": (KVProjectionTrainer, KVProjectionConfig, {}),
    "another tokenizer": (*KD, {"cross_tokenizer": "aligned"}),
}
ROLLOUT = "rollout"


def calls(profiler: profile) -> Calls:
    """All operators of a profile, and their sum under the name "all"."""
    events = [(event.key, event.count, event.self_cpu_time_total) for event in profiler.key_averages()]
    time = sum(time for *_, time in events)
    found = {name.removeprefix("aten::"): (count, own / time) for name, count, own in events}
    return {**found, "all": (sum(count for _, count, _ in events), 1.0)}


class SecondUpdate(TrainerCallback):
    """Profiles the second update of a run."""

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self.profiler.stop()


def update(name: str, options: argparse.Namespace) -> Calls:
    """The operators of an update."""
    trainer_class, config_class, changes = RUNS[name]
    teacher = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student, others = drop_layers(teacher, range(0, teacher.config.num_hidden_layers, 3)), tokenizer
    if "cross_tokenizer" in changes:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
        student.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    lines = (options.data / "test.jsonl").read_text(encoding="utf-8").splitlines()[: 2 * options.rows]
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
            max_steps=2, per_device_train_batch_size=options.rows, max_length=options.length,
            gradient_checkpointing=False, **changes,
        )  # fmt: skip
        watch = SecondUpdate()
        trainer_class(
            student, teacher, args, Dataset.from_dict({"text": [json.loads(line)["text"] for line in lines]}), None,
            tokenizer, teacher_processing_class=others, callbacks=[watch],
        ).train()  # fmt: skip
    return calls(watch.profiler)


@torch.no_grad()
def rollout(options: argparse.Namespace) -> Calls:
    """The operators of a rollout, after one without the profiler."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() * options.noise)
    texts = load_texts(options.data / "test.jsonl", tokenizer)[: 4 * options.rows]
    rows = [{"student_prompt_ids": text[: 8 + i], "teacher_prompt_ids": text[: 8 + i]} for i, text in enumerate(texts)]
    batch = pad_prompts(rows, tokenizer)
    config = RolloutConfig(options.new_tokens, 5, adaptive=True, top_k=25)
    write_together(student.eval(), teacher.eval(), batch, config, tokenizer.eos_token_id)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        stats = write_together(student, teacher, batch, config, tokenizer.eos_token_id)
    print(f"accepted: {int(stats.blocks.accepted.sum()) / int(stats.blocks.drafted.sum()):.0%}")
    return calls(profiler)


def compared(found: Calls, before: Calls, number: int) -> list[dict[str, str]]:
    """Rows of a table: the operators with the largest shares in `found`, and all together."""
    top = sorted(found, key=lambda name: found[name][1], reverse=True)[: number + 1]
    rows = []
    for name in sorted(top, key=lambda name: name == "all"):
        row = {"operator": name}
        for when, side in (("before", before), ("now", found)):
            count, share = side.get(name, (0, 0.0))
            row |= {f"calls {when}": f"{count:,}", f"share {when}": f"{share:.1%}"} if side else {}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of another tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="folder with test.jsonl, a `text` in each line")
    parser.add_argument("--output", required=True, type=Path, help="where the counts go, as JSON")
    parser.add_argument("--against", type=Path, help="counts to compare with")
    parser.add_argument("--only", nargs="+", choices=[*RUNS, ROLLOUT], default=[*RUNS, ROLLOUT], metavar="RUN")
    parser.add_argument("--rows", type=int, default=2, help="rows of a batch; a rollout has four times as many")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that a rollout generates")
    parser.add_argument("--noise", type=float, default=0.1, help="of the rollout's student, relative to its weights")
    parser.add_argument("--top", type=int, default=6, help="operators that are shown")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    disable_progress_bars()
    before = {} if options.against is None else json.loads(options.against.read_text(encoding="utf-8"))
    found = {}
    for name in options.only:
        found[name] = rollout(options) if name == ROLLOUT else update(name, options)
        rows = compared(found[name], before.get(name, {}), options.top)
        print_table(f"{name}; {machine('cpu')}", rows, options.markdown)
        options.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
