"""Forgetting of a second task by a student while it learns the fact book of `examples/lupi.py`, with and without a mix.

    OMP_NUM_THREADS=1 python -m benchmarks.forgetting --seeds 0 1 2

The student begins as a copy of the teacher: it can read a fact that stands in its own prompt. That is the second task,
measured on facts that no training has seen. The first student learns the fact book alone, the second one the book mixed
with general rows, which have a fact in the student's own prompt and no knowledge for the teacher alone.
"""

import argparse
import copy
import random
import tempfile
from statistics import mean

import transformers
from datasets import Dataset

from examples.lupi import NAMES, accuracy, make_fact, make_models, teach_to_read
from hf_distill import LUPICollator, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.cli.mixing import Source, mixed
from hf_distill.report import markdown

NUM_FACTS, NUM_GENERAL = 48, 2000


def read_in_prompt(facts, template):
    """Rows whose student reads the fact, too: it is a part of the query."""
    texts = [template.format(knowledge=fact["knowledge"], query=fact["query"]) for fact in facts]
    return [{"query": text, "knowledge": "", "answer": fact["answer"]} for text, fact in zip(texts, facts, strict=True)]


def run(seed, share, steps, teacher_steps=400):
    """Accuracies by task and model for one seed; `share` is that of the general rows in the mix."""
    transformers.set_seed(seed)
    tokenizer, teacher, _ = make_models()
    collator = LUPICollator(tokenizer, query_column="query", knowledge_column="knowledge", allow_missing_knowledge=True)
    places = random.sample(NAMES, len(NAMES))
    book = [make_fact(place) for place in places[:NUM_FACTS]]
    others = places[NUM_FACTS:]
    rest, unseen = others[: len(others) // 2], others[len(others) // 2 :]
    general = read_in_prompt([make_fact(random.choice(rest)) for _ in range(NUM_GENERAL)], collator.knowledge_template)
    tasks = {
        "fact book": [{**fact, "knowledge": ""} for fact in book],
        "reading": read_in_prompt([make_fact(random.choice(unseen)) for _ in range(200)], collator.knowledge_template),
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "seed": seed, "learning_rate": 2e-3, "logging_steps": 50}
        settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        teach_to_read(teacher, tokenizer, rest, **settings, max_steps=teacher_steps)
        students = {"before": copy.deepcopy(teacher)}
        alone = Dataset.from_list(book)
        mix = mixed({Source("book", 1 - share): alone, Source("general", share): Dataset.from_list(general)}, seed)
        for name, rows in {"fact book alone": alone, f"with {share:.0%} general rows": mix}.items():
            args = SpeculativeKDConfig(
                max_new_tokens=6, adaptive=True, top_k=5, student_temperature=0.7, teacher_temperature=0.7,
                per_device_train_batch_size=16, max_steps=steps, gradient_checkpointing=False, **settings,
            )  # fmt: skip
            students[name] = copy.deepcopy(students["before"])  # a teacher is frozen
            trainer = SpeculativeKDTrainer(
                students[name], teacher, args, rows, None, tokenizer, data_collator=collator,
                teacher_processing_class=tokenizer,
            )  # fmt: skip
            trainer.train()
    return {
        name: {task: accuracy(student, collator, rows) for task, rows in tasks.items()}
        for name, student in students.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    found = []
    for seed in options.seeds:
        found.append(run(seed, options.share, options.steps))
        print(seed, found[-1], flush=True)
    rows = [
        {
            "student": name,
            **{task: f"{mean(each[name][task] for each in found):.0%}" for task in found[0][name]},
            "reading by seed": ", ".join(f"{each[name]['reading']:.0%}" for each in found),
        }
        for name in found[0]
    ]
    print(markdown(rows))


if __name__ == "__main__":
    main()
