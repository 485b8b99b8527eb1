"""A made task for models that see: colours, numbers, kinds and places of shapes, hard labels against distillation.

    OMP_NUM_THREADS=1 python -m benchmarks.vision --seeds 3

Pictures of 32 x 32 show one to three shapes of one colour and one kind in one half. A teacher of three layers is
trained here, on pictures that are drawn anew for each batch. The student has a language part of its own, smaller and
random, and the teacher's tower, which stays frozen. All arms see the same few rows, in the same order, for the same
number of updates; of two of them, 30 % of the answers are those of other rows. An answer is right if all of its tokens
are the likeliest ones.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as Pictures
from PIL import ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from benchmarks.measure import print_table
from hf_distill import KDConfig, KDTrainer

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (230, 200, 40)}
NUMBERS, KINDS, PLACES = ("one", "two", "three"), ("square", "circle", "triangle"), ("left", "right", "top", "bottom")
QUESTIONS = {"which colour ?": "colour", "how many ?": "number", "what is it ?": "kind", "where ?": "place"}
WORDS = " ".join([*COLOURS, *NUMBERS, *KINDS, *PLACES, *QUESTIONS, "at the shapes it is there are they a s"]).split()
SPECIAL = ("<pad>", "<eos>", "<|user|>", "<|assistant|>", "<image>", "<end_of_utterance>", "<unk>")
SPECIAL = (*SPECIAL, "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# Students: their weight of the divergence, None for one that is not trained, and the share of wrong answers.
ARMS: list[tuple[str, float | None, float]] = [
    ("untrained", None, 0.0),
    ("hard labels", 0.0, 0.0),
    ("distilled", 1.0, 0.0),
    ("hard labels, 30 % of the answers wrong", 0.0, 0.3),
    ("distilled, the same rows", 1.0, 0.3),
]
CELLS = [(2, 2), (12, 2), (22, 2), (2, 12), (22, 12), (2, 22), (12, 22), (22, 22)]  # of 8 x 8; the middle stays empty
HALVES = {"left": [0, 3, 5], "right": [2, 4, 7], "top": [0, 1, 2], "bottom": [5, 6, 7]}


def draw(generator: np.random.Generator) -> tuple[Pictures.Image, dict[str, str]]:
    """A picture, and what is on it."""
    facts = {
        "colour": str(generator.choice(list(COLOURS))), "number": str(generator.choice(NUMBERS)),
        "kind": str(generator.choice(KINDS)), "place": str(generator.choice(PLACES)),
    }  # fmt: skip
    count = NUMBERS.index(facts["number"]) + 1
    cells = generator.choice(HALVES[facts["place"]], count, replace=False)
    # A single shape in a corner would be in two halves.
    cells = [HALVES[facts["place"]][1]] if count == 1 else cells
    noise = generator.normal(235, 12, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    picture = Pictures.fromarray(noise)
    pen = ImageDraw.Draw(picture)
    for cell in cells:
        x, y = (int(place + generator.integers(-1, 2)) for place in CELLS[cell])
        shade = tuple(int(c) for c in (np.array(COLOURS[facts["colour"]]) + generator.normal(0, 18, 3)).clip(0, 255))
        if facts["kind"] == "square":
            pen.rectangle((x, y, x + 7, y + 7), fill=shade)
        elif facts["kind"] == "circle":
            pen.ellipse((x, y, x + 7, y + 7), fill=shade)
        else:
            pen.polygon((x, y + 7, x + 7, y + 7, x + 3, y), fill=shade)
    return picture, facts


def make_row(generator: np.random.Generator) -> dict[str, Any]:
    picture, facts = draw(generator)
    question = str(generator.choice(list(QUESTIONS)))
    return {
        "images": [picture],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": facts[QUESTIONS[question]]}],
    }


def make_rows(number: int, seed: int) -> Dataset:
    generator = np.random.default_rng(seed)
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": message, "completion": message})
    return Dataset.from_list([make_row(generator) for _ in range(number)], features=features)


def make_processor() -> Idefics3Processor:
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*SPECIAL, *WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens=list(SPECIAL[2:6]) + list(SPECIAL[7:]),
    )  # fmt: skip
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False}
    return Idefics3Processor(Idefics3ImageProcessorPil(**size), fast, image_seq_len=4, chat_template=TEMPLATE)


def make_model(processor: Any, seed: int, width: int, layers: int) -> Idefics3ForConditionalGeneration:
    """A random model; the tower has the same shape in all of them."""
    torch.manual_seed(seed)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("pad", "eos", "image")}
    text = {
        "model_type": "llama", "vocab_size": len(processor.tokenizer), "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "pad_token_id": ids["pad"], "eos_token_id": ids["eos"], "max_position_embeddings": 128,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text, vision_config=vision, image_token_id=ids["image"], scale_factor=2, pad_token_id=ids["pad"]
    )
    return Idefics3ForConditionalGeneration(config)


def batches(processor: Any, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of new pictures, with labels on the answers alone."""
    generator = np.random.default_rng(seed)
    while True:
        rows = [make_row(generator) for _ in range(size)]
        yield as_batch(processor, rows)


def as_batch(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    texts = [
        f"<|user|> <image> {row['prompt'][0]['content']} <eos> <|assistant|> {row['completion'][0]['content']} <eos>"
        for row in rows
    ]
    batch = dict(processor(images=[row["images"] for row in rows], text=texts, padding=True, return_tensors="pt"))
    ids = batch["input_ids"]
    asked = (ids == processor.tokenizer.convert_tokens_to_ids("<|assistant|>")).cumsum(1) > 0
    answers = asked & (ids != processor.tokenizer.convert_tokens_to_ids("<|assistant|>"))
    return {**batch, "labels": ids.masked_fill(~answers | (batch["attention_mask"] == 0), -100)}


def train_teacher(processor: Any, updates: int, seed: int = 0) -> Idefics3ForConditionalGeneration:
    """All parts, by plain cross-entropy."""
    model = make_model(processor, seed, 64, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates, pct_start=0.1)
    for _, batch in zip(range(updates), batches(processor, 64, seed + 1), strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def make_student(processor: Any, teacher: Any, seed: int) -> Idefics3ForConditionalGeneration:
    """A smaller language part and connector, random, on the teacher's tower."""
    student = make_model(processor, seed, 40, 2)
    student.model.vision_model.load_state_dict(teacher.model.vision_model.state_dict())
    return student


@torch.no_grad()
def measure(model: Any, teacher: Any, processor: Any, rows: Dataset) -> dict[str, float]:
    """Right answers, nats per token, and KL(teacher || model), on held-out rows."""
    right, nats, distance, tokens = [], 0.0, 0.0, 0
    model.eval()
    for start in range(0, len(rows), 100):
        batch = as_batch(processor, [rows[i] for i in range(start, min(start + 100, len(rows)))])
        labels = batch.pop("labels")[:, 1:]
        found, theirs = (each(**batch).logits[:, :-1].log_softmax(-1) for each in (model, teacher))
        counts = labels != -100
        right += ((found.argmax(-1) == labels) | ~counts).all(1).tolist()
        nats -= found.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[counts].sum().item()
        distance += (theirs.exp() * (theirs - found)).sum(-1)[counts].sum().item()
        tokens += int(counts.sum())
    return {"right": mean(map(float, right)), "nats": nats / tokens, "kl": distance / tokens}


def train_student(processor: Any, teacher: Any, rows: Dataset, kd_weight: float, seed: int, options: Any) -> Any:
    student = make_student(processor, teacher, seed)
    settings = {
        "output_dir": "out/vision", "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": options.steps,
        "max_steps": options.steps, "seed": seed,
        "per_device_train_batch_size": 32, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20,
        "kd_weight": kd_weight,
    }  # fmt: skip
    KDTrainer(student, teacher, KDConfig(**settings), rows, processing_class=processor).train()
    return student


def with_wrong_answers(rows: Dataset, share: float, seed: int) -> Dataset:
    """Rows of which a share has the answer of another row."""
    generator = np.random.default_rng(seed)
    wrong, others = generator.random(len(rows)) < share, generator.permutation(len(rows))
    answers = [rows["completion"][int(others[i]) if wrong[i] else i] for i in range(len(rows))]
    feature = rows.features["completion"]
    return rows.remove_columns("completion").add_column("completion", answers, feature=feature)


def _spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400, help="rows that a student is trained on")
    parser.add_argument("--steps", type=int, default=300, help="updates of a student, of 32 rows")
    parser.add_argument("--teacher_steps", type=int, default=1000, help="updates of the teacher, of 64 new pictures")
    parser.add_argument("--held_out", type=int, default=1000)
    options = parser.parse_args(argv)
    disable_progress_bars()
    started = time.monotonic()
    processor = make_processor()
    teacher = train_teacher(processor, options.teacher_steps)
    held_out = make_rows(options.held_out, seed=10_000)
    results = {"teacher": [measure(teacher, teacher, processor, held_out)]}
    print(f"teacher after {time.monotonic() - started:.0f} s: {results['teacher'][0]}", flush=True)
    for seed in range(options.seeds):
        rows = make_rows(options.rows, seed=20_000 + seed)
        for name, weight, share in ARMS:
            student = make_student(processor, teacher, 100 + seed)
            if weight is not None:
                taught = with_wrong_answers(rows, share, seed)
                student = train_student(processor, teacher, taught, weight, 100 + seed, options)
            results.setdefault(name, []).append(measure(student, teacher, processor, held_out))
            print(f"seed {seed}, {name}: {results[name][-1]}", flush=True)
    names = {"right": "right answers", "nats": "nats per token", "kl": "KL to the teacher"}
    table = [
        {"student": name, **{names[key]: _spread([each[key] for each in found]) for key in names}}
        for name, found in results.items()
    ]
    print_table(f"{options.rows} rows, {options.steps} updates, {options.seeds} seeds", table, as_markdown=True)
    print(f"{time.monotonic() - started:.0f} s")
    return results


if __name__ == "__main__":
    main()
