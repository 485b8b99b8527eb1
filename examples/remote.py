"""Train a student with a teacher that a server of vLLM or SGLang has.

    vllm serve path/or/id --max-logprobs 64
    python examples/remote.py --student path/or/id --teacher http://localhost:8000/v1 --data rows.jsonl

Rows have a "text" column. `docs/remote.md` says what a server can teach. On the command line it is
`hf-distill kd --teacher_model http://localhost:8000/v1`.
"""

import argparse

from datasets import load_dataset

from hf_distill import KDConfig, KDTrainer


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--teacher", nargs="+", required=True, help="addresses; several are copies of one server")
    parser.add_argument("--logprobs", type=int, help="tokens at each position; by default what the server gives, to 64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/remote")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(argv)

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    args = KDConfig(
        output_dir=options.output_dir, kd_weight=0.8, max_length=512, max_steps=options.steps, learning_rate=1e-4,
        teacher_logprobs=options.logprobs, logging_steps=10, use_cpu=options.use_cpu, bf16=not options.use_cpu,
        save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = KDTrainer(options.student, options.teacher, args, rows["train"], rows["test"])
    results = {"before": trainer.evaluate()}
    trainer.train()
    results["after"] = trainer.evaluate()
    trainer.save_model()
    for name, found in results.items():
        print(f"{name}: kd {found['eval_kd']:.4f}, agreement {found['eval_agreement']:.1%}")
    return results


if __name__ == "__main__":
    main()
