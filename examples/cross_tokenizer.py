"""Distil from a teacher with another tokenizer, such as Mistral-7B for Phi-2, and print the alignment of a text.

    python examples/cross_tokenizer.py --student microsoft/phi-2 --teacher mistralai/Mistral-7B-v0.1 --data rows.jsonl

Rows have a "text" column. KDTrainer detects that the vocabularies differ.
"""

import argparse

from datasets import load_dataset
from transformers import AutoTokenizer

from hf_distill import KDConfig, KDTrainer
from hf_distill.token_alignment import align, vocabulary_pieces


def show_alignment(student: str, teacher: str, text: str) -> None:
    """Prints the groups of tokens that cover the same part of a text."""
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (student, teacher)]
    sides = []
    for tokenizer in tokenizers:
        pieces = vocabulary_pieces(tokenizer)
        sides.append([pieces[i] for i in tokenizer(text)["input_ids"]])
    for group in align(*sides):
        words = [[side[i] for i in tokens] for side, tokens in zip(sides, (group.student, group.teacher), strict=True)]
        print(f"{words[0]!s:40} {words[1]!s:40} {'' if group.comparable else '(not compared)'}")


def main(argv: list[str] | None = None) -> KDTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--method", default="auto", choices=["auto", "aligned", "uld"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output_dir", default="out/cross_tokenizer")
    parser.add_argument("--use_cpu", action="store_true")
    options = parser.parse_args(argv)

    rows = load_dataset("json", data_files=options.data, split="train").train_test_split(0.1, seed=0)
    show_alignment(options.student, options.teacher, rows["test"][0]["text"][:80])
    args = KDConfig(
        output_dir=options.output_dir, max_steps=options.steps, max_length=512, learning_rate=1e-4, logging_steps=10,
        cross_tokenizer=options.method, use_cpu=options.use_cpu, bf16=not options.use_cpu, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    trainer = KDTrainer(options.student, options.teacher, args, rows["train"], rows["test"])
    trainer.train()
    found = trainer.evaluate()
    print(f"held out: {found['eval_kd']:.4f} from the teacher, {found['eval_ce']:.4f} nats per token of the student's")
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
