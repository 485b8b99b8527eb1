"""KDTrainer with several teachers, with the student's own base as teacher, and with prompts that only teachers read.

The truth is a loss by hand: every row read alone and without padding, dense logits in float64.
Shapes: N label-bearing positions, V vocabulary.
"""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_distill import KDConfig, KDTrainer
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE
from tests.trainers.test_kd import (
    VOCAB,
    Gradients,
    assert_same_gradients,
    dense_gradients,
    gradients_of,
    lora,
    make_trainer,
    nonzero_adapters,
    settings,
)

SPLITS = [(8, 1), (2, 4), (1, 8)]  # batch size and accumulation steps of one and the same update


# ------------------------------------------------------------------------------------------------ what the tests share


@pytest.fixture(scope="module")
def rows(tokenizer) -> Dataset:
    """Eight ragged tokenised rows; the first tokens of each are prompt. One batch of two has only teacher "b"."""
    ids = [tokenizer(text)["input_ids"][: 6 + 3 * i] for i, text in enumerate(SENTENCES)]
    labels = [[-100] * (1 + i % 3) + row[1 + i % 3 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "teacher": list("abbbcaca")})


@pytest.fixture(scope="module")
def teachers():
    return {
        "a": make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3),
        "b": make_model("gemma2", seed=3),
        "c": make_model("gpt2", seed=4),
    }


@pytest.fixture
def student():
    return make_model("llama", seed=2)


def answers(model, dataset) -> torch.Tensor:
    """Dense logits (N, V) of the label-bearing positions, every row read alone."""
    found = []
    for row in dataset:
        mask = torch.tensor(row["labels"][1:]) != -100
        found.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][mask, :VOCAB].double())
    return torch.cat(found)


def by_hand(student, dataset, targets, *, kd_weight=0.5, temperature=1.0, divergence="forward_kl", views=None):
    """The loss of an update.

    Args:
        targets: (model, weight) for each divergence that is summed, or a list of such pairs for one to a mixture; a
            weight is a number or one for each row. `views` is the dataset as the teachers read it.
    """
    counts = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in dataset])

    def weighted(model, weight):
        weight = torch.as_tensor(weight, dtype=torch.float64).expand(len(counts)).repeat_interleave(counts)
        with torch.no_grad():
            return weight[:, None], (answers(model, views or dataset) / temperature).softmax(-1)

    logits = answers(student, dataset)
    kd = torch.zeros(len(logits)).double()
    for target in targets:
        if isinstance(target, list):
            weight, probs = 1.0, sum(w * p for w, p in (weighted(*pair) for pair in target))
        else:
            weight, probs = weighted(*target)
            weight = weight[:, 0]
        kd = kd + weight * ORACLE[divergence](probs, (logits / temperature).softmax(-1))
    labels = torch.tensor([label for row in dataset for label in row["labels"][1:] if label != -100])
    ce = nn.functional.cross_entropy(logits, labels)
    return kd_weight * temperature**2 * kd.mean() + (1 - kd_weight) * ce


def routed(teachers, dataset) -> list:
    """As a target for `by_hand`: each row's own teacher."""
    return [(model, [float(name == row["teacher"]) for row in dataset]) for name, model in teachers.items()]


# ----------------------------------------------------------------------------------------------------- several teachers


@pytest.mark.parametrize("combination", ["mixture", "sum", "route"])
def test_update_is_the_one_by_hand_however_the_batch_is_cut_and_ordered(
    tmp_path, tokenizer, rows, student, teachers, combination
):
    options = {"temperature": 2.0, "divergence": "reverse_kl", "kd_weight": 0.7}
    pairs = list(zip(teachers.values(), (1 / 6, 2 / 6, 3 / 6), strict=True))
    targets = {"mixture": [pairs], "sum": pairs, "route": routed(teachers, rows)}[combination]
    loss = by_hand(student, rows, targets, **options)
    expected = dense_gradients(loss, student)
    weights = None if combination == "route" else [1.0, 2.0, 3.0]
    for (size, steps), order in zip(SPLITS, (range(8), range(8), range(7, -1, -1)), strict=True):
        found, log = gradients_of(
            tmp_path, student, teachers, rows.select(order), tokenizer, teacher_combination=combination,
            teacher_weights=weights, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(found, expected)


def test_one_quantised_and_one_half_precision_teacher_are_mixed(tmp_path, tokenizer, rows, student, teachers):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model("llama", seed=5, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "big")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big", quantization_config=quantization)
    assert any(type(module).__name__ == "Linear4bit" for module in big.modules())
    half = copy.deepcopy(teachers["a"]).bfloat16()
    found, log = gradients_of(tmp_path, student, [big, half, teachers["b"]], rows, tokenizer)
    loss = by_hand(student, rows, [[(big, 1 / 3), (half, 1 / 3), (teachers["b"], 1 / 3)]])
    # Half precision rounds with the length of a padded row.
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert_same_gradients(found, dense_gradients(loss, student), rtol=1e-2)


def test_two_teachers_of_which_one_has_no_weight_are_the_other_alone(tmp_path, tokenizer, rows, student, teachers):
    expected, plain = gradients_of(tmp_path, student, teachers["b"], rows, tokenizer, temperature=2.0)
    pair = [teachers["a"], teachers["b"]]
    for combination in ("mixture", "sum"):
        found, log = gradients_of(
            tmp_path, student, pair, rows, tokenizer, temperature=2.0, teacher_weights=[0.0, 3.0],
            teacher_combination=combination,
        )  # fmt: skip
        assert_same_gradients(found, expected, rtol=1e-6)
        assert log["kd"] == pytest.approx(plain["kd"], rel=1e-6)


def test_packed_rows_have_a_mixture_of_teachers(tmp_path, tokenizer, rows, student, teachers):
    pair = [teachers["a"], teachers["b"]]
    expected, plain = gradients_of(tmp_path, student, pair, rows, tokenizer)
    for changes in ({"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}):
        found, log = gradients_of(tmp_path, student, pair, rows, tokenizer, **changes)
        assert_same_gradients(found, expected)
        assert log["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_teachers_are_called_as_the_dict_says_or_as_they_are_known(tmp_path, tokenizer, rows, student, teachers):
    teachers["c"].save_pretrained(tmp_path / "private" / "tiny")
    path = str(tmp_path / "private" / "tiny")
    first = teachers["a"]
    trainer = make_trainer(tmp_path, student, [first, path, first], rows, tokenizer, teacher_weights=[2, 1, 1])
    assert list(trainer.teachers) == ["LlamaForCausalLM", "tiny", "LlamaForCausalLM (3)"]
    assert trainer.describe()["teacher"] == "0.5 LlamaForCausalLM + 0.25 tiny + 0.25 LlamaForCausalLM (3)"
    assert trainer.describe()["combination of the teachers"] == "mixture"
    trainer = make_trainer(tmp_path, student, {"x": first}, rows, tokenizer)
    assert list(trainer.teachers) == ["x"]
    assert trainer.teacher is trainer.teachers["x"]


def test_vocabulary_is_what_all_share(tmp_path, tokenizer, rows, teachers):
    extended = make_tokenizer(added_tokens=("<extra>",))
    student = make_model("llama", vocab_size=VOCAB + 16, seed=2)
    wide = make_model("llama", vocab_size=VOCAB + 8, seed=1)

    def vocab_size(tokenizers):
        return KDTrainer(
            student, {"wide": wide, "b": teachers["b"]}, KDConfig(**settings(tmp_path)), rows,
            processing_class=extended, teacher_processing_class=tokenizers,
        ).vocab_size  # fmt: skip

    assert vocab_size([extended, tokenizer]) == VOCAB
    assert vocab_size({"wide": extended, "b": tokenizer}) == VOCAB
    assert vocab_size(tokenizer) == VOCAB


# -------------------------------------------------------------------------------------------------- to each row its own


def test_evaluation_asks_each_rows_teacher_whatever_the_batch_size(tmp_path, tokenizer, rows, student, teachers):
    held_out = rows.select([6, 0, 3, 4, 1])
    trainer = make_trainer(
        tmp_path, student, teachers, rows, tokenizer, teacher_combination="route", temperature=2.0,
        trainer_settings={"eval_dataset": held_out},
    )  # fmt: skip
    loss = by_hand(student, held_out, routed(teachers, held_out), temperature=2.0).item()
    for size in (1, 2, 8):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    part = held_out.select(range(2))
    expected = by_hand(student, part, routed(teachers, part), temperature=2.0).item()
    assert trainer.evaluate(part)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_that_are_not_prepared_name_their_teacher_by_its_index_and_may_have_no_label(
    tmp_path, tokenizer, rows, student, teachers
):
    index = ["abc".index(name) for name in rows["teacher"]]
    labels = [row if i not in (0, 4) else [-100] * len(row) for i, row in enumerate(rows["labels"])]
    tokens = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels, "teacher_index": index})
    found, log = gradients_of(
        tmp_path, student, teachers, tokens, tokenizer, teacher_combination="route", per_device_train_batch_size=2,
        gradient_accumulation_steps=4, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    kept = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels, "teacher": rows["teacher"]})
    loss = by_hand(student, kept, routed(teachers, kept))
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def test_streams_of_rows_find_their_teacher(tmp_path, tokenizer, rows, student, teachers):
    options = {"teacher_combination": "route", "kd_weight": 1.0}
    _, log = gradients_of(tmp_path, student, teachers, rows.to_iterable_dataset(), tokenizer, **options)
    assert log["loss"] == pytest.approx(by_hand(student, rows, routed(teachers, rows), kd_weight=1.0).item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------- the student's own base


def test_base_as_teacher_gives_the_update_by_hand(tmp_path, tokenizer, rows, student, teachers):
    base = copy.deepcopy(student)
    student = nonzero_adapters(get_peft_model(student, lora()))
    options = {"temperature": 2.0, "kd_weight": 0.7}
    for teacher, targets in (
        ("base", [(base, 1.0)]),
        ({"me": "base", "b": teachers["b"]}, [[(base, 0.5), (teachers["b"], 0.5)]]),
    ):
        expected = dense_gradients(loss := by_hand(student, rows, targets, **options), student)
        for size, steps in SPLITS[:2]:
            split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            found, log = gradients_of(tmp_path, student, teacher, rows, tokenizer, **options, **split)
            assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert_same_gradients(found, expected)


RUN = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2}


def run_with_base(folder, tokenizer, rows, teacher, **changes):
    """Four updates of a student with dropout everywhere; the weights of its adapters and its losses."""
    student = make_model("llama", seed=2, attention_dropout=0.2)
    trainer = make_trainer(
        folder, student, teacher, rows, tokenizer, gradient_checkpointing=True, gradient_accumulation_steps=2,
        trainer_settings={"peft_config": lora(lora_dropout=0.2), "eval_dataset": rows.select(range(3))},
        eval_strategy="steps", eval_steps=1, **RUN, **{"save_strategy": "no", **changes},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    losses = [log[name] for log in trainer.state.log_history for name in ("loss", "eval_loss") if name in log]
    return {name: p for name, p in trainer.model.state_dict().items() if "lora_" in name}, losses, trainer


def test_base_as_teacher_is_a_copy_of_the_base_bit_for_bit_without_the_copy(tmp_path, tokenizer, rows):
    """Dropout, gradient checkpointing and evaluations in between are those of the run with a teacher of its own."""
    twin = make_model("llama", seed=2)
    expected, losses, other = run_with_base(tmp_path, tokenizer, rows, twin)
    found, own_losses, trainer = run_with_base(tmp_path, tokenizer, rows, "base")
    assert own_losses == losses
    assert len(losses) == 8
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    base = trainer.model.get_base_model()
    assert trainer.teacher.model is trainer.model
    assert trainer.teacher.head.weight.data_ptr() == base.lm_head.weight.data_ptr()
    assert sum(p.numel() for p in trainer.model.parameters()) == sum(p.numel() for p in other.model.parameters())
    assert trainer.vocab_size == other.vocab_size


def test_resumed_run_with_the_base_as_teacher_is_bit_identical(tmp_path, tokenizer, rows):
    whole, losses, _ = run_with_base(tmp_path, tokenizer, rows, "base", save_strategy="steps", save_steps=2)
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    found, all_losses, _ = run_with_base(tmp_path / "resumed", tokenizer, rows, "base", **resume)
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    assert all_losses == losses


def test_ids_past_the_vocabulary_have_no_mass_with_the_base_as_teacher(tmp_path, tokenizer, rows):
    student = make_model("llama", vocab_size=VOCAB + 16, seed=2)
    trainer = make_trainer(tmp_path, student, "base", rows, tokenizer, trainer_settings={"peft_config": lora()})
    assert trainer.vocab_size == VOCAB


def test_frozen_parts_of_adapters_stay_frozen(tmp_path, tokenizer, rows, student):
    student = nonzero_adapters(get_peft_model(student, lora()))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    capture = Gradients()
    make_trainer(
        tmp_path, student, "base", rows, tokenizer, trainer_settings={"callbacks": [capture]}, max_steps=2
    ).train()
    assert all("lora_B" in name for update in capture.updates for name in update)


# --------------------------------------------------------------------------------------- a prompt of the teacher's own


@pytest.fixture(scope="module")
def prompts() -> Dataset:
    """Prompts and completions; the teachers of most rows read another prompt, longer or shorter, of the others not."""
    found = []
    for i, sentence in enumerate(SENTENCES):
        words = sentence.split()
        row = {"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])}
        own = [f"Somebody said: {sentence} Once more: {row['prompt']}", "So", None, ""][i % 4]
        found.append({**row, "teacher_prompt": own, "teacher": "abc"[i % 3]})
    return Dataset.from_list(found)


def as_messages(row):
    chat = {"prompt": "user", "completion": "assistant", "teacher_prompt": "user"}
    turns = {name: [{"role": role, "content": row[name]}] if row[name] else None for name, role in chat.items()}
    if row["teacher_prompt"] not in ("So", None, ""):
        turns["teacher_prompt"] = [{"role": "system", "content": "Be right."}, *turns["teacher_prompt"]]
    return turns


def chat_text(turns, prompted=True):
    return "".join(f"<|{turn['role']}|>{turn['content']}<eos>" for turn in turns) + "<|assistant|>" * prompted


def encode(tokenizer, row, prompt_name) -> dict:
    """A row as one side reads it, made with nothing but the tokenizer."""
    chat = not isinstance(row["prompt"], str)
    prompt = row[prompt_name] or row["prompt"]
    prompt_ids, own_ids = (tokenizer(chat_text(p) if chat else p)["input_ids"] for p in (row["prompt"], prompt))
    text = chat_text(row["prompt"] + row["completion"], False) if chat else row["prompt"] + row["completion"] + "<eos>"
    completion = tokenizer(text)["input_ids"][len(prompt_ids) :]
    return {"input_ids": own_ids + completion, "labels": [-100] * len(own_ids) + completion}


@pytest.mark.parametrize("kind", ["text", "chat", "stream", "torch"])
def test_teacher_reads_its_own_prompt_before_the_same_completion(tmp_path, tokenizer, prompts, student, teachers, kind):
    dataset = prompts.map(as_messages) if kind == "chat" else prompts
    mine, theirs = ([encode(tokenizer, row, name) for row in dataset] for name in ("prompt", "teacher_prompt"))
    lengths = [len(own["input_ids"]) - len(row["input_ids"]) for own, row in zip(theirs, mine, strict=True)]
    assert min(lengths) < 0 < max(lengths)
    assert 0 in lengths
    dataset = {"stream": dataset.to_iterable_dataset, "torch": lambda: dataset.with_format("torch")}.get(
        kind, lambda: dataset
    )()
    options = {"temperature": 2.0, "kd_weight": 0.7}
    loss = by_hand(student, mine, [(teachers["a"], 1.0)], views=theirs, **options)
    expected = dense_gradients(loss, student)
    for size, steps in SPLITS[:2]:
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        found, log = gradients_of(tmp_path, student, teachers["a"], dataset, tokenizer, **options, **split)
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(found, expected)
        assert log["num_tokens"] == sum(len(row["input_ids"]) for row in mine)


@pytest.mark.parametrize("combination", ["mixture", "route"])
def test_several_teachers_read_it(tmp_path, tokenizer, prompts, student, teachers, combination):
    mine, theirs = ([encode(tokenizer, row, name) for row in prompts] for name in ("prompt", "teacher_prompt"))
    targets = routed(teachers, prompts) if combination == "route" else [[(t, 1 / 3) for t in teachers.values()]]
    loss = by_hand(student, mine, targets, views=theirs)
    found, log = gradients_of(
        tmp_path, student, teachers, prompts, tokenizer, teacher_combination=combination, per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def test_teachers_that_read_it_differently_are_refused(tmp_path, tokenizer, prompts, student, teachers):
    other = make_tokenizer()
    other.chat_template = "Dear model, " + other.chat_template
    tokenizers = {"a": tokenizer, "b": other, "c": tokenizer}
    args = KDConfig(**settings(tmp_path))
    options = {"processing_class": tokenizer, "teacher_processing_class": tokenizers}
    message = r"'teacher_prompt' of row \d+ of the prepared train dataset is for all teachers.*text"
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, teachers, args, prompts.map(as_messages), **options)
    KDTrainer(student, teachers, args, prompts, **options)  # as text it is the same for all


def test_base_reads_it_too(tmp_path, tokenizer, prompts, student):
    """Self-distillation of a context into weights."""
    base = copy.deepcopy(student)
    student = nonzero_adapters(get_peft_model(student, lora()))
    mine, theirs = ([encode(tokenizer, row, name) for row in prompts] for name in ("prompt", "teacher_prompt"))
    loss = by_hand(student, mine, [(base, 1.0)], views=theirs, kd_weight=1.0)
    trainer = make_trainer(tmp_path, student, "base", prompts, tokenizer)
    assert trainer.describe_run()["teacher base"] == "the student without its adapters"
    found, log = gradients_of(tmp_path, student, "base", prompts, tokenizer, kd_weight=1.0)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(found, dense_gradients(loss, student))


def test_evaluation_reads_it_whatever_the_batch_size_and_the_training_rows(
    tmp_path, tokenizer, prompts, student, teachers
):
    mine, theirs = ([encode(tokenizer, row, name) for row in prompts] for name in ("prompt", "teacher_prompt"))
    expected = by_hand(student, mine, [(teachers["a"], 1.0)], views=theirs).item()
    trainer = make_trainer(
        tmp_path, student, teachers["a"], prompts, tokenizer, trainer_settings={"eval_dataset": prompts}
    )
    for size in (1, 3, 8):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    plain = prompts.remove_columns("teacher_prompt")
    trainer = make_trainer(tmp_path, student, teachers["a"], plain, tokenizer)
    without = by_hand(student, mine, [(teachers["a"], 1.0)]).item()
    assert trainer.evaluate(plain)["eval_loss"] == pytest.approx(without, rel=1e-5)
    assert trainer.evaluate(prompts)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_completion_that_is_cut_is_cut_for_both(tmp_path, tokenizer, prompts, student, teachers):
    mine, theirs = ([encode(tokenizer, row, name) for row in prompts] for name in ("prompt", "teacher_prompt"))
    kept = 12
    cuts = [max(0, len(row["input_ids"]) - kept) for row in mine]
    assert any(cuts)
    for side in (mine, theirs):
        for row, cut in zip(side, cuts, strict=True):
            for name in row:
                row[name] = row[name][: len(row[name]) - cut]
    loss = by_hand(student, mine, [(teachers["a"], 1.0)], views=theirs)
    _, log = gradients_of(tmp_path, student, teachers["a"], prompts, tokenizer, max_length=kept)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_tools_are_in_both_prompts(tmp_path, tokenizer, prompts, student, teachers):
    with_tools = copy.deepcopy(tokenizer)
    with_tools.chat_template = "{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}" + (
        tokenizer.chat_template
    )
    tools = json.dumps([{"type": "function", "function": {"name": "lamp"}}])
    dataset = prompts.map(as_messages).select(range(1)).add_column("tools", [tools])
    trainer = make_trainer(tmp_path, student, teachers["a"], dataset, with_tools)
    (row,) = trainer.train_dataset
    for name in ("input_ids", "teacher_input_ids"):
        assert with_tools.decode(row[name]).startswith("lamp <|"), name


def test_prepared_rows_may_have_the_teachers_tokens(tmp_path, tokenizer, prompts, student, teachers):
    mine, theirs = ([encode(tokenizer, row, name) for row in prompts] for name in ("prompt", "teacher_prompt"))
    dataset = Dataset.from_list(
        [{**row, **{f"teacher_{name}": v for name, v in own.items()}} for row, own in zip(mine, theirs, strict=True)]
    )
    loss = by_hand(student, mine, [(teachers["a"], 1.0)], views=theirs)
    expected = dense_gradients(loss, student)
    for skip in (True, False):
        found, log = gradients_of(
            tmp_path, student, teachers["a"], dataset, tokenizer, dataset_kwargs={"skip_prepare_dataset": skip}
        )
        assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same_gradients(found, expected)


def test_prepared_rows_of_other_completions_are_refused(tmp_path, tokenizer, student, teachers):
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "teacher_input_ids": [9, 5, 6, 7]}
    for labels, number in (([-100, -100, -100, 7], 1), ([-100, -100, 6, 8], 2)):
        dataset = Dataset.from_list([{**row, "teacher_labels": labels}])
        with pytest.raises(ValueError, match=rf"2 label-bearing tokens for the student and {number} for the teacher"):
            make_trainer(tmp_path, student, teachers["a"], dataset, tokenizer)


# ------------------------------------------------------------------------------------------------------------ bad input

TEXT = Dataset.from_dict({"text": SENTENCES, "teacher_prompt": SENTENCES})
PROMPTS = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "teacher_prompt": ["c"]})
TOKENS = {"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}
PREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}
ROUTE = {"teacher_combination": "route"}

# Message, settings, arguments of the trainer.
REFUSED = {
    "no teacher in a list": ("teacher_model is missing", {}, {"teacher_model": []}),
    "no teacher in a dict": ("teacher_model is missing", {}, {"teacher_model": {}}),
    "a teacher that is None": ("teacher_model is missing", {}, {"teacher_model": [None, "x"]}),
    "a weight too few": (r"3 teachers \(a, b, c\) and args.teacher_weights=\[1, 2\]", {"teacher_weights": [1, 2]}, {}),
    "weights of one teacher": ("need several teachers", {"teacher_weights": [1]}, {"teacher_model": "x"}),
    "one teacher to route to": ("need several teachers", ROUTE, {"teacher_model": "x"}),
    "route with weights": ("not used with teacher_combination='route'", {**ROUTE, "teacher_weights": [1, 1, 1]}, {}),
    "a device too few": ("name one device, or one for each", {"teacher_device": "cpu,cpu"}, {}),
    "a tokenizer too few": ("3 teachers and 2 of teacher_processing_class", {}, {"teacher_processing_class": [0, 0]}),
    "a tokenizer of nobody": (r"has \['d'\]; the teachers are a, b, c", {}, {"teacher_processing_class": {"d": 0}}),
    "route without a column": (
        "needs a column 'teacher' in the train dataset", ROUTE, {"train_dataset": Dataset.from_dict(TOKENS)},
    ),
    "an evaluation without a column": (
        "needs a column 'teacher' in the eval dataset", ROUTE, {"eval_dataset": Dataset.from_dict(TOKENS)},
    ),
    "prepared rows without an index": (
        "needs a column 'teacher_index' in the train dataset", {**ROUTE, **PREPARED}, {},
    ),
    "an unknown teacher": (
        "train dataset has the teacher 'd'; there are a, b, c", ROUTE,
        {"train_dataset": Dataset.from_dict({**TOKENS, "teacher": ["d"]})},
    ),
    "an unknown teacher of an evaluation": (
        "eval dataset has the teacher 'd'; there are a, b, c", ROUTE,
        {"eval_dataset": Dataset.from_dict({**TOKENS, "teacher": ["d"]})},
    ),
    "packing with route": ("would lose 'teacher': set both to False", {**ROUTE, "packing": True}, {}),
    "no padding with route": ("would lose 'teacher'", {**ROUTE, "padding_free": True, "max_length": None}, {}),
    "packing with a prompt": ("would lose 'teacher_prompt'", {"packing": True}, {"train_dataset": PROMPTS}),
    "packing of an evaluation": ("would lose 'teacher_prompt'", {"eval_packing": True}, {"eval_dataset": PROMPTS}),
    "no padding with a prompt": (
        "would lose 'teacher_prompt'", {"padding_free": True, "max_length": None}, {"train_dataset": PROMPTS},
    ),
    "a prompt of a text": ("no prompt that it could stand for: it needs 'prompt'", {}, {"train_dataset": TEXT}),
    "a prompt that bears labels": (
        "labels on the completion alone", {"completion_only_loss": False}, {"train_dataset": PROMPTS},
    ),
    "prepared rows with a prompt": (
        "as 'teacher_input_ids' and 'teacher_labels', or, without skip_prepare_dataset, as 'teacher_prompt'", PREPARED,
        {"train_dataset": Dataset.from_dict({**TOKENS, "teacher_prompt": ["a"]})},
    ),
    "half of what the teacher reads": (
        "needs what the teacher reads as", {},
        {"train_dataset": Dataset.from_dict({**TOKENS, "teacher_input_ids": [[5, 6, 7]]})},
    ),
    "the base of a student without adapters": ("needs a student with adapters", {}, {"teacher_model": ["base", "b"]}),
    "a base that is trained": (
        "'base' needs a base model that stays as it is", {},
        {"teacher_model": "base", "peft_config": lora(modules_to_save=["lm_head"])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_at_construction_in_words(tmp_path, tokenizer, rows, student, teachers, case):
    message, changes, arguments = REFUSED[case]
    arguments = {"teacher_model": teachers, "teacher_processing_class": tokenizer, "train_dataset": rows, **arguments}
    if arguments["teacher_model"] == ["base", "b"]:
        arguments["teacher_model"] = ["base", teachers["b"]]
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, args=KDConfig(**settings(tmp_path, **changes)), processing_class=tokenizer, **arguments)


def test_indices_and_evaluations_that_name_no_teacher_are_refused(tmp_path, tokenizer, rows, student, teachers):
    for index in (3, -1):
        dataset = Dataset.from_dict({**TOKENS, "teacher_index": [index]})
        with pytest.raises(ValueError, match=rf"teacher_index {index}; there are 3 teachers"):
            make_trainer(tmp_path, student, teachers, dataset, tokenizer, **ROUTE)
    trainer = make_trainer(tmp_path, student, teachers, rows, tokenizer, **ROUTE)
    with pytest.raises(ValueError, match="needs a column 'teacher' in the eval dataset"):
        trainer.evaluate(rows.remove_columns("teacher"))
