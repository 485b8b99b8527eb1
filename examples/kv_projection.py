"""Compare keys and values, by direction, in addition to the logits: five settings side by side.

    python examples/kv_projection.py --student path/or/id --teacher path/or/id --data rows.jsonl --steps 200

Rows have a "text" column; a tenth of them is held out. A high cosine is not success: look at KL and CKA.
"""

import argparse

from datasets import load_dataset

from hf_distill import CosinePhaseCallback, KVProjectionConfig, KVProjectionTrainer
from hf_distill.report import markdown

SETTINGS = {
    "pure direction": {"direction_weight": 1.0, "magnitude_weight": 0.0},
    "weak magnitude": {"direction_weight": 1.0, "magnitude_weight": 0.01},
    "strong magnitude": {"direction_weight": 1.0, "magnitude_weight": 0.1},
    "high capacity": {"projector": "mlp", "projector_mlp_ratio": 2.0},
    "low capacity": {"projector": "mlp", "projector_mlp_ratio": 0.5},
}
COLUMNS = {
    "KL": "kd",
    "cosine": "kv/cosine",
    "centred cosine": "kv/centered_cosine",
    "CKA": "kv/cka",
}


def main(argv: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("steps", 200), ("batch_size", 8), ("max_length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output_dir", default="out/kv_projection")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args(argv)

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    table = []
    for name in options.only:
        args = KVProjectionConfig(
            output_dir=f"{options.output_dir}/{name.replace(' ', '_')}", max_steps=options.steps, logging_steps=10,
            per_device_train_batch_size=options.batch_size, max_length=options.max_length, learning_rate=5e-5,
            use_cpu=options.use_cpu, bf16=not options.use_cpu, save_strategy="no", report_to="none", **SETTINGS[name],
        )  # fmt: skip
        trainer = KVProjectionTrainer(
            options.student, options.teacher, args, rows["train"], rows["test"], callbacks=[CosinePhaseCallback()]
        )
        trainer.train()
        found = trainer.evaluate()
        trainer.save_model()  # the student, with its projector
        table.append({"": name, **{title: f"{found[f'eval_{key}']:.4f}" for title, key in COLUMNS.items()}})
    print(markdown(table), f"measured on {len(rows['test'])} held-out rows", sep="\n")
    return table


if __name__ == "__main__":
    main()
