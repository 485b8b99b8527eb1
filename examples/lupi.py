"""Learning using privileged information: facts move from the teacher's prompt into the student's weights.

    python examples/lupi.py

A fact book has facts that no model has seen. The teacher can read: it is trained on thousands of other, contradicting
facts to take the answer from its prompt, or to answer "unknown". A LUPICollator shows the teacher each fact with the
question. The student, and the teacher of a control student, read the question alone. Takes a minute or two on a CPU.
"""

import argparse
import copy
import random
import tempfile

import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from hf_distill import LUPICollator, SpeculativeKDConfig, SpeculativeKDTrainer

STEMS = "Ar Bel Cor Dun El Fen Gal Hol Is Jor Kel Lum Mar Nor Os Pel".split()
NAMES = [stem + end for stem in STEMS for end in "an bria dell eth gar hin ix lund mere oria quin sten".split()]
THINGS = "anthem capital color currency flower founder harbor language leader motto mountain river".split()
WORDS = "<pad> <eos> user assistant : [ ] Background Knowledge What The is the of ? . unknown".split() + THINGS + NAMES
CHAT_TEMPLATE = """{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def make_models():
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=CHAT_TEMPLATE, **special)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.08,  # 0.02 learns slowly to copy
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)


def make_fact(place):
    """A fact such as "The capital of Beloria is Cormere Dunquin."; the answer has one to three names."""
    thing, answer = f"{random.choice(THINGS)} of {place}", " ".join(random.sample(NAMES, random.randint(1, 3)))
    return {"query": f"What is the {thing}?", "knowledge": f"The {thing} is {answer}.", "answer": answer}


def teach_to_read(teacher, tokenizer, places, **settings):
    facts = [make_fact(random.choice(places)) for _ in range(64 * settings["max_steps"])]
    facts[::8] = [{**fact, "knowledge": "", "answer": "unknown"} for fact in facts[::8]]
    collator = LUPICollator(tokenizer, completion_column="answer", allow_missing_knowledge=True)
    rows = [(row["teacher_prompt_ids"], row["completion_ids"]) for row in map(collator.encode, facts)]
    rows = [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in rows]
    args = transformers.TrainingArguments(per_device_train_batch_size=64, warmup_steps=50, adam_beta2=0.98, **settings)
    transformers.Trainer(teacher, args, transformers.DataCollatorForSeq2Seq(tokenizer), rows).train()


def accuracy(model, collator, facts):
    """The share of answers that greedy decoding reproduces word for word."""
    batch = collator(facts)
    ids, mask = batch["teacher_prompt_ids"], batch["teacher_prompt_mask"]
    written = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    texts = collator.tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(text == fact["answer"] for text, fact in zip(texts, facts, strict=True)) / len(facts)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("facts", 48), ("teacher_steps", 400), ("steps", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    transformers.set_seed(options.seed)
    tokenizer, teacher, student = make_models()
    collator = LUPICollator(tokenizer, query_column="query", knowledge_column="knowledge", allow_missing_knowledge=True)
    tools = {"data_collator": collator, "teacher_processing_class": tokenizer}
    places = random.sample(NAMES, len(NAMES))
    facts = [make_fact(place) for place in places[: options.facts]]
    bare = [{**fact, "knowledge": ""} for fact in facts]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "seed": options.seed, "learning_rate": 2e-3, "logging_steps": 50}
        settings |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
        teach_to_read(teacher, tokenizer, places[options.facts :], **settings, max_steps=options.teacher_steps)
        table = {"teacher with knowledge": accuracy(teacher, collator, facts)}
        table["teacher without knowledge"] = accuracy(teacher, collator, bare)
        table["student before"] = accuracy(student, collator, bare)
        for name, rows in {"student after": facts, "control student": bare}.items():
            args = SpeculativeKDConfig(
                max_new_tokens=6, adaptive=True, top_k=5, student_temperature=0.7, teacher_temperature=0.7,
                per_device_train_batch_size=16, max_steps=options.steps, gradient_checkpointing=False, **settings,
            )  # fmt: skip
            learner, rows = copy.deepcopy(student), Dataset.from_list(rows)
            SpeculativeKDTrainer(learner, teacher, args, rows, None, tokenizer, **tools).train()
            table[name] = accuracy(learner, collator, bare)
    print("\n".join(f"{name:<28}{value:>8.1%}" for name, value in table.items()))
    return table


if __name__ == "__main__":
    main()
