"""DistilBERT's recipe for causal language models: every second layer, soft and hard labels, hidden states.

    python examples/layerwise.py --teacher path/or/id --data rows.jsonl

The student starts as every second layer of the teacher. It learns the teacher's distributions at temperature 2, the
hard labels, and the directions of the teacher's hidden states (Sanh et al., 1910.01108, section 3: weights 5, 2 and 1).
Rows have a "text" column.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import KDConfig, KDTrainer, drop_layers, evaluate_fidelity


def main(argv: list[str] | None = None) -> KDTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--hidden_weight", type=float, default=1 / 7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/layerwise")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher)
    student = drop_layers(teacher, list(range(1, teacher.config.num_hidden_layers, 2)))
    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    args = KDConfig(
        output_dir=options.output_dir, max_steps=options.steps, max_length=512, learning_rate=5e-4, logging_steps=10,
        kd_weight=5 / 7, temperature=2.0, hidden_weight=options.hidden_weight, hidden_loss="cosine",
        use_cpu=options.use_cpu, bf16=not options.use_cpu, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = KDTrainer(student, options.teacher, args, rows["train"], rows["test"], tokenizer)
    trainer.train()
    found = evaluate_fidelity(trainer.model, teacher, trainer.eval_dataset, tokenizer)
    print(
        f"perplexity {found['student_perplexity']:.3f}, KL {found['kl']:.4f}, teacher {found['teacher_perplexity']:.3f}"
    )
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
