"""Distil from several teachers: their mixture, a sum of divergences, or one teacher per row.

    python examples/multi_teacher.py --student path/or/id --teachers big=path/or/id maths=path/or/id --data rows.jsonl

Rows have a "text" column. With `--combination route` they also have a column "teacher" that names one of the teachers.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig

from hf_distill import KDConfig, KDTrainer


def main(argv: list[str] | None = None) -> KDTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teachers", required=True, nargs="+", metavar="NAME=MODEL", help="model may be 'base'")
    parser.add_argument("--weights", type=float, nargs="+", help="one weight per teacher; equal by default")
    parser.add_argument("--combination", default="mixture", choices=["mixture", "sum", "route"])
    parser.add_argument("--quantization", choices=["4bit", "8bit"], help="quantisation of the teachers")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/multi_teacher")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(argv)
    if unnamed := [teacher for teacher in options.teachers if "=" not in teacher]:
        parser.error(f"--teachers have the form NAME=MODEL, got {unnamed[0]}")

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    args = KDConfig(
        output_dir=options.output_dir, max_steps=options.steps, max_length=512, learning_rate=1e-4, logging_steps=10,
        teacher_combination=options.combination, teacher_weights=options.weights,
        teacher_quantization=options.quantization, use_cpu=options.use_cpu, bf16=not options.use_cpu,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = KDTrainer(
        options.student,
        dict(teacher.split("=", 1) for teacher in options.teachers),
        args,
        rows["train"],
        rows["test"],
        peft_config=LoraConfig(target_modules="all-linear") if options.lora else None,
    )
    before = trainer.evaluate()["eval_kd"]
    trainer.train()
    print(f"{trainer.teacher.name}: {before:.4f} -> {trainer.evaluate()['eval_kd']:.4f} nats per token")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
