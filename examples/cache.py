"""Write a teacher's outputs once, then train two students from them without the teacher.

    python examples/cache.py --student path/or/id --teacher path/or/id --data rows.jsonl

Rows have a "text" column. Hidden states serve every divergence; `docs/cache.md` says which store fits what. On the
command line it is `hf-distill cache write`, then `hf-distill kd --teacher_model cache:folder`.
"""

import argparse

from datasets import load_dataset

from hf_distill import KDConfig, KDTrainer, evaluate_fidelity
from hf_distill.report import markdown, measured_on, result_rows
from hf_distill.teachers.writing import Method


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--store", default="out/store", help="folder of the teacher's outputs; new, or one to add to")
    parser.add_argument("--dtype", default="int8", choices=["float16", "int8"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/cache")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(argv)

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)

    def trainer_of(teacher: str, divergence: str) -> KDTrainer:
        args = KDConfig(
            output_dir=f"{options.output_dir}/{divergence}", divergence=divergence, kd_weight=1.0, max_length=512,
            max_steps=options.steps, learning_rate=1e-4, logging_steps=10, use_cpu=options.use_cpu,
            bf16=not options.use_cpu, save_strategy="no", report_to="none",
        )  # fmt: skip
        return KDTrainer(options.student, teacher, args, rows["train"], rows["test"])

    # The settings of the training decide which tokens the teacher reads. Held-out rows are written as well.
    written = trainer_of(options.teacher, "forward_kl").write_cache(options.store, Method(dtype=options.dtype))
    counts, kl = written.counts, written.fidelity["kl"]
    print(f"{written.kind}: {counts['bytes'] / counts['positions']:.0f} bytes a token, {kl:.1e} nats from the teacher")

    results = {}
    for divergence in ("forward_kl", "reverse_kl"):
        trainer = trainer_of(f"cache:{options.store}", divergence)

        def measure(trainer: KDTrainer = trainer) -> dict[str, float]:
            return evaluate_fidelity(trainer.model, trainer.teacher, trainer.eval_dataset, trainer.processing_class)

        results.setdefault("before", measure())
        trainer.train()
        results[divergence] = measure()
        trainer.save_model()
    print(markdown(result_rows(results)), f"measured on {measured_on(results)}", sep="\n")
    return results


if __name__ == "__main__":
    main()
