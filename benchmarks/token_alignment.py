"""Alignment of every pair of tokenizers on real texts: correctness, share of one-to-one tokens, speed.

    python -m benchmarks.token_alignment --tokenizers gpt2 llama-2 --data stories.jsonl math.jsonl

`--tokenizers` are hub ids or paths. `--data` are files of rows, with a JSON object in each line or one list of objects.
A text consists of all strings of a row. Every group is checked: both sides cover the same bytes (except for white
space, if the group is not compared), and every token is in exactly one group. The last column aligns all texts as one
text, and half of them. The two speeds are equal if the time is linear.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.measure import machine, print_table
from hf_distill.token_alignment import UNNAMED, Group, Piece, align, exact_fraction, shared_tokens, vocabulary_pieces

Sides = tuple[Sequence[Piece], Sequence[Piece]]  # a text, as the student's and as the teacher's tokens


def load_texts(path: Path, limit: int) -> list[str]:
    content = path.read_text(encoding="utf-8")
    rows = json.loads(content) if content.startswith("[") else map(json.loads, content.splitlines())
    return ["\n".join(strings(row)) for row in itertools.islice(rows, limit)]


def strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def joined(texts: Sequence[Sides]) -> Sides:
    """Texts in two tokenisations as one."""
    student, teacher = zip(*texts, strict=True)
    return list(itertools.chain.from_iterable(student)), list(itertools.chain.from_iterable(teacher))


def covered(pieces: Sequence[Piece], tokens: range) -> bytes:
    return b"".join(piece for piece in pieces[tokens.start : tokens.stop] if isinstance(piece, bytes))


def check(groups: Sequence[Group], student: Sequence[Piece], teacher: Sequence[Piece]) -> int:
    """The number of wrong groups: different texts on the two sides, or tokens missing, repeated or out of order."""
    wrong = sum(
        list(itertools.chain.from_iterable(ranges)) != list(range(len(tokens)))
        for ranges, tokens in zip(zip(*(group[:2] for group in groups), strict=True), (student, teacher), strict=True)
    )
    for group in groups:
        texts = covered(student, group.student), covered(teacher, group.teacher)
        if group.comparable:
            wrong += texts[0] != texts[1]
        elif group.student and group.teacher:
            wrong += len({text.lower().translate(None, b" \t\n\r\x0b\x0c") for text in texts}) > 1
    return wrong


def measure(texts: Sequence[Sides]) -> dict[str, float]:
    """Counts over texts in two tokenisations, and aligned tokens of both per CPU second (the median of three)."""
    times, groups = [], []
    for _ in range(3):
        start = time.process_time()
        groups = [align(student, teacher) for student, teacher in texts]
        times.append(time.process_time() - start)
    all_groups = [group for found in groups for group in found]
    compared = [group for group in all_groups if group.comparable]
    lengths = [len(student) for student, _ in texts]
    return {
        "wrong": sum(check(found, *sides) for found, sides in zip(groups, texts, strict=True)),
        "exact": sum(exact_fraction(found) * n for found, n in zip(groups, lengths, strict=True)) / sum(lengths),
        "compared": sum(len(group.student) for group in compared) / sum(lengths),
        "student": statistics.mean(len(group.student) for group in compared),
        "teacher": statistics.mean(len(group.teacher) for group in compared),
        "longest": max(max(len(group.student), len(group.teacher)) for group in compared),
        "speed": sum(len(side) for sides in texts for side in sides) / statistics.median(times),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="hub ids or paths")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="JSON or JSON lines")
    parser.add_argument("--limit", type=int, default=1000, help="rows of each file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    tokenizers = {Path(path).name: AutoTokenizer.from_pretrained(path) for path in options.tokenizers}
    vocabularies = {name: vocabulary_pieces(tokenizer) for name, tokenizer in tokenizers.items()}
    pairs = list(itertools.permutations(tokenizers, 2))
    rows = []
    for student, teacher in pairs:
        shared = shared_tokens(vocabularies[student], vocabularies[teacher])
        unnamed = [int((names == UNNAMED).sum()) for names in (shared.student_names, shared.teacher_names)]
        rows.append(
            {
                "student": student,
                "teacher": teacher,
                "tokens of both": f"{len(shared.student_ids):,}",
                "of the student's": f"{len(shared.student_ids) / len(shared.student_names):.0%}",
                "of the teacher's": f"{len(shared.teacher_ids) / len(shared.teacher_names):.0%}",
                "without a name": f"{unnamed[0]:,} / {unnamed[1]:,}",
            }
        )
    print_table("Vocabularies", rows, options.markdown)
    for path in options.data:
        texts = load_texts(path, options.limit)
        pieces = {
            name: [[vocabularies[name][i] for i in ids] for ids in tokenizer(texts)["input_ids"]]
            for name, tokenizer in tokenizers.items()
        }
        rows = []
        for student, teacher in pairs:
            sides = list(zip(pieces[student], pieces[teacher], strict=True))
            found = measure(sides)
            half, whole = (measure([joined(part)])["speed"] for part in (sides[: len(sides) // 2], sides))
            rows.append(
                {
                    "student": student,
                    "teacher": teacher,
                    "wrong groups": found["wrong"],
                    "one to one": f"{found['exact']:.1%}",
                    "compared": f"{found['compared']:.2%}",
                    "tokens a group": f"{found['student']:.2f} : {found['teacher']:.2f}",
                    "longest": found["longest"],
                    "1,000 tokens/s": f"{found['speed'] / 1000:,.0f}",
                    "whole / half as one text": f"{whole / 1000:,.0f} / {half / 1000:,.0f}",
                }
            )
        size = sum(len(text.encode()) for text in texts)
        name = f"{path.parent.name}/{path.name}"
        print_table(f"{name}: {len(texts):,} texts, {size / 1e6:.2f} MB; {machine('cpu')}", rows, options.markdown)


if __name__ == "__main__":
    main()
