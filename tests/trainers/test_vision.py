"""Vision-language students and teachers, against dense losses of the models' own logits, computed without a trainer.

Shapes: B batch, T tokens, V vocabulary.
"""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from hf_distill import KDConfig, KDTrainer
from hf_distill.modeling import decoder_layers, hidden_widths, last_hidden_states, vision_tower
from hf_distill.teachers.own_view import OwnViewTeacher
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig
from hf_distill.trainers.pictures import picture_rows
from tests.trainers.test_kd import settings
from tests.vision import (
    FAMILIES,
    IMAGE_ID,
    LINE_BREAKS,
    NEEDS_5_18,
    PICTURE_IDS,
    PROCESSED,
    HandMade,
    chats,
    make_processor,
    make_tokenizer,
    make_vlm,
    questions,
    tokenised,
)

HAND_MADE = sorted(FAMILIES.keys() - set(PROCESSED))
RATE, KD_WEIGHT = 0.1, 0.7


def make_trainer(folder, family, rows, student=None, teacher=None, trainer_settings=None, **changes) -> KDTrainer:
    """A trainer of a family, with its processor or with inputs made by hand."""
    if family in PROCESSED:
        own = {"processing_class": make_processor(family)}
    else:
        own = {"processing_class": make_tokenizer(), "data_collator": HandMade(family)}
        changes |= {"remove_unused_columns": False}
    return KDTrainer(
        student or make_vlm(family, 1), teacher or make_vlm(family, 2),
        KDConfig(**settings(folder, kd_weight=KD_WEIGHT, learning_rate=RATE, **changes)),
        train_dataset=rows, teacher_processing_class=own["processing_class"], **own, **(trainer_settings or {}),
    )  # fmt: skip


def rows_of(family, number=4, seed=0):
    return chats(number, seed) if family in PROCESSED else tokenised(number, seed)


def processed(family, rows) -> dict[str, Tensor]:
    """A batch that the processor makes of whole texts, with labels on all tokens but pictures and padding."""
    if family not in PROCESSED:
        batch = HandMade(family)(list(rows))
    else:
        processor = make_processor(family)
        place = "<boi>" if family == "gemma3" else "<image>"
        texts = [
            f"<|user|>{place}{row['messages'][0]['content']}<eos><|assistant|>{row['messages'][1]['content']}<eos>"
            for row in rows
        ]
        images, options = [row["images"] for row in rows], {"padding": True, "padding_side": "right"}
        batch = dict(processor(images=images, text=texts, return_tensors="pt", **options))
    ids = batch["input_ids"]
    pictures = PICTURE_IDS | (LINE_BREAKS if family == "smolvlm" else set())
    is_text = batch["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(sorted(pictures)))
    return {**batch, "labels": ids.masked_fill(~is_text, -100)}


def dense_update(student, teacher, batch, trained) -> dict[str, Tensor]:
    """The parameters of `trained` names after one step of SGD on the dense loss of both models' own logits."""
    student, batch = copy.deepcopy(student), dict(batch)
    labels = batch.pop("labels")[:, 1:]
    logits = student(**batch).logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)
    with torch.no_grad():
        targets = teacher(**batch).logits[:, :-1].log_softmax(-1)
    kd = (targets.exp() * (targets - logits)).sum(-1)
    ce = -logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    counts = labels != -100
    loss = ((KD_WEIGHT * kd + (1 - KD_WEIGHT) * ce) * counts).sum() / counts.sum()
    named = {name: parameter for name, parameter in student.named_parameters() if name in trained}
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: (parameter - RATE * (0 if gradient is None else gradient)).detach()
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Updates, not weights, are equal to 1e-5 of the whole update."""
    whole = torch.cat([(expected[name] - before[name]).flatten() for name in expected]).norm()
    assert whole > 1e-4
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-5 * whole, name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_is_that_of_dense_losses_of_the_models_own_logits(tmp_path, family):
    rows, student, teacher = rows_of(family), make_vlm(family, 1), make_vlm(family, 2)
    trainer = make_trainer(tmp_path, family, rows, copy.deepcopy(student), copy.deepcopy(teacher))
    trained = {name for name, parameter in trainer.student.named_parameters() if parameter.requires_grad}
    tower = vision_tower(student)[0]
    assert trained
    assert not any(name.startswith(tower) for name in trained)
    trainer.train()
    before = dict(student.named_parameters())
    after = dict(trainer.student.named_parameters())
    assert_same(after, dense_update(student, teacher, processed(family, rows), trained), before)
    for name in before.keys() - trained:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("freezes", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_no_backward_goes_through_a_frozen_tower(tmp_path, family, freezes):
    found = {}
    for checkpoints in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path, family, rows_of(family), gradient_checkpointing=checkpoints, freeze_vision_tower=freezes
        )
        seen = []
        tower = vision_tower(trainer.student)[1]
        tower.register_forward_hook(lambda *found, seen=seen: seen.append(found[-1].last_hidden_state.requires_grad))
        trainer.train()
        assert seen == [not freezes]
        found[checkpoints] = dict(trainer.student.named_parameters())
    assert_same(found[True], found[False], dict(make_vlm(family, 1).named_parameters()))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "qwen2_5_vl", "llama4"])
def test_a_tower_that_is_not_frozen_learns_as_in_dense_losses(tmp_path, family):
    rows, student, teacher = rows_of(family), make_vlm(family, 1), make_vlm(family, 2)
    trainer = make_trainer(
        tmp_path, family, rows, copy.deepcopy(student), copy.deepcopy(teacher), freeze_vision_tower=False
    )
    trainer.train()
    before, after = dict(student.named_parameters()), dict(trainer.student.named_parameters())
    assert_same(after, dense_update(student, teacher, processed(family, rows), set(before)), before)
    tower = vision_tower(student)[0]
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(tower))


@pytest.mark.parametrize("family", ["idefics3", "llava_onevision", "qwen3_vl", "mllama", "lfm2_vl"])
def test_a_batch_of_four_is_two_times_two(tmp_path, family):
    found = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path / str(size), family, rows_of(family), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )  # fmt: skip
        trainer.train()
        found.append(dict(trainer.student.named_parameters()))
    assert_same(found[1], found[0], dict(make_vlm(family, 1).named_parameters()))


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "qwen2_5_vl", "llama4"])
def test_checkpointing_changes_no_update(tmp_path, family):
    found = []
    for checkpoints in (False, True):
        trainer = make_trainer(tmp_path, family, rows_of(family), gradient_checkpointing=checkpoints)
        trainer.train()
        found.append(dict(trainer.student.named_parameters()))
    assert_same(found[1], found[0], dict(make_vlm(family, 1).named_parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_picture_changes_what_follows_it_in_its_row_alone(tmp_path, family):
    rows = rows_of(family)
    trainer = make_trainer(tmp_path, family, rows)
    if family in PROCESSED:
        second = chats(4, seed=500)[1]["images"]
        both = [[dict(row) for row in rows] for _ in range(2)]
        both[1][1]["images"] = second
    else:
        both = [list(rows), [{**row, "picture": row["picture"] + 900 * (i == 1)} for i, row in enumerate(rows)]]
    hidden = []
    for each in both:
        inputs, _, _ = trainer.take_labels(trainer.batch_collator()(each))
        everywhere = torch.arange(inputs["input_ids"].numel())
        shape = (*inputs["input_ids"].shape, -1)
        with torch.no_grad():
            sides = [last_hidden_states(trainer.student.eval(), **inputs), trainer.teacher(inputs, everywhere).hidden]
        hidden.append([side.view(shape) for side in sides])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    place = (ids[1] == IMAGE_ID).nonzero()[0].item()
    last = mask[1].sum().item() - 1
    for one, other in zip(*hidden, strict=True):
        moved = (one - other).abs().amax(-1)  # (B, T)
        assert moved[[0, 2, 3]].max() <= 1e-5
        if family != "mllama":  # whose text before a picture attends to all of it, with equal weights
            assert moved[1, :place].max() <= 1e-5
        assert moved[1, last] > 1e-4
        assert moved[1, place] > 1e-4


@pytest.mark.parametrize("family", [family for family in PROCESSED if family != "mllama"])
def test_prompts_and_pictures_bear_no_label(tmp_path, family):
    trainer = make_trainer(tmp_path, family, questions(3))
    batch = trainer.batch_collator()(list(questions(3)))
    tokenizer = trainer.tokenizer
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], questions(3), strict=True):
        answer = tokenizer(row["completion"][0]["content"] + "<eos>")["input_ids"]
        assert labels[labels != -100].tolist() == answer
        assert set(ids[labels != -100].tolist()).isdisjoint(PICTURE_IDS)


@NEEDS_5_18
@pytest.mark.parametrize("family", ["idefics3", "mllama"])
def test_answers_alone_bear_labels_if_asked(tmp_path, family):
    trainer = make_trainer(tmp_path, family, chats(3), assistant_only_loss=True)
    batch = trainer.batch_collator()(list(chats(3)))
    for labels, row in zip(batch["labels"], chats(3), strict=True):
        answer = trainer.tokenizer(row["messages"][1]["content"] + "<eos>")["input_ids"]
        assert labels[labels != -100].tolist() == answer


def test_the_frozen_tower_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_distill")
    make_trainer(tmp_path, "gemma3", chats())
    assert "model.vision_tower (4,976 parameters) is frozen; freeze_vision_tower=False trains it" in caplog.text
    assert "train: pictures take 24 of 94 tokens in the first 4 rows; none of these bears a label" in caplog.text


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "qwen2_5_vl"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_go_to_the_language_part_alone(tmp_path, family, targets):
    config = LoraConfig(r=2, target_modules=targets)
    trainer = make_trainer(tmp_path, family, rows_of(family), trainer_settings={"peft_config": config})
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    language = "text_model" if family == "idefics3" else "language_model"
    assert trained
    assert all(f"model.{language}." in name for name in trained)
    assert config.exclude_modules is None  # the caller's own
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(trained)
    assert any(not torch.equal(before[name], after[name]) for name in trained)


@pytest.mark.parametrize("targets", [["q_proj", "modality_projection.proj"], r".*\.(q_proj|modality_projection\.proj)"])
def test_adapters_go_where_they_are_named_but_to_the_tower(tmp_path, targets):
    config = LoraConfig(r=2, target_modules=targets)
    trainer = make_trainer(tmp_path, "idefics3", chats(), trainer_settings={"peft_config": config})
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("connector.modality_projection.proj" in name for name in trained)
    assert any("text_model" in name for name in trained)
    assert not any("vision_model" in name for name in trained)


def test_an_adapter_of_the_head_is_refused_as_that_of_a_text_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, "idefics3", chats(), trainer_settings={"peft_config": config})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_grid_without_the_kinds_of_tokens_is_refused(tmp_path, family):
    collator = HandMade(family)

    def without(rows):
        return {name: each for name, each in collator(rows).items() if name != "mm_token_type_ids"}

    trainer = make_trainer(tmp_path, family, tokenised())
    trainer.data_collator = without
    with pytest.raises(ValueError, match="image_grid_thw and no mm_token_type_ids"):
        trainer.train()


def test_one_process_does_not_hand_out_pixels(tmp_path):
    """Streams of an evaluation beside rows that can be counted; of training rows that are a stream TRL sees to it."""
    trainer = make_trainer(tmp_path, "idefics3", chats())
    assert trainer.accelerator.dataloader_config.dispatch_batches is False
    with pytest.raises(ValueError, match="dispatch_batches=True cuts the pixels of a batch"):
        make_trainer(tmp_path, "idefics3", chats(), accelerator_config={"dispatch_batches": True})


@pytest.mark.parametrize("is_stream", [False, True])
def test_rows_without_a_picture_are_refused_where_the_tower_is_spread(tmp_path, is_stream, monkeypatch):
    rows = [*chats(3), {**chats(1)[0], "images": []}]
    dataset = Dataset.from_list(rows, features=chats(1).features)
    dataset = dataset.to_iterable_dataset() if is_stream else dataset
    args = KDConfig(**settings(tmp_path))
    list(picture_rows(dataset, "train", args))
    monkeypatch.setattr(KDConfig, "world_size", 2)
    list(picture_rows(dataset, "train", args))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="row 3 of the train dataset has no picture: the tower is spread"):
        list(picture_rows(dataset, "train", args))


def test_adapters_go_everywhere_if_the_tower_may_learn(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(
        tmp_path, "gemma3", chats(), trainer_settings={"peft_config": config}, freeze_vision_tower=False
    )
    assert any("vision_tower" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["idefics3", "gemma3", "llama4", "mllama"])
def test_layers_are_those_of_the_language_part_if_the_tower_is_as_deep(family):
    model = make_vlm(family)
    depth = model.config.get_text_config().num_hidden_layers
    config = copy.deepcopy(FAMILIES[family])
    FAMILIES[family]["vision"] = {**config["vision"], "num_hidden_layers": depth}
    try:
        model = make_vlm(family)
    finally:
        FAMILIES[family] = config
    name, layers = decoder_layers(model)
    assert len(layers) == depth
    assert "vision" not in name
    if family in ("llama4", "mllama"):  # which do not return the hidden states of all their layers
        with pytest.raises(ValueError, match="does not return its hidden states, which hidden_weight compares"):
            hidden_widths(model, range(depth), "student")
    else:
        assert hidden_widths(model, range(depth), "student") == dict.fromkeys(range(depth), 32)


def test_hidden_layers_of_the_language_parts_are_compared(tmp_path):
    trainer = make_trainer(tmp_path, "idefics3", chats(), hidden_weight=1.0, hidden_layers="uniform")
    trainer.train()
    assert trainer.state.log_history[0]["hidden"] > 0


def test_a_teacher_in_bfloat16_gets_pixels_in_bfloat16(tmp_path):
    for family in ("smolvlm", "gemma3", "llava_onevision", "internvl", "llama4", "mllama", "qwen3_vl", "lfm2_vl"):
        teacher = make_vlm(family, 2).to(torch.bfloat16)
        trainer = make_trainer(tmp_path / family, family, rows_of(family), teacher=teacher)
        trainer.train()
        assert trainer.state.log_history[0]["kd"] > 0


def test_several_teachers_see_one_batch(tmp_path):
    teachers = [make_vlm("idefics3", seed) for seed in (2, 3)]
    found = {}
    for combination in ("mixture", "sum"):
        trainer = KDTrainer(
            make_vlm("idefics3", 1), teachers, KDConfig(**settings(tmp_path, teacher_combination=combination)),
            train_dataset=chats(), processing_class=make_processor("idefics3"),
        )  # fmt: skip
        trainer.train()
        found[combination] = trainer.state.log_history[0]["kd"]
    batch = processed("idefics3", chats())
    labels = batch.pop("labels")[:, 1:]
    counts = labels != -100
    with torch.no_grad():
        student, *sides = (
            model(**batch).logits[:, :-1].log_softmax(-1) for model in (make_vlm("idefics3", 1), *teachers)
        )
    mixture = (sides[0].exp() / 2 + sides[1].exp() / 2).log()
    expected = {
        "mixture": (mixture.exp() * (mixture - student)).sum(-1),
        "sum": sum((side.exp() * (side - student)).sum(-1) for side in sides) / 2,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx((value * counts).sum().item() / counts.sum().item(), rel=1e-4)


def test_the_students_base_is_its_teacher(tmp_path):
    trainer = KDTrainer(
        make_vlm("gemma3", 1), "base", KDConfig(**settings(tmp_path, learning_rate=1.0, max_steps=2)),
        train_dataset=chats(), processing_class=make_processor("gemma3"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(0, abs=1e-6)


def test_a_baseline_on_hard_labels_has_the_same_rows(tmp_path):
    trainer = HardLabelTrainer(
        make_vlm("idefics3", 1), HardLabelConfig(**settings(tmp_path)), chats(), chats(),
        processing_class=make_processor("idefics3"),
    )  # fmt: skip
    batch = processed("idefics3", chats())
    labels = batch["labels"][:, 1:]
    logits = make_vlm("idefics3", 1)(**{n: v for n, v in batch.items() if n != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert trainer.evaluate()["eval_ce"] == pytest.approx(expected, rel=1e-5)


@NEEDS_5_18
def test_models_and_processors_given_by_path_are_loaded_whole(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        make_vlm("idefics3", seed).save_pretrained(tmp_path / name)
        make_processor("idefics3", do_image_splitting=name == "teacher").save_pretrained(tmp_path / name)
    trainer = KDTrainer(
        str(tmp_path / "student"), str(tmp_path / "teacher"), KDConfig(**settings(tmp_path / "out")), chats(), chats()
    )
    assert type(trainer.student).__name__ == type(trainer.teacher.model).__name__ == "Idefics3ForConditionalGeneration"
    assert isinstance(trainer.teacher, OwnViewTeacher)
    trainer.train()
    trainer.save_model()
    again = KDTrainer(
        str(tmp_path / "out"), str(tmp_path / "teacher"), KDConfig(**settings(tmp_path / "more")), chats(), chats()
    )
    assert again.evaluate()["eval_kd"] == pytest.approx(trainer.evaluate()["eval_kd"], rel=1e-5)


def test_a_folder_of_adapters_is_trained_on(tmp_path):
    make_vlm("gemma3", 1).save_pretrained(tmp_path / "student")
    make_processor("gemma3").save_pretrained(tmp_path / "student")
    config = LoraConfig(r=2, target_modules="all-linear")
    found = []
    for model, adapters, out in (("student", config, "out"), ("out", None, "on")):
        trainer = KDTrainer(
            str(tmp_path / model), make_vlm("gemma3", 2), KDConfig(**settings(tmp_path / out)), chats(), chats(),
            peft_config=adapters, processing_class=make_processor("gemma3"),
        )  # fmt: skip
        if adapters is None:
            found.append(trainer.evaluate()["eval_kd"])
        trainer.train()
        trainer.save_model()
        found.append(trainer.evaluate()["eval_kd"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] < found[1]
