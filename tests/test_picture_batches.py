"""Batches of rows with pictures: labels, ends of plain text, transforms, formats, and rows that fill up a batch."""

import base64
import io
import os

import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import ExifTags, Image
from tokenizers.processors import TemplateProcessing

from hf_distill.modeling import PictureSpans, picture_tokens
from hf_distill.picture_batches import FILLER, MaskedPictures, as_trl_reads, with_fillers
from hf_distill.picture_rows import relative_to, with_pictures
from tests.test_picture_rows import ANSWER, ASK, PLACE, TEXT, distil, files, png, table
from tests.vision import (
    IMAGE_ID,
    PICTURE_IDS,
    HandMade,
    chats,
    make_processor,
    make_tokenizer,
    picture,
    questions,
    tokenised,
)

# ------------------------------------------------------------------------------------------------- tokens of pictures


def test_tokens_that_no_setting_names_are_found_in_what_the_processor_writes():
    """SmolVLM's processor writes the places of tiles itself."""
    processor = make_processor("smolvlm", do_image_splitting=True, size={"longest_edge": 64})
    assert not any("row_col" in name for name in vars(processor))
    assert picture_tokens(processor, tokenizer=processor.tokenizer) >= PICTURE_IDS - {
        processor.tokenizer.convert_tokens_to_ids(token) for token in ("<boi>", "<eoi>")
    }


def test_places_of_tiles_bear_no_label(tmp_path):
    processor = make_processor("smolvlm", do_image_splitting=True, size={"longest_edge": 64})
    rows = chats(3)
    trainer = distil(tmp_path, rows, "smolvlm", processing_class=processor)
    batch = trainer.batch_collator()(list(rows))
    tiles = {processor.tokenizer.convert_tokens_to_ids(f"<row_{i}_col_{j}>") for i in (1, 2) for j in (1, 2)}
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        ask, answer = (message["content"] for message in row["messages"])
        text = f"<|user|>{ask}<eos><|assistant|>{answer}<eos>"
        assert tiles <= set(ids.tolist())
        assert labels[labels != -100].tolist() == processor.tokenizer(text)["input_ids"]


def test_two_grids_of_tiles_make_one_text(tmp_path):
    """A teacher that divides pictures otherwise reads the same text."""
    processors = [make_processor("smolvlm", do_image_splitting=True, size={"longest_edge": edge}) for edge in (64, 32)]
    trainer = distil(
        tmp_path, chats(2), "smolvlm", processing_class=processors[0],
        trainer_settings={"teacher_processing_class": processors[1]},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0


def test_padding_with_a_token_of_pictures_is_no_picture(tmp_path):
    processor = make_processor("idefics3")
    processor.tokenizer.pad_token = "<fake_token_around_image>"
    long = [ASK, {"role": "assistant", "content": "a red circle and a blue square " * 6}]
    rows = Dataset.from_list([{"images": [png(0)], "messages": long}, {"images": [png(1)], "messages": [ASK, ANSWER]}])
    batches = []
    for each in (processor, make_processor("idefics3")):
        trainer = distil(tmp_path, rows, processing_class=each, max_length=40, per_device_train_batch_size=2)
        batches.append(trainer.batch_collator()(list(trainer.train_dataset)))
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    pad = processor.tokenizer.pad_token_id
    assert pad in PICTURE_IDS
    assert (batches[0]["input_ids"][1, -5:] == pad).all()


# ------------------------------------------------------------------------------------------------ ends of plain text


def plain(completion: bool) -> Dataset:
    text = {"prompt": "<image>what is in", "completion": "a red circle"} if completion else {"text": "<image>a red"}
    return with_pictures(Dataset.from_list([{"image": png(0), **text}]), "train")


@pytest.mark.parametrize("completion", [False, True])
def test_plain_text_ends_as_without_pictures(tmp_path, completion):
    rows = plain(completion)
    trainer = distil(tmp_path, rows)
    labels = trainer.batch_collator()(list(rows))["labels"]
    expected = trainer.tokenizer(("a red circle" if completion else "a red") + "<eos>")["input_ids"]
    assert labels[labels != -100].tolist() == expected
    assert "<eos>" not in str(list(rows))  # the rows are as they were
    kept = rows.map(lambda row: {key: row[key] + "<eos>" for key in row if key in ("text", "completion")})
    batch = trainer.batch_collator()(list(kept))
    assert torch.equal(batch["labels"], labels)  # not twice


@pytest.mark.parametrize("completion", [False, True])
def test_plain_text_begins_as_without_pictures(tmp_path, completion):
    processor = make_processor("idefics3")
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    rows = plain(completion)
    trainer = distil(tmp_path, rows, processing_class=processor)
    ids = trainer.batch_collator()(list(rows))["input_ids"][0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


# -------------------------------------------------------------------------------------------------------- transforms


def opened(folder, number=2):
    """Rows whose pictures a transform opens, and the same with pictures."""
    rows = chats(number)
    for i, row in enumerate(rows):
        row["images"][0].save(folder / f"{i}.png")
    paths = [str(folder / f"{i}.png") for i in range(number)]
    base = rows.remove_columns("images").add_column("path", paths)

    def transform(batch):
        return {"messages": batch["messages"], "images": [[Image.open(path)] for path in batch["path"]]}

    return base.with_transform(transform), rows


def test_pictures_that_a_transform_makes_are_pictures(tmp_path):
    found = []
    for rows in opened(tmp_path):
        trainer = distil(tmp_path, rows, remove_unused_columns=False)
        assert trainer.has_pictures
        trainer.train()
        found.append(trainer.state.log_history[0]["kd"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_transform_that_opens_paths_in_their_place(tmp_path):
    made, rows = opened(tmp_path)
    base = made.with_format(None).map(lambda row: {"image": row["path"]}, remove_columns="path")
    lazy = base.with_transform(lambda batch: {**batch, "image": [Image.open(path) for path in batch["image"]]})
    trainer = distil(tmp_path, lazy)
    for mine, row in zip(trainer.first_rows(lazy, 2), rows, strict=True):
        assert as_trl_reads(mine)["images"][0].tobytes() == row["images"][0].tobytes()
    trainer.train()


def test_columns_that_a_transform_needs_are_not_removed(tmp_path):
    rows, _ = opened(tmp_path)
    with pytest.raises(ValueError, match="would be removed before: set remove_unused_columns=False"):
        distil(tmp_path, rows)


def test_bad_pictures_of_a_transform_are_named(tmp_path):
    rows = opened(tmp_path)[0].with_transform(lambda batch: {"messages": batch["messages"], "images": [[7], [7]]})
    with pytest.raises(ValueError, match="picture 0 of row 0 of the train dataset is no picture, but int"):
        distil(tmp_path, rows, remove_unused_columns=False)


# ----------------------------------------------------------------------------------------------- forms of a picture


def test_a_photo_with_a_small_copy_in_its_file_is_one_picture(tmp_path):
    data = png(0, format="MPO", save_all=True, append_images=[picture(1)])
    trainer = distil(tmp_path, table(files(data)))
    trainer.train()


def turned() -> tuple[bytes, Image.Image]:
    """A picture that lies on its side, with the note of a camera to turn it, and how it is seen."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = Image.new("RGB", (16, 8), "red")
    lying.paste("blue", (0, 0, 8, 8))
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    return file.getvalue(), lying.transpose(Image.Transpose.ROTATE_270)


def test_pictures_are_turned_as_the_camera_says():
    data, upright = turned()
    rows = with_pictures(Dataset.from_dict({"image": [data]}), "train")
    for cell in (rows[0]["image"], data, Image.open(io.BytesIO(data)), {"bytes": data, "path": None}):
        found = as_trl_reads({"image": cell})["images"][0]
        assert found.size == (8, 16)
        assert found.tobytes() == upright.tobytes()


def test_streams_that_do_not_say_what_they_have_may_have_paths_and_texts(tmp_path):
    cells = [str(tmp_path / "a.png"), png(0), base64.b64encode(png(0)).decode(), picture(0)]
    picture(0).save(tmp_path / "a.png")
    rows = [{"image": cell, "messages": [ASK, ANSWER]} for cell in cells]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = distil(tmp_path, stream, per_device_train_batch_size=4)
    batch = trainer.batch_collator()(trainer.first_rows(stream, 4))
    assert all(torch.equal(batch["pixel_values"][0], each) for each in batch["pixel_values"])
    trainer.train()


def test_base64_in_lines_is_a_picture():
    text = base64.encodebytes(png(0)).decode()
    assert "\n" in text
    rows = with_pictures(Dataset.from_dict({"image": [text, f"data:image/png;base64,{text}"]}), "train")
    assert all(row["image"].tobytes() == picture(0).tobytes() for row in rows)


def test_long_paths_are_not_printed_whole(tmp_path):
    rows = table(["/no/" + "x" * 5000 + ".png"])
    with pytest.raises(ValueError, match="no such file") as refused:
        distil(tmp_path, rows)
    assert len(str(refused.value)) < 600


def test_a_file_that_comes_later_is_found(tmp_path, monkeypatch):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"image": "pictures_a.png", "text": "a"}\n')
    monkeypatch.chdir(tmp_path / "rows")

    def placed():
        rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        return relative_to(rows, str(tmp_path))[0]["image"]

    assert placed() == "pictures_a.png"
    picture(0).save(tmp_path / "pictures_a.png")
    assert placed() == str(tmp_path / "pictures_a.png")
    os.remove(tmp_path / "pictures_a.png")
    assert placed() == "pictures_a.png"


# ------------------------------------------------------------------------------------------------- places and formats


def test_pictures_of_tools_are_refused(tmp_path):
    messages = [
        {"role": "user", "content": [TEXT]}, {"role": "tool", "content": [PLACE]}, {**ANSWER, "content": [TEXT]},
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"row 0 .* has a picture in a message of a tool"):
        distil(tmp_path, table(files(png()), messages))


@pytest.mark.parametrize("late", [True, False])
def test_text_beside_marked_places_gets_no_place_of_its_own(tmp_path, late):
    """A stream may have content as text in one message and in parts in another."""
    words, parts = {"role": "user", "content": "what is"}, {"role": "user", "content": [PLACE, TEXT]}
    turns = [words, ANSWER, parts, ANSWER] if late else [parts, ANSWER, words, ANSWER]
    rows = [{"images": [picture(0)], "messages": turns}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = distil(tmp_path, stream)
    ids = trainer.batch_collator()(trainer.first_rows(stream, 1))["input_ids"][0]
    text = trainer.tokenizer.decode(ids[~trainer.picture_spans(ids[None])[0]])
    asked, answered = "<|user|>what is<eos>", "<|assistant|>a red circle<eos>"
    assert text == (asked + answered) * 2
    before = trainer.tokenizer.decode(ids[: (ids == IMAGE_ID).nonzero()[0].item()])
    assert before.startswith((asked + answered if late else "") + "<|user|>")
    assert before.count("<|user|>") == 1 + late


@pytest.mark.parametrize("is_question", [False, True])
def test_held_out_rows_may_be_of_another_format(tmp_path, is_question):
    """Each is measured as if it were trained on."""
    train, held_out = (chats(2), questions(2)) if is_question else (questions(2), chats(2))
    other = distil(tmp_path, train, trainer_settings={"eval_dataset": held_out})
    same = distil(tmp_path, held_out, trainer_settings={"eval_dataset": held_out})
    assert other.evaluate()["eval_kd"] == pytest.approx(same.evaluate()["eval_kd"], rel=1e-6)
    assert other.evaluate(held_out)["eval_kd"] == pytest.approx(same.evaluate()["eval_kd"], rel=1e-6)


def test_rows_are_grouped_by_lengths_that_they_bring(tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length"}
    rows = chats(2).add_column("length", [3, 4])
    for bad in ((chats(2), {"remove_unused_columns": False}), (rows, {})):
        with pytest.raises(ValueError, match="needs a column 'length', and remove_unused_columns=False"):
            distil(tmp_path, bad[0], **grouped, **bad[1])
    distil(tmp_path, rows, **grouped, remove_unused_columns=False).train()


# --------------------------------------------------------------------------------------------- rows that fill up


def test_rows_that_fill_up_count_for_nothing_with_a_collator_of_ones_own():
    own, seen = HandMade("internvl"), []

    def collator(rows):
        seen.extend(rows)
        return own(rows)

    tokenizer = make_tokenizer()
    masked = MaskedPictures(collator, PictureSpans({IMAGE_ID}, tokenizer))
    rows = list(tokenised(2))
    batch = masked([rows[0], {**rows[1], FILLER: True}])
    assert not any(FILLER in row for row in seen)
    assert (batch["labels"][1] == -100).all()
    assert torch.equal(batch["labels"][0], masked([rows[0], {**rows[1], FILLER: None}])["labels"][0])
    short = MaskedPictures(lambda rows: own(rows[:1]), masked.spans)
    with pytest.raises(ValueError, match="make one row of each"):
        short([rows[0], {**rows[1], FILLER: True}])


def test_rows_of_a_transform_are_filled_up(tmp_path):
    rows, _ = opened(tmp_path, 3)
    filled = with_fillers(rows, 4)
    assert [bool(row[FILLER]) for row in filled] == [False, False, False, True]
    assert all(row["images"][0].size == (32, 32) for row in filled)
