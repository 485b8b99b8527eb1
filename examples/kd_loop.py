"""Distillation as a plain loop: the computation of KDTrainer, without a trainer.

    python examples/kd_loop.py --student path/or/id --teacher path/or/id --data rows.jsonl

Rows have a "text" column. KDTrainer adds chunked logits, accumulation, PEFT, checkpoints and several processes.
"""

import argparse

import torch
import torch.nn.functional as F
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def distillation_loss(student, teacher, input_ids, attention_mask, kd_weight, temperature):
    """kd_weight * T^2 * KL(teacher || student) at T + (1 - kd_weight) * CE, a mean over predicted tokens."""
    student_logits = student(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]  # (B, T-1, V)
    with torch.no_grad():
        teacher_logits = teacher(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    counts = attention_mask[:, 1:].bool()  # the predicted token must not be padding
    student_logits, teacher_logits, labels = student_logits[counts], teacher_logits[counts], input_ids[:, 1:][counts]

    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)  # (N, V)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
    kl = F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="sum") / len(labels)
    return kd_weight * temperature**2 * kl + (1 - kd_weight) * F.cross_entropy(student_logits, labels)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("kd_weight", 0.5), ("temperature", 1.0), ("learning_rate", 2e-5)):
        parser.add_argument(f"--{name}", type=float, default=default)
    for name, default in (("steps", 100), ("batch_size", 8), ("max_length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)

    rows = load_dataset("json", data_files=options.data, split="train")
    if "text" not in rows.column_names:
        parser.error(f'{options.data} has the columns {", ".join(rows.column_names)}; it needs "text"')

    torch.manual_seed(42)
    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32).train()
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval()
    texts = [text + tokenizer.eos_token for text in rows["text"]]
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)

    losses = []
    for step in range(options.steps):
        start = step * options.batch_size % len(texts)
        batch = tokenizer(
            texts[start : start + options.batch_size], padding=True, truncation=True, max_length=options.max_length,
            padding_side="right", return_tensors="pt",
        )  # fmt: skip
        loss = distillation_loss(
            student, teacher, batch["input_ids"], batch["attention_mask"], options.kd_weight, options.temperature
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: {losses[-1]:.4f} nats per token")
    return losses


if __name__ == "__main__":
    main()
