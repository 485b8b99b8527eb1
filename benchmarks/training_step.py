"""A training step on long prompts with short answers: KDTrainer, TRL's GKDTrainer, and a lower limit.

    python -m benchmarks.training_step --data squad/train.jsonl --tokenizer Qwen1.5-1.8B

`--data` has one JSON object per line with `context`, `question` and `answers`. `--tokenizer` is a folder or hub id.
Student and teacher are random Qwen2 models of 4 layers (their cost does not depend on their weights). All variants get
the same token ids in the same batches, and each runs in a separate process. A step is `trainer.training_step` on a
ready batch: teacher, student, loss and backward, without the optimizer's step. Padding is not counted as tokens. The
gradients of a step count as its memory. GKDTrainer needs about 11 GB with the defaults.

The limit is the sum of two separate measurements: our own step without a teacher (hard labels alone), and the teacher's
backbone and head on the label-bearing tokens. Ratios are ours / this row.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from benchmarks.measure import Measurement, NotMeasured, columns, in_fresh_process, machine, measure, print_table
from hf_distill import KDConfig, KDTrainer
from hf_distill.modeling import label_positions

BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}


class Result(NamedTuple):
    measurement: Measurement
    counts: dict[str, int]  # of all batches


class HardLabels(torch.autograd.Function):
    """The cross-entropy with gradients computed in the forward, as in our fused loss. Autograd needs more memory."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, num_items):
        log_probs = (hidden @ weight.t()).log_softmax(-1)  # (N, V)
        loss = F.nll_loss(log_probs, labels, reduction="sum") / num_items
        gradient = log_probs.exp_().div_(num_items)
        gradient[torch.arange(len(labels)), labels] -= 1 / num_items
        ctx.gradients = gradient @ weight, gradient.t() @ hidden
        return loss

    @staticmethod
    def backward(ctx, _):
        gradients, ctx.gradients = ctx.gradients, None
        return *gradients, None, None


class HardLabelsTrainer(KDTrainer):
    """KDTrainer without its teacher: the same step with the cross-entropy of label-bearing tokens alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = lambda inputs, positions: None

    def distillation_terms(self, hidden, head, signal, labels, num_items):
        loss = HardLabels.apply(hidden, head.weight, labels, num_items)
        return {
            "loss": loss,
            **dict.fromkeys(("kd", "ce", "agreement", "student_entropy", "num_paired"), loss.detach()),
        }


def load_rows(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Enough rows for the measured batches, tokenised as in SFTTrainer."""
    rows = []
    with open(options.data, encoding="utf-8") as file:
        for line in islice(file, options.batch_size * options.steps):
            row = json.loads(line)
            prompt = f"{row['context']}\n{row['question']}\n"
            prompt_ids = tokenizer(prompt)["input_ids"]
            completion_ids = tokenizer(row["answers"][0] + tokenizer.eos_token)["input_ids"]
            mask = [0] * len(prompt_ids) + [1] * len(completion_ids)
            rows.append({"prompt": prompt, "input_ids": prompt_ids + completion_ids, "completion_mask": mask})
    return rows


def make_model(width: int, vocab: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
        num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128), tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def make_trainer(variant: str, output_dir: str, options: argparse.Namespace) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    dataset = Dataset.from_list(load_rows(tokenizer, options))
    torch.manual_seed(0)
    student, teacher = (make_model(width, options.vocab) for width in (options.student_width, options.teacher_width))
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": options.batch_size,
        "max_length": options.max_length,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not options.device.startswith("cuda"),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    models = {"train_dataset": dataset, "processing_class": tokenizer}
    if variant == "gkd":
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or TRL warns that this trainer is experimental
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        args = GKDConfig(lmbda=0.0, beta=BETAS[options.divergence], **settings)
        return GKDTrainer(model=student, teacher_model=teacher, args=args, **models)
    models["train_dataset"] = dataset.remove_columns("prompt")
    models["teacher_processing_class"] = tokenizer
    args = KDConfig(divergence=options.divergence, completion_only_loss=True, **settings)
    return {"ours": KDTrainer, "student": HardLabelsTrainer}[variant](student, teacher, args, **models)


def run(variant: str, options: argparse.Namespace) -> Result:
    """Measures one variant in this process."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("ours" if variant == "teacher" else variant, folder, options)
        take_batch = partial(trainer.get_batch_samples, iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        batches = [(batch, num_items) for (batch,), num_items in (take_batch() for _ in range(options.steps))]

        def step(batch: tuple[dict[str, Any], Any]) -> None:
            trainer.training_step(trainer.model, dict(batch[0]), batch[1])

        def ask_teacher(batch: tuple[dict[str, Any], Any]) -> None:
            inputs = {name: batch[0][name] for name in ("input_ids", "attention_mask")}
            signal = trainer.teacher(inputs, label_positions(batch[0]["labels"])[0])
            signal.head.logits(signal.hidden)

        chosen = ask_teacher if variant == "teacher" else step
        measurement = measure(chosen, batches, reset=trainer.model.zero_grad, device=options.device)
    counts = {
        "tokens": sum(int(batch["attention_mask"].sum()) for batch, _ in batches),
        "with padding": sum(batch["input_ids"].numel() for batch, _ in batches),
        "label-bearing": sum(int((batch["labels"][:, 1:] != -100).sum()) for batch, _ in batches),
    }
    return Result(measurement, counts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSON lines with context, question and answers")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the embeddings and the heads")
    parser.add_argument("--student-width", type=int, default=256)
    parser.add_argument("--teacher-width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="batches, one step each, after a warm-up on the first")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--divergence", choices=BETAS, default="jensen_shannon", help="default: GKDTrainer's own")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


TITLES = {
    "ours": "KDTrainer",
    "gkd": "TRL GKDTrainer",
    "student": "without a teacher",
    "teacher": "the teacher alone",
}


def main() -> None:
    options = parse_arguments()
    results, reasons = {}, {}
    for variant in options.only:
        try:
            results[variant] = in_fresh_process(run, variant, options)
        except NotMeasured as error:
            reasons[TITLES[variant]] = str(error)
    counts = next(iter(results.values())).counts
    assert all(result.counts == counts for result in results.values()), "the variants saw different rows"
    found = {TITLES[variant]: result.measurement for variant, result in results.items()}
    if {"student", "teacher"} <= results.keys():
        pairs = zip(found[TITLES["student"]].times, found[TITLES["teacher"]].times, strict=True)
        found["limit: these two"] = Measurement([sum(pair) for pair in pairs], 0)
    rows = [{"step": name, "tokens/s": "", "time": "not measured"} for name in reasons]
    for title, measurement in found.items():
        row = columns(measurement, found.get(TITLES["ours"]))
        if not measurement.memory:
            row["extra memory"] = row["memory ratio"] = ""
        rows.append({"step": title, "tokens/s": f"{counts['tokens'] / sum(measurement.times):,.0f}", **row})
    described = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    shapes = f"V={options.vocab:,}, trunks 4 x {options.student_width} and 4 x {options.teacher_width}"
    title = f"{options.steps} steps of {options.batch_size} rows ({described}), {shapes}, {options.divergence}, float32"
    print_table(f"{title}; {machine(options.device)}", rows, options.markdown, reasons)


if __name__ == "__main__":
    main()
