"""Teachers with a processor of their own: what they read, which tokens are compared, and what is refused."""

import copy
import pickle

import pytest
import torch
from transformers import TrainerCallback

from hf_distill import KDConfig, KDTrainer
from hf_distill.modeling import PictureSpans, picture_tokens
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.own_view import OwnViewTeacher, makes_the_same, text_lines, text_places
from hf_distill.trainers import pictures
from tests.trainers.test_kd import settings
from tests.vision import PICTURE_IDS, chats, make_processor, make_tokenizer, make_vlm, questions


def distil(folder, rows, teacher="idefics3", processor=None, student="idefics3", **changes):
    """A student that sees a picture in 4 tokens, and a teacher that sees it in 5 parts of 4."""
    processor = processor or make_processor(teacher, do_image_splitting=True)
    return KDTrainer(
        make_vlm(student, 1), make_vlm(teacher, 2), KDConfig(**settings(folder, kd_weight=1.0, **changes)),
        train_dataset=rows, processing_class=make_processor(student), teacher_processing_class=processor,
    )  # fmt: skip


class StopAt(TrainerCallback):
    """Stops a run after an update, as if it was killed there."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def texts_of(family, rows, **split):
    """A batch of whole texts by a processor, and its places of text as (row, place)."""
    processor = make_processor(family, **split)
    place = "<boi>" if family == "gemma3" else "<image>"
    texts = [
        f"<|user|>{place}{row['messages'][0]['content']}<eos><|assistant|>{row['messages'][1]['content']}<eos>"
        for row in rows
    ]
    batch = dict(processor(images=[row["images"] for row in rows], text=texts, padding=True, return_tensors="pt"))
    blank = processor.tokenizer("\n")["input_ids"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return batch, [
        [t for t in range(ids.shape[1]) if mask[i, t] and ids[i, t].item() not in {*PICTURE_IDS, *blank}]
        for i in range(len(ids))
    ]


@pytest.mark.parametrize(("student", "teacher"), [("idefics3", "idefics3"), ("smolvlm", "llava_onevision")])
def test_the_divergence_is_that_of_both_views_matched_by_rank(tmp_path, student, teacher):
    rows = chats()
    split = {"do_image_splitting": True} if teacher == "idefics3" else {}
    trainer = distil(tmp_path, rows, teacher, make_processor(teacher, **split), student)
    assert isinstance(trainer.teacher, OwnViewTeacher)
    trainer.train()
    sides = []
    for family, seed, settings_ in ((student, 1, {}), (teacher, 2, split)):
        batch, places = texts_of(family, rows, **settings_)
        with torch.no_grad():
            logits = make_vlm(family, seed)(**batch).logits.log_softmax(-1)
        # The token before a text token predicts it, be it text or the end of a picture.
        sides.append(torch.cat([logits[i, [t - 1 for t in row if t > 0]] for i, row in enumerate(places)]))
    mine, theirs = sides
    expected = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rows", [chats, questions])
def test_each_side_reads_its_own_pixels_and_no_other(tmp_path, rows):
    trainer = distil(tmp_path, rows(2))
    batch = trainer.batch_collator()(list(rows(2)))
    assert batch["pixel_values"].shape[1] == 1
    assert batch["teacher_0_pixel_values"].shape[1] == 5
    inputs, positions, labels = trainer.take_labels(batch)
    own, own_positions = trainer.teacher.view(inputs, positions)
    assert not any(name.startswith("teacher_") for name in own)
    assert own["pixel_values"].shape[1] == 5
    assert torch.equal(own["input_ids"].flatten()[own_positions + 1], labels)
    trainer.teacher_signal(inputs, positions)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}


def test_collators_can_be_sent_to_workers(tmp_path):
    trainer = distil(tmp_path, chats(2))
    collate = trainer.batch_collator()
    sent = pickle.loads(pickle.dumps(collate))
    mine, theirs = collate(list(chats(2))), sent(list(chats(2)))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert b"weight" not in pickle.dumps(collate)  # no model


def test_two_teachers_have_two_views(tmp_path):
    teachers = [make_vlm("idefics3", 2), make_vlm("llava_onevision", 3)]
    processors = [make_processor("idefics3", do_image_splitting=True), make_processor("llava_onevision")]
    trainer = KDTrainer(
        make_vlm("idefics3", 1), teachers, KDConfig(**settings(tmp_path, kd_weight=1.0)), train_dataset=chats(),
        processing_class=make_processor("idefics3"), teacher_processing_class=processors,
    )  # fmt: skip
    names = set(trainer.batch_collator()(list(chats(2))))
    assert {"pixel_values", "teacher_0_pixel_values", "teacher_1_pixel_values", "teacher_1_image_sizes"} <= names
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0


def test_an_equal_processor_is_shared(tmp_path):
    trainer = distil(tmp_path, chats(), processor=make_processor("idefics3"))
    assert type(trainer.teacher) is LocalTeacher
    assert "teacher_0_input_ids" not in trainer.batch_collator()(list(chats(2)))
    assert makes_the_same(make_processor("gemma3"), make_processor("gemma3"))
    assert not makes_the_same(make_processor("idefics3"), make_processor("idefics3", do_image_splitting=True))
    other = make_processor("idefics3")
    other.image_seq_len = 9
    assert not makes_the_same(make_processor("idefics3"), other)


def test_another_template_of_the_teacher_is_refused_with_both_texts(tmp_path):
    processor = make_processor("idefics3", do_image_splitting=True)
    processor.chat_template = processor.chat_template.replace("<|user|>", "").replace("<|{{", "Say: <|{{")
    with pytest.raises(ValueError, match=r"row 0 of the train dataset .* make different texts of a row, without its"):
        distil(tmp_path, chats(), processor=processor)


def test_other_labels_of_the_same_text_are_refused(tmp_path):
    trainer = distil(tmp_path, questions(2))
    batch = trainer.batch_collator()(list(questions(2)))
    batch["teacher_0_labels"][0] = -100
    inputs, positions, _ = trainer.take_labels(batch)
    with pytest.raises(ValueError, match="the same text of a row, but other tokens of it bear labels"):
        trainer.teacher.view(inputs, positions)


@pytest.mark.parametrize("max_length", [14, 18])
def test_rows_are_cut_at_the_same_token_of_the_text(tmp_path, max_length):
    rows, split = chats(), {"do_image_splitting": True}
    trainer = distil(tmp_path, rows, max_length=max_length)
    trainer.train()
    sides = []
    batch, places = texts_of("idefics3", rows)
    kept = [[place for place in row if place < max_length] for row in places]
    assert [len(row) for row in kept] != [len(row) for row in places]
    for seed, settings_ in ((1, {}), (2, split)):
        batch, places = texts_of("idefics3", rows, **settings_)
        with torch.no_grad():
            logits = make_vlm("idefics3", seed)(**batch).logits.log_softmax(-1)
        places = [row[: len(kept[i])] for i, row in enumerate(places)]
        sides.append(torch.cat([logits[i, [t - 1 for t in row if t > 0]] for i, row in enumerate(places)]))
    mine, theirs = sides
    expected = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(expected, rel=1e-4)
    batch = trainer.batch_collator()(list(rows))
    inputs, positions, _ = trainer.take_labels(batch)
    own, _ = trainer.teacher.view(inputs, positions)
    assert own["input_ids"].shape[1] < batch["teacher_0_input_ids"].shape[1]


def test_the_rest_of_a_text_that_was_not_cut_has_to_be_the_same(tmp_path):
    processor = make_processor("idefics3", do_image_splitting=True)
    processor.chat_template += "more"
    with pytest.raises(ValueError, match=r"make different texts of a row.*It is row 0 of its batch, and begins with"):
        distil(tmp_path, chats(), processor=processor, max_length=100)


def test_the_length_of_a_teacher_is_that_of_its_own_view(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(pictures, "check_length", lambda model, name, length, *_: found.update({name: length}))
    distil(tmp_path, chats())
    sides = [texts_of("idefics3", chats(), **split)[0] for split in ({}, {"do_image_splitting": True})]
    assert found == {"student": sides[0]["input_ids"].shape[1], "teacher": sides[1]["input_ids"].shape[1]}


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    rows, found = chats(8), []
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for stop in steps:
            trainer = distil(
                tmp_path / name, rows, max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2
            )
            if stop == 2:
                trainer.add_callback(StopAt(2))
            trainer.train(resume_from_checkpoint=stop == 4 and len(steps) == 2)
        found.append(copy.deepcopy(trainer.student.state_dict()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ------------------------------------------------------------------------------------------------------------- spans


def test_white_space_belongs_to_a_picture_only_between_its_tokens():
    tokenizer = make_tokenizer()
    spans = PictureSpans({5, 10}, tokenizer)
    blank, word = tokenizer("\n")["input_ids"][0], tokenizer("red")["input_ids"][0]
    ids = torch.tensor([
        [word, blank, 10, 5, blank, blank, 5, blank, word, 5],
        [blank, 5, blank, word, blank, 5, blank, blank, 0, 0],
        [blank] * 10,
    ])  # fmt: skip
    # A loop over each token: one of a picture, or blank with a picture as the nearest other on both sides.
    expected = []
    for row in ids.tolist():
        for place, token in enumerate(row):
            before = next((t for t in reversed(row[:place]) if t != blank), None)
            after = next((t for t in row[place + 1 :] if t != blank), None)
            expected.append(token in (5, 10) or (token == blank and before in (5, 10) and after in (5, 10)))
    assert spans(ids).flatten().tolist() == expected
    assert spans(ids)[0].tolist() == [False, False, True, True, True, True, True, False, False, True]


def test_lines_of_text_are_in_order_without_pictures_and_padding():
    tokenizer = make_tokenizer()
    word = tokenizer("red")["input_ids"][0]
    ids = torch.tensor([[5, word, word + 1, 5, word + 2, 0], [word, 5, 5, 5, 5, word + 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    places = text_places({"input_ids": ids, "attention_mask": mask}, PictureSpans({5}, tokenizer))
    lines = text_lines(ids, places)
    assert lines.tolist() == [[word, word + 1, word + 2], [word, word + 3, -1]]


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "gemma3", "llava_onevision"])
def test_the_tokens_of_a_picture_are_those_that_a_processor_adds(family):
    processor = make_processor(family)
    tokenizer = processor.tokenizer
    mark = "<boi>" if family == "gemma3" else "<image>"
    image = chats(1)[0]["images"]
    ids = processor(images=[image], text=[f"red{mark}blue"], return_tensors="pt")["input_ids"][0].tolist()
    inside = ids[len(tokenizer("red")["input_ids"]) : -len(tokenizer("blue")["input_ids"])]
    blank = set(tokenizer("\n")["input_ids"]) | set(tokenizer("\n\n")["input_ids"])
    assert set(inside) - blank <= picture_tokens(processor, make_vlm(family).config, tokenizer=tokenizer)
