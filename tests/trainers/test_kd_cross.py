"""KDTrainer with teachers that have another tokenizer.

Two truths. A teacher that only has other ids for the same tokens gives the update of the teacher without them, and with
a tokenizer of its own the update is the one by hand: every row read alone, in float64, the groups found by comparing
the byte offsets of tokens, the loss as the formulas in `losses/cross_tokenizer.py` have it.
Shapes: T and Tt tokens of student and teacher, V vocabulary, K names.
"""

import copy
import itertools
import json
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hf_distill import KDConfig, KDTrainer
from hf_distill.teachers.across import AcrossTeacher
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE
from tests.trainers.test_kd import VOCAB, Gradients, assert_same_gradients, dense_gradients, settings

SPLITS = [(8, 1), (4, 2), (2, 4)]  # batch size and accumulation steps of one and the same update
OPTIONS = {"temperature": 2.0, "kd_weight": 0.7}
NAMES = ("loss", "kd", "ce", "agreement")


# ------------------------------------------------------------------------------------------------ what the tests share


def make_trainer(folder, student, teacher, tokenizers, dataset, split=(8, 1), **changes):
    """A trainer of a copy of the student, and what will have the gradients of its updates."""
    size, steps = split
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **OPTIONS, **changes}
    capture = Gradients()
    trainer = KDTrainer(
        copy.deepcopy(student), teacher, KDConfig(**settings(folder, **options)), dataset, dataset, tokenizers[0],
        teacher_processing_class=tokenizers[1], callbacks=[capture],
    )  # fmt: skip
    return trainer, capture


def update(*args, **changes):
    """Gradients and log of the first update."""
    trainer, capture = make_trainer(*args, **changes)
    trainer.train()
    return capture.first, trainer.state.log_history[0]


def evaluations(trainer, sizes):
    for size in sizes:
        trainer.args.per_device_eval_batch_size = size
        yield trainer.evaluate()


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# Ragged, and parted anywhere, also inside of words.
TEXTS = [" ".join(text.split()[: 5 + i]) for i, text in enumerate(SENTENCES)]
PARTED = [(text[: 7 + 3 * i], text[7 + 3 * i :]) for i, text in enumerate(TEXTS)]
# Short answers, the same ones again, white space that templates take away, words of the templates.
CHATS = [
    turns("Did Tom see a fish?", "No."),
    turns(" Where is the train? \n", "It leaves at nine, and we must not be late.\n"),
    turns("Yes?", "Yes.", "Yes?", "Yes."),
    turns("You are kind.", "So are you.", "Is the user a dog?", "a dog"),
    turns(TEXTS[4], TEXTS[5]),
    turns(TEXTS[5], "I", "Person:", TEXTS[6]),
    turns("A bird", "sat on the fence"),
    turns("When?", "  At nine."),
]
DATASETS = {
    "text": Dataset.from_dict({"text": TEXTS}),
    "completion": Dataset.from_list([{"prompt": prompt, "completion": rest} for prompt, rest in PARTED]),
    "messages": Dataset.from_dict({"messages": CHATS}),
    "answer": Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]),
}


# ------------------------------------------------------------------------------------- the same tokens with other ids


@pytest.fixture(scope="module")
def order():
    """The teacher's id of each of the student's tokens."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def permuted_tokenizer(tokenizer, order):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: order[i].item() for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = order[token["id"]].item()
    permuted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>", pad_token="<pad>"
    )
    permuted.chat_template = tokenizer.chat_template
    return permuted


@pytest.fixture(scope="module")
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture(scope="module")
def permuted_teacher(teacher, order):
    permuted = copy.deepcopy(teacher)
    with torch.no_grad():
        for module in (permuted.get_input_embeddings(), permuted.get_output_embeddings()):
            module.weight[order] = module.weight.clone()
    return permuted


@pytest.fixture(scope="module")
def student():
    return make_model("llama", seed=2)


def test_permuted_ids_are_another_vocabulary_for_the_same_texts(tokenizer, permuted_tokenizer, order):
    for text in [*TEXTS, "café 🍕<eos>"]:
        ids = tokenizer(text)["input_ids"]
        assert permuted_tokenizer(text)["input_ids"] == order[ids].tolist()
        assert permuted_tokenizer(text)["input_ids"] != ids


STRIPPED = [[{**turn, "content": turn["content"].strip()} for turn in chat] for chat in CHATS]
SAME_TOKENS = {
    "text": (DATASETS["text"], {}),
    "other scripts": (Dataset.from_dict({"text": ["Ein Käse 🍕🎉!", *TEXTS[1:7], "안녕하세요\n\n  naïve"]}), {}),
    "completion": (DATASETS["completion"], {}),
    "messages": (Dataset.from_dict({"messages": STRIPPED}), {}),
    "answer": (Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in STRIPPED]), {}),
    "answers among messages": (Dataset.from_dict({"messages": STRIPPED}), {"assistant_only_loss": True}),
    "cut text": (DATASETS["text"], {"max_length": 11}),
    "cut completion": (DATASETS["completion"], {"max_length": 17}),
    "cut messages": (Dataset.from_dict({"messages": [turns(*PARTED[i], TEXTS[i - 1], TEXTS[i - 3]) for i in range(8)]}),
                     {"max_length": 25}),
    "stream": (DATASETS["completion"].to_iterable_dataset(), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME_TOKENS)
def test_permuted_ids_change_nothing(
    tmp_path, tokenizer, permuted_tokenizer, teacher, permuted_teacher, student, case
):
    dataset, options = SAME_TOKENS[case]
    plain, capture = make_trainer(tmp_path, student, teacher, (tokenizer, tokenizer), dataset, **options)
    lengths = {len(row["input_ids"]) for row in plain.train_dataset}
    assert len(lengths) > 1 or case.startswith("cut")
    if options.get("max_length"):
        assert max(lengths) == options["max_length"]
    (expected_metrics,) = evaluations(plain, [8])
    plain.train()
    expected_log = plain.state.log_history[-2]
    for k, split in enumerate(SPLITS if case in ("completion", "messages", "cut messages") else SPLITS[1:2]):
        trainer, found = make_trainer(
            tmp_path, student, permuted_teacher, (tokenizer, permuted_tokenizer), dataset, split, **options
        )
        assert isinstance(trainer.teacher, AcrossTeacher)
        for metrics in evaluations(trainer, [3, 8, 1][k : k + 1]):
            assert metrics["eval_alignment/exact_fraction"] == 1
            for name in NAMES:
                assert metrics[f"eval_{name}"] == pytest.approx(expected_metrics[f"eval_{name}"], rel=1e-6)
        trainer.train()
        log = trainer.state.log_history[-2]
        assert log["alignment/exact_fraction"] == 1
        for name in NAMES:
            assert log[name] == pytest.approx(expected_log[name], rel=1e-6)
        assert_same_gradients(found.first, capture.first)
