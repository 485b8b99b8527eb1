"""SpeculativeKDTrainer against the same update computed by hand on the tokens that it wrote."""

import copy
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_distill import LUPICollator, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.callbacks import RolloutSamplesCallback, _sample
from hf_distill.metrics import RolloutMeans
from hf_distill.trainers.speculative_kd import Row
from hf_distill.trainers.speculative_kd_config import ROLLOUT_SOURCES
from tests.conftest import SENTENCES, make_model, make_tokenizer
from tests.losses.oracle import ORACLE

VOCAB = 384
KOREAN_CULTURE = Path(__file__).parents[3] / "shared" / "data" / "korean_culture"  # used where it is there
EVERYTHING = {"speculative": 0.4, "student": 0.2, "teacher": 0.2, "dataset": 0.2}
SEED_OF_ALL_SOURCES = 0  # eight rows of this mix have each source at least once
FACTS = [
    {"query": f"What is fact {i}?", "knowledge": text, "answer": text.split()[-1]} for i, text in enumerate(SENTENCES)
]


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1,
        "save_strategy": "no", "max_new_tokens": 10, "draft_length": 4, "top_k": 60, **changes,
    }  # fmt: skip


def make_trainer(folder, student, teacher, dataset, tokenizer, *, eval_dataset=None, others=None, **changes):
    return SpeculativeKDTrainer(
        student, teacher, SpeculativeKDConfig(**settings(folder, **changes)), dataset, eval_dataset, tokenizer,
        teacher_processing_class=tokenizer, **(others or {}),
    )  # fmt: skip


@pytest.fixture
def teacher():
    return make_model("llama", seed=1, hidden_size=48, num_hidden_layers=3)


@pytest.fixture
def student():
    return make_model("llama", seed=2)


@pytest.fixture(scope="module")
def rows():
    words = [sentence.split() for sentence in SENTENCES]
    pairs = {"prompt": [" ".join(w[: 2 + i % 3]) for i, w in enumerate(words)]}
    return Dataset.from_dict(pairs | {"completion": [" " + " ".join(w[2 + i % 3 :]) for i, w in enumerate(words)]})


class Watch(TrainerCallback):
    """The rows and gradients of every update."""

    def __init__(self):
        self.rows, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.rows.append(copy.deepcopy(self.trainer.last_rows))
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def watched(*args, **kwargs):
    watch = Watch()
    trainer = make_trainer(*args, others={"callbacks": [watch], **kwargs.pop("others", {})}, **kwargs)
    watch.trainer = trainer
    return trainer, watch


def by_hand(student, teacher, rows, kd_weight=1.0, temperature=1.0, divergence="forward_kl"):
    """The loss of an update and the logged means, row by row, from the logits that plain models return."""
    kd, ce, privilege, count, num_hard = 0.0, 0.0, 0.0, 0, 0
    for row in rows:
        completion = torch.tensor(row.completion_ids)

        def logits(model, prompt, completion=completion):
            ids = torch.tensor([prompt]), completion[None]
            return model(input_ids=torch.cat(ids, 1)).logits[0, len(prompt) - 1 : -1].double()  # (C, V)

        student_logits = logits(student, row.student_prompt_ids)
        with torch.no_grad():
            teacher_logits = logits(teacher, row.teacher_prompt_ids)
            bare = logits(teacher, row.student_prompt_ids)
        kd = (
            kd
            + ORACLE[divergence](
                (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)
            ).sum()
        )
        privilege += F.kl_div(bare.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="sum")
        if row.source in ("dataset", "teacher"):
            ce = ce + F.cross_entropy(student_logits, completion, reduction="sum")
            num_hard += len(completion)
        count += len(completion)
    loss = (kd_weight * temperature**2 * kd + (1 - kd_weight) * ce) / count
    return loss, {"kd": float(kd) / count, "ce": float(ce) / max(num_hard, 1), "privilege": float(privilege) / count}


def assert_same_gradients(found, loss, model):
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 2e-5 * max(gradient.norm(), 1e-3 * norm), name


# -------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("rollout_batch_size", [None, 3])
def test_update_is_the_one_by_hand_on_the_same_tokens(
    tmp_path, tokenizer, rows, student, teacher, accumulation, rollout_batch_size
):
    plain = copy.deepcopy(student)
    trainer, watch = watched(
        tmp_path, student, teacher, rows, tokenizer, rollout_mix=EVERYTHING, kd_weight=0.6, temperature=2.0,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        rollout_batch_size=rollout_batch_size, adaptive=True, seed=SEED_OF_ALL_SOURCES,
    )  # fmt: skip
    trainer.train()
    assert len(watch.rows[0]) == 8
    assert {row.source for row in watch.rows[0]} == set(ROLLOUT_SOURCES)
    loss, means = by_hand(plain, teacher, watch.rows[0], kd_weight=0.6, temperature=2.0)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (log["kd"], log["ce"]) == pytest.approx((means["kd"], means["ce"]), rel=1e-5)
    assert log["num_tokens"] == sum(len(row.student_prompt_ids) + len(row.completion_ids) for row in watch.rows[0])
    assert_same_gradients(watch.gradients[0], loss, plain)


def test_a_compiled_step_changes_no_update_and_its_cost_is_told_first(tmp_path, tokenizer, rows, caplog, monkeypatch):
    caplog.set_level("INFO", logger="hf_distill")
    shapes = set()

    def compiled(forward, **_):
        return lambda **inputs: shapes.add(tuple(inputs["attention_mask"].shape)) or forward(**inputs)

    updates = []
    for compiles in (False, True):
        monkeypatch.setattr(torch, "compile", compiled)
        trainer, watch = watched(
            tmp_path, make_model("llama", seed=2), make_model("llama", seed=1), rows, tokenizer, max_steps=2,
            rollout_mix=EVERYTHING, rollout_batch_size=3, adaptive=True, rollout_compile=compiles,
        )  # fmt: skip
        assert (caplog.text.count("the student's step is compiled (rollout_compile)") == 1) == compiles
        assert not shapes
        trainer.train()
        updates.append([[row.completion_ids for row in written] for written in watch.rows])
    assert updates[0] == updates[1]
    assert shapes == {(3, 1, 1, 128)}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_any_divergence(tmp_path, tokenizer, rows, student, teacher, divergence):
    plain = copy.deepcopy(student)
    trainer, watch = watched(tmp_path, student, teacher, rows, tokenizer, divergence=divergence)
    trainer.train()
    assert_same_gradients(watch.gradients[0], by_hand(plain, teacher, watch.rows[0], divergence=divergence)[0], plain)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2", "mistral"])
def test_families_with_gradient_checkpointing_and_dropout_switched_off_while_writing(tmp_path, tokenizer, rows, family):
    student, teacher = make_model(family, seed=2), make_model(family, seed=1)
    plain = copy.deepcopy(student)
    trainer, watch = watched(tmp_path, student, teacher, rows, tokenizer, gradient_checkpointing=True)
    trainer.train()
    assert_same_gradients(watch.gradients[0], by_hand(plain, teacher, watch.rows[0])[0], plain)


def test_lora_student_writes_with_its_adapters(tmp_path, tokenizer, rows, student, teacher):
    trainer, watch = watched(
        tmp_path, student, teacher, rows, tokenizer, max_steps=2, student_temperature=0.0, learning_rate=50.0,
        rollout_mix={"student": 1.0}, others={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    )  # fmt: skip
    trainer.train()
    assert watch.gradients[0]
    assert all("lora" in name for name in watch.gradients[0])
    merged = trainer.model.merge_and_unload().eval()
    trainer.last_rows.clear()
    (batch,) = trainer._write_batches([trainer.data_collator(trainer.train_dataset.to_list()[:2])], "eval", 0)
    for row in trainer.last_rows:
        ids = torch.tensor([row.student_prompt_ids])
        written = merged.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=trainer.eos_token_ids)
        assert written[0, ids.shape[1] :].tolist() == row.completion_ids
    assert batch["labels"].ne(-100).sum() == sum(len(row.completion_ids) for row in trainer.last_rows)


def test_student_that_has_adapters_already_is_trained(tmp_path, tokenizer, rows, student, teacher):
    adapted = get_peft_model(student, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    trainer, watch = watched(tmp_path, adapted, teacher, rows, tokenizer)
    trainer.train()
    assert watch.gradients[0]
    assert all("lora" in name for name in watch.gradients[0])


def test_4bit_teacher_checks_drafts_and_gives_the_signal(tmp_path, tokenizer, rows, student, teacher):
    pytest.importorskip("bitsandbytes")
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    plain = copy.deepcopy(student)
    trainer, watch = watched(
        tmp_path, student, str(tmp_path / "teacher"), rows, tokenizer, teacher_quantization="4bit", max_steps=1
    )
    trainer.train()
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.teacher.model.modules())
    assert_same_gradients(watch.gradients[0], by_hand(plain, trainer.teacher.model, watch.rows[0])[0], plain)


def test_shares_of_the_mix_are_drawn_per_row(tmp_path, tokenizer, rows, student, teacher):
    many = Dataset.from_list(rows.to_list() * 8)
    trainer, watch = watched(
        tmp_path, student, teacher, many, tokenizer, rollout_mix=EVERYTHING, max_steps=8, max_new_tokens=2,
        per_device_train_batch_size=64,
    )  # fmt: skip
    trainer.train()
    drawn = [row for update in watch.rows for row in update]
    for source in ROLLOUT_SOURCES:  # 512 rows: within four standard deviations
        expected = EVERYTHING[source]
        share = sum(row.source == source for row in drawn) / len(drawn)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn)), source
    for row in drawn:
        if row.source == "teacher":
            assert not any(row.drafted)
        if row.source == "student":
            assert all(row.drafted)


def test_dataset_rows_are_trained_as_they_are_up_to_max_new_tokens(tmp_path, tokenizer, rows, student, teacher):
    trainer, watch = watched(
        tmp_path, student, teacher, rows, tokenizer, rollout_mix={"dataset": 1.0}, kd_weight=0.5, max_new_tokens=6
    )
    trainer.train()
    whole = {row["prompt"]: tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"] for row in rows}
    for row in watch.rows[0]:
        ids = whole[tokenizer.decode(row.student_prompt_ids)]
        assert row.student_prompt_ids + row.completion_ids == ids[: len(row.student_prompt_ids) + 6]


# ---------------------------------------------------------------------------------------------------------- LUPI


@pytest.mark.parametrize("form", ["collator", "column"])
def test_teacher_reads_what_the_student_does_not_and_both_meet_on_the_completion(
    tmp_path, tokenizer, student, teacher, rows, form
):
    plain = copy.deepcopy(student)
    collator = LUPICollator(tokenizer, system_prompt="Know it all.", completion_column="answer")
    if form == "collator":
        dataset, others = Dataset.from_list(FACTS), {"data_collator": collator}
    else:
        dataset, others = rows.map(lambda row: {"teacher_prompt": f"{SENTENCES[0]} {row['prompt']}"}), {}
    trainer, watch = watched(
        tmp_path, student, teacher, dataset, tokenizer, kd_weight=0.5,
        rollout_mix={"speculative": 0.6, "dataset": 0.4}, others=others,
    )  # fmt: skip
    trainer.train()
    assert all(len(row.teacher_prompt_ids) > len(row.student_prompt_ids) + 5 for row in watch.rows[0])
    loss, means = by_hand(plain, teacher, watch.rows[0], kd_weight=0.5)
    assert_same_gradients(watch.gradients[0], loss, plain)
    log = trainer.state.log_history[0]
    assert log["rollout/value_of_privilege"] == pytest.approx(means["privilege"], rel=1e-4)


def test_value_of_privilege_is_measured_on_logging_steps_only(tmp_path, tokenizer, student, teacher, monkeypatch):
    trainer = make_trainer(
        tmp_path, student, teacher, Dataset.from_list(FACTS), tokenizer, max_steps=6, logging_steps=3,
        others={"data_collator": LUPICollator(tokenizer)},
    )  # fmt: skip
    steps = []
    original = trainer._value_of_privilege
    monkeypatch.setattr(
        trainer, "_value_of_privilege", lambda *args: (steps.append(trainer.state.global_step + 1), original(*args))[1]
    )
    trainer.train()
    assert steps == [3, 6]


@pytest.mark.parametrize("language", ["", "_en"])
def test_real_questions_with_long_knowledge_run_from_file_to_student(tmp_path, tokenizer, teacher, language):
    path = KOREAN_CULTURE / f"korean_culture_train_200{language}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    rows = Dataset.from_list(json.loads(path.read_text())).select(range(24))
    collator = LUPICollator(tokenizer, system_prompt="Use the background.", max_prompt_length=240)
    trainer, watch = watched(
        tmp_path, make_model(seed=2, max_position_embeddings=512), teacher, rows, tokenizer, max_steps=3,
        others={"data_collator": collator},
    )  # fmt: skip
    trainer.train()
    for row in (row for update in watch.rows for row in update):
        assert len(row.teacher_prompt_ids) <= 240
        assert row.completion_ids
    assert trainer.state.log_history[0]["rollout/value_of_privilege"] > 0


# ----------------------------------------------------------------------------------------- what is written, and when


def test_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path, tokenizer, rows, teacher):
    def run(folder, seed, **kwargs):
        student = make_model("gpt2", seed=seed, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
        trainer, watch = watched(
            folder, student, teacher, rows, tokenizer, optim="adamw_torch", learning_rate=1e-2, max_steps=4,
            rollout_mix=EVERYTHING, kd_weight=0.8, adaptive=True, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, save_strategy="steps", save_steps=2, max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train(**kwargs)
        return student.state_dict(), [[row.completion_ids for row in update] for update in watch.rows]

    whole, whole_rows = run(tmp_path / "whole", seed=2)
    resumed, rest = run(tmp_path / "resumed", seed=9, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert rest == whole_rows[2:]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_global_random_numbers_play_no_part(tmp_path, tokenizer, rows, teacher):
    written = []
    for seed in (1, 2):
        trainer, watch = watched(
            tmp_path, make_model(seed=2), teacher, rows, tokenizer, train_sampling_strategy="sequential"
        )
        torch.manual_seed(seed)
        trainer.train()
        written.append([row.completion_ids for row in watch.rows[0]])
    assert written[0] == written[1]


def test_rows_change_with_step_and_seed(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer)
    batch = trainer.data_collator(trainer.train_dataset.to_list())

    def write(step):
        trainer._write_batches([batch], "train", step)
        return [row.completion_ids for row in trainer.last_rows]

    first = write(0)
    assert write(0) == first
    assert write(1) != first
    trainer.args.seed += 1
    assert write(0) != first


def test_evaluation_writes_with_the_same_random_numbers_every_time(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, eval_dataset=rows.select(range(5)), per_device_eval_batch_size=2
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    for name in ("eval_loss", "eval_kd", "eval_rollout/acceptance_rate", "eval_rollout/tokens_drafted"):
        assert first[name] == second[name], name
    assert first["eval_loss"] == pytest.approx(first["eval_kd"], rel=1e-6)
    before = first["eval_kd"]
    trainer.args.max_steps, trainer.args.learning_rate = 20, 0.5
    trainer.train()
    assert trainer.evaluate()["eval_kd"] < before
    # Held-out rows need no completion, because none of them is trained on.
    trainer._mixes["train"] = {"dataset": 0.5, "speculative": 0.5}
    # Rows given later are prepared as those at construction are.
    assert trainer.evaluate(rows.select(range(5)))["eval_kd"] == trainer.evaluate()["eval_kd"]


def test_what_is_measured_is_what_is_written(tmp_path, tokenizer, rows, student, teacher):
    prompts = rows.remove_columns("completion")
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, eval_dataset=prompts, rollout_mix={"dataset": 0.9, "student": 0.1}
    )
    assert "eval_ce" not in trainer.evaluate()
    assert {row.source for row in trainer.last_rows} == {"student"}
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, eval_dataset=rows, rollout_mix={"dataset": 1.0}, max_new_tokens=5
    )
    assert trainer.evaluate()["eval_ce"] > 0


def test_completions_that_are_cut_are_counted(tmp_path, tokenizer, rows, student, teacher, caplog):
    make_trainer(tmp_path, student, teacher, rows, tokenizer, rollout_mix={"dataset": 1.0}, max_new_tokens=5)
    assert "8 of 8 completions of the train dataset end at max_new_tokens=5" in caplog.text
    stream = rows.to_iterable_dataset()
    make_trainer(tmp_path, student, teacher, stream, tokenizer, rollout_mix={"dataset": 1.0}, max_new_tokens=5)
    assert "8 of 8 first completions of the train stream end at max_new_tokens=5" in caplog.text


def test_streams_and_messages_and_token_ids(tmp_path, tokenizer, student, teacher, messages_dataset):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": text} for text in SENTENCES]))
    encoded = Dataset.from_list([{"student_prompt_ids": [5, 6, 7], "teacher_prompt_ids": [8, 9]}] * 4)
    for dataset in (stream, messages_dataset, encoded):
        trainer, watch = watched(
            tmp_path, copy.deepcopy(student), teacher, dataset, tokenizer, per_device_train_batch_size=4
        )
        trainer.train()
        assert all(row.completion_ids for row in watch.rows[0])
    assert watch.rows[0][0].student_prompt_ids == [5, 6, 7]
    assert watch.rows[0][0].teacher_prompt_ids == [8, 9]


# -------------------------------------------------------------------------------------------------------- metrics


def test_logged_rates_are_those_of_the_blocks(tmp_path, tokenizer, rows, student, teacher, monkeypatch):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, max_steps=2, logging_steps=2, adaptive=True)
    blocks = []
    original = RolloutMeans.add
    monkeypatch.setattr(
        RolloutMeans, "add", lambda self, stats, *args: (blocks.append(stats.blocks), original(self, stats, *args))
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    _, draft_length, drafted, accepted, corrected = (torch.cat(column).double() for column in zip(*blocks, strict=True))
    expected = {
        "acceptance_rate": accepted.sum() / drafted.sum(),
        "first_token_acceptance": (accepted > 0).double().mean(),
        "full_block_rate": (accepted == drafted).double().mean(),
        "draft_length_mean": draft_length.mean(),
        "draft_length_min": draft_length.min(),
        "draft_length_max": draft_length.max(),
        "draft_length_std": draft_length.std(correction=0),
        "tokens_drafted": drafted.sum(),
        "tokens_accepted": accepted.sum(),
        "tokens_corrected": corrected.sum(),
    }
    for name, value in expected.items():
        assert log[f"rollout/{name}"] == pytest.approx(float(value), rel=1e-5), name
    assert log["rollout/tokens_per_second"] > 0


def test_samples_are_printed_and_reach_tensorboard(tmp_path, tokenizer, rows, student, teacher, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, max_steps=2, report_to=["tensorboard"], rollout_mix=EVERYTHING
    )
    trainer.add_callback(RolloutSamplesCallback(trainer, steps=2, num_samples=3))
    trainer.train()
    assert "rollout/samples, step 2" in capsys.readouterr().out
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert "rollout/acceptance_rate" in {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    text = events.Tensors("rollout/samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert len(text.splitlines()) == 2 + 3
    for row in trainer.last_rows[:3]:
        assert row.source in text


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_samples_reach_trackers_as_a_table(tmp_path, tokenizer, rows, student, teacher, monkeypatch, tracker):
    """The trackers themselves are not installed: what they are called with is what counts."""
    logged = []
    fake = types.SimpleNamespace(
        run=object(), Table=lambda **kwargs: kwargs, log=lambda table, **_: logged.append(table)
    )
    monkeypatch.setitem(sys.modules, tracker, fake)
    monkeypatch.setattr(f"hf_distill.callbacks.is_{tracker}_available", lambda: True)
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, max_steps=1)
    trainer.add_callback(RolloutSamplesCallback(trainer, steps=1, num_samples=3))
    trainer.args.report_to = [tracker]
    trainer.train()
    ((name, table),) = logged[0].items()
    assert name == "rollout/samples"
    if tracker == "wandb":
        assert table["columns"] == ["step", "source", "prompt", "completion"]
        assert len(table["data"]) == 3
    else:
        assert list(table["dataframe"]["source"]) == ["speculative"] * 3


def test_debugging_logs_every_block(tmp_path, tokenizer, rows, student, teacher, caplog):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, rollout_debug=True)
    with caplog.at_level("INFO", logger="hf_distill"):
        trainer.train()
    lines = [record.message for record in caplog.records if "accepted" in record.message]
    assert len([line for line in lines if "->" in line]) == trainer.state.log_history[0]["rollout/tokens_corrected"]


def test_model_card_says_how_the_text_was_written(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(
        tmp_path, student, teacher, rows, tokenizer, rollout_mix={"speculative": 0.7, "dataset": 0.3}
    )
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "speculative 0.7, dataset 0.3" in card
    assert "2410.11325" in card


# -------------------------------------------------------------------------------------------------------- bad input


def no_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    return tokenizer


CONFIGS = {
    "top_k has to be at least 1": {"top_k": 0},
    "top_k=1000 is more than the vocabulary": {"top_k": 1000},
    "draft_length has to be at least 1": {"draft_length": 0},
    "min_prob": {"min_prob": 1.5},
    "student_temperature": {"student_temperature": -1.0},
    "teacher_top_p": {"teacher_top_p": 0.0},
    "rollout_mix has to give": {"rollout_mix": {"students": 1.0}},
    "not all of them 0": {"rollout_mix": {"student": 0.0}},
    "rollout_batch_size": {"rollout_batch_size": 0},
    "max_length=512 is not used": {"max_length": 512},
    "skip_prepare_dataset is not possible": {"dataset_kwargs": {"skip_prepare_dataset": True}},
    "do not fit the student's 256 positions": {"max_new_tokens": 250},
    "only the sources teacher and dataset have any": {"kd_weight": 0.5},
    "rollout_mix has to give the sources": {"rollout_mix": {"student": "0.7"}},
    "group_by_length is not possible": {"train_sampling_strategy": "group_by_length"},
    "assistant_only_loss=True are not possible": {"assistant_only_loss": True},
    "has no completion": {"rollout_mix": {"dataset": 1.0}},
    "kd_weight": {"kd_weight": 2.0},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_bad_settings_are_refused_at_construction(tmp_path, tokenizer, student, teacher, message):
    rows = Dataset.from_dict({"prompt": SENTENCES})
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, **CONFIGS[message])


@pytest.mark.parametrize("field", ["packing", "padding_free", "eval_packing"])
def test_packing_is_refused_in_words(tmp_path, field):
    with pytest.raises(ValueError, match="packing and padding_free are not possible with rollouts"):
        SpeculativeKDConfig(**settings(tmp_path, **{field: True}))


def test_stretched_positions_count_for_prompts(tmp_path, tokenizer, teacher):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    stretched, other = (make_model(seed=seed, rope_parameters=yarn) for seed in (3, 4))
    rows = Dataset.from_dict({"prompt": SENTENCES})
    with pytest.raises(ValueError, match="do not fit the student's 512 positions"):
        make_trainer(tmp_path, stretched, other, rows, tokenizer, max_new_tokens=506)
    with pytest.raises(ValueError, match="do not fit the teacher's 256 positions"):
        make_trainer(tmp_path, stretched, teacher, rows, tokenizer, max_new_tokens=250)


def test_prompts_end_where_a_rotary_embedding_changes(tmp_path, tokenizer):
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    scaled, other = make_model(seed=3, rope_parameters=dynamic), make_model(seed=4, max_position_embeddings=512)
    rows = Dataset.from_dict({"prompt": SENTENCES})
    for side, models in (("student", (scaled, other)), ("teacher", (other, scaled))):
        with pytest.raises(ValueError, match=rf"do not fit the {side}'s 256 positions \(with longrope or dynamic"):
            make_trainer(tmp_path, *models, rows, tokenizer, max_new_tokens=250)


ROWS = {
    "row 1 of the train dataset has no prompt": [{"prompt": "The"}, {"prompt": ""}],
    "the train dataset is empty": [],
    "row 0 of the train dataset has no prompt: .* has the columns text": [{"text": "The"}],
}


@pytest.mark.parametrize("message", ROWS)
def test_bad_rows_are_named(tmp_path, tokenizer, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, student, teacher, Dataset.from_list(ROWS[message]), tokenizer)


def test_rows_with_and_without_a_completion_may_be_mixed_where_none_is_needed(tmp_path, tokenizer, student, teacher):
    rows = [{"prompt": "The", "completion": None}, {"prompt": "A", "completion": " dog"}]
    for order in (1, -1):
        trainer = make_trainer(tmp_path, student, teacher, Dataset.from_list(rows[::order]), tokenizer)
        assert [len(ids) > 0 for ids in trainer.train_dataset["completion_ids"]] == [False, True][::order]
    with pytest.raises(ValueError, match="row 1 of the train dataset has no completion"):
        make_trainer(tmp_path, student, teacher, Dataset.from_list(rows[::-1]), tokenizer, rollout_mix={"dataset": 1.0})


def test_no_end_of_text_anywhere_is_refused(tmp_path, tokenizer, rows, student, teacher):
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    for model in (student, teacher):
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    with pytest.raises(ValueError, match="have an end-of-sequence token"):
        make_trainer(tmp_path, student, teacher, rows.remove_columns("completion"), bare)


def test_a_text_ends_where_either_model_ends_one(tmp_path, tokenizer, rows, student, teacher):
    teacher.generation_config.eos_token_id = [1, 7]
    assert make_trainer(tmp_path, student, teacher, rows, tokenizer).eos_token_ids == [1, 7]


def test_a_tokenizer_without_a_padding_token_and_another_ones_collator(tmp_path, tokenizer, student, teacher):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    collator = LUPICollator(bare)
    trainer = make_trainer(
        tmp_path, student, teacher, Dataset.from_list(FACTS), bare, others={"data_collator": collator}
    )
    trainer.train()
    other = LUPICollator(make_tokenizer(added_tokens=("<more>",)))
    with pytest.raises(ValueError, match="another tokenizer than the trainer"):
        make_trainer(tmp_path, student, teacher, Dataset.from_list(FACTS), tokenizer, others={"data_collator": other})


def test_the_student_writes_in_the_precision_it_is_trained_in(tmp_path, tokenizer, rows, student, teacher):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, bf16=True)
    seen = {}
    for side, model in {"student": trainer.student, "teacher": teacher}.items():

        def record(module, args, output, side=side):
            seen[side] = output.dtype

        model.model.layers[0].self_attn.q_proj.register_forward_hook(record)
    trainer._write_batches([trainer.data_collator(trainer.train_dataset.to_list()[:2])], "train", 0)
    assert seen == {"student": torch.bfloat16, "teacher": torch.float32}


def test_hidden_states_that_wait_for_the_update_hold_no_padding(
    tmp_path, tokenizer, rows, student, teacher, monkeypatch
):
    trainer = make_trainer(tmp_path, student, teacher, rows, tokenizer, max_new_tokens=100)
    batch = trainer.data_collator(trainer.train_dataset.to_list()[:4])
    monkeypatch.setattr(trainer, "_training_batch", lambda rows: rows)
    (written,) = trainer._write_batches([batch], "train", 0)
    found = [row.evidence["hidden"] for row in written]
    storages = {hidden.untyped_storage().data_ptr(): hidden for hidden in found}
    total = sum(hidden.untyped_storage().nbytes() for hidden in storages.values())
    assert total == sum(len(row.completion_ids) for row in written) * 48 * 4


def test_samples_keep_characters_of_several_tokens_together(tokenizer):
    ids = tokenizer("가나", add_special_tokens=False)["input_ids"]
    row = Row([5], [5], ids, "speculative", [i % 2 == 0 for i in range(len(ids))])
    assert len(ids) > 3
    assert "".join(text for _, text in _sample(row, tokenizer)[2]) == "가나"


def test_other_refusals(tmp_path, tokenizer, rows, student, teacher, messages_dataset):
    with pytest.raises(ValueError, match="different vocabularies"):
        SpeculativeKDTrainer(
            student, teacher, SpeculativeKDConfig(**settings(tmp_path)), rows, None, tokenizer,
            teacher_processing_class=make_tokenizer(corpus=[s[::-1] for s in SENTENCES]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="no chat template"):
        make_trainer(tmp_path, student, teacher, messages_dataset, no_template(tokenizer))
    with pytest.raises(ValueError, match="row 0 of the train dataset has no 'knowledge'"):
        make_trainer(
            tmp_path, student, teacher, Dataset.from_list([{"query": "a", "knowledge": ""}]), tokenizer,
            others={"data_collator": LUPICollator(tokenizer)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="data_collator has to make prompts"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, others={"data_collator": lambda rows: rows})
    with pytest.raises(ValueError, match="formatting_func is not used"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer, others={"formatting_func": str})
    with pytest.raises(ValueError, match="has to be a SpeculativeKDConfig"):
        SpeculativeKDTrainer(student, teacher, "speculative", rows)
    with pytest.raises(ValueError, match="steps and num_samples"):
        RolloutSamplesCallback(None, 0)
    with pytest.raises(ValueError, match="writes no text"):
        RolloutSamplesCallback(object(), 1)


def test_a_model_with_a_state_that_cannot_be_rewound_is_refused(tmp_path, tokenizer, rows, teacher):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    student = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match="cannot take back what it has read"):
        make_trainer(tmp_path, student, teacher, rows, tokenizer)
