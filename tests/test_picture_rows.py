"""Rows with pictures: what is taken as a picture, what is refused before the training, and what batches hold."""

import base64
import io
import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, List
from datasets import Image as ImageFeature
from PIL import Image

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.picture_batches import as_trl_reads
from hf_distill.picture_rows import picture_problem, rgb, small, with_pictures
from tests.conftest import make_model
from tests.conftest import make_tokenizer as make_text_tokenizer
from tests.trainers.test_kd import settings
from tests.vision import chats, make_processor, make_tokenizer, make_vlm, picture, questions

ASK, ANSWER = {"role": "user", "content": "what is in"}, {"role": "assistant", "content": "a red circle"}
PLACE, TEXT = {"type": "image"}, {"type": "text", "text": "what is"}


def png(seed=0, mode="RGB", format="PNG", **save) -> bytes:
    file = io.BytesIO()
    picture(seed).convert(mode).save(file, format, **save)
    return file.getvalue()


def distil(folder, rows, family="idefics3", trainer=KDTrainer, config=KDConfig, **changes):
    own = {name: changes.pop(name) for name in ("teacher_model", "model", "processing_class") if name in changes}
    more = changes.pop("trainer_settings", {})
    processor = make_processor(family)
    return trainer(
        own.get("model") or make_vlm(family, 1), own.get("teacher_model") or make_vlm(family, 2),
        config(**settings(folder, **changes)), train_dataset=rows,
        processing_class=own.get("processing_class", processor), **more,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- one form


def forms(folder) -> dict[str, Dataset]:
    """The same two pictures in all forms that are taken."""
    pictures, data = [picture(0), picture(1)], [png(0), png(1)]
    paths = []
    for i, each in enumerate(data):
        paths.append(str(folder / f"{i}.png"))
        (folder / f"{i}.png").write_bytes(each)
    text = [base64.b64encode(each).decode() for each in data]
    columns = {
        "image": [ASK, ANSWER],
    }
    messages = [columns["image"]] * 2
    cells = {
        "pictures": pictures,
        "paths": paths,
        "bytes": data,
        "files": [{"bytes": each, "path": None} for each in data],
        "base64": text,
        "data addresses": [f"data:image/png;base64,{each}" for each in text],
    }
    found = {name: Dataset.from_dict({"image": cell, "messages": messages}) for name, cell in cells.items()}
    lists = {
        name: Dataset.from_dict({"images": [[c] for c in cell], "messages": messages}) for name, cell in cells.items()
    }
    return found | {f"lists of {name}": rows for name, rows in lists.items()}


def test_all_forms_of_a_picture_become_the_same_pixels(tmp_path):
    for name, rows in forms(tmp_path).items():
        taken = with_pictures(rows, "train")
        for i, row in enumerate(taken):
            found = as_trl_reads(row)["images"]
            assert len(found) == 1, name
            assert found[0].tobytes() == picture(i).tobytes(), name


def test_rows_without_a_picture_are_rows_of_text(tmp_path):
    rows = Dataset.from_list([
        {"images": [picture(0)], "messages": [ASK, ANSWER]},
        {"images": [], "messages": [ASK, ANSWER]},
        {"images": None, "messages": [ASK, ANSWER]},
    ])  # fmt: skip
    rows = rows.cast_column("images", List(ImageFeature()))
    for family in ("idefics3", "gemma3"):
        trainer = distil(tmp_path, rows, family, per_device_train_batch_size=3)
        trainer.train()
        batch = trainer.batch_collator()(list(rows))
        assert trainer.picture_spans(batch["input_ids"]).any(1).tolist() == [True, False, False]


def test_transparency_is_white_and_other_modes_are_rgb():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 255, 0, 255))
    assert rgb(clear).tobytes() == bytes([255, 255, 255, 0, 255, 0])
    assert rgb(Image.new("L", (1, 1), 7)).tobytes() == bytes([7, 7, 7])
    indexed = picture(0).quantize(4)
    assert rgb(indexed).tobytes() == indexed.convert("RGB").tobytes()


def test_a_small_picture_fits_its_bytes_and_is_exact_where_it_can_be():
    flat = Image.new("RGB", (300, 100), "red")
    for each, kind, size in (
        (picture(0), "png", (32, 32)),
        (flat, "png", (128, 43)),
        (picture(1, (400, 400)), "jpeg", (128, 128)),
    ):
        head, _, data = small(each).partition(",")
        found = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == f"data:image/{kind};base64"
        assert found.size == size
        assert len(data) <= 20_000
    assert flat.size == (300, 100)  # the row's own


def test_collating_leaves_the_rows_as_they_are(tmp_path):
    trainer = distil(tmp_path, questions(2))
    rows = list(questions(2))
    before = [{name: str(cell) for name, cell in row.items() if name != "images"} for row in rows]
    first = trainer.batch_collator()(rows)
    second = trainer.batch_collator()(rows)
    assert before == [{name: str(cell) for name, cell in row.items() if name != "images"} for row in rows]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_conversations_of_other_names_are_read(tmp_path):
    rows = chats(2)
    asked = [{"from": "human", "value": row["messages"][0]["content"]} for row in rows]
    answers = [{"from": "gpt", "value": row["messages"][1]["content"]} for row in rows]
    pictures = [row["images"][0] for row in rows]
    other = Dataset.from_dict({"image": pictures, "conversations": list(map(list, zip(asked, answers, strict=True)))})
    batches = []
    for each in (other, rows):
        trainer = distil(tmp_path, each)
        batches.append(trainer.batch_collator()(trainer.first_rows(trainer.train_dataset, 2)))
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[1])


def test_only_text_is_cut_at_max_length(tmp_path):
    long = [ASK, {"role": "assistant", "content": "a red circle and a blue square " * 4}]
    rows = Dataset.from_list([{"images": [picture(0)], "messages": long}]).cast_column("images", List(ImageFeature()))
    whole = distil(tmp_path, rows, max_length=None)
    cut = distil(tmp_path, rows, max_length=20)
    row = whole.first_rows(rows, 1)
    batch, shorter = whole.batch_collator()(row), cut.batch_collator()(row)
    assert batch["input_ids"].shape[1] > 20
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(shorter[name], batch[name][:, :20])
    assert torch.equal(shorter["pixel_values"], batch["pixel_values"])


# ------------------------------------------------------------------------------------------------------- bad inputs


def table(images, messages=(ASK, ANSWER), column="images", **more):
    return Dataset.from_list([{column: images, "messages": list(messages), **more}])


def parts(*content, answer=(TEXT,)):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": list(answer)}]


def files(data):
    return [{"bytes": data, "path": None}]


def blind():
    return make_model(seed=2)


BAD_ROWS = {
    "a place without a picture": (lambda f: table([], parts(PLACE, TEXT)), "row 0 .* has 0 pictures and 1 place"),
    "two pictures for one place": (
        lambda f: table(files(png()) * 2, parts(PLACE, TEXT)), "row 0 .* has 2 pictures and 1 place for them"),
    "two places for one picture": (
        lambda f: table(files(png()), parts(PLACE, PLACE, TEXT)), "row 0 .* has 1 picture and 2 places"),
    "a picture and no place": (
        lambda f: table(files(png()), [{"role": "system", "content": "red"}, ANSWER]), "has 1 picture and 0 places"),
    "a picture in an answer": (
        lambda f: table(files(png()), parts(TEXT, answer=[PLACE, TEXT])), "has a picture in an answer"),
    "a mark in the text": (
        lambda f: table(files(png()), [{**ASK, "content": "<image>\nwhat"}, ANSWER]), "has '<image>' in its text"),
    "a mark in a part": (
        lambda f: table(files(png()), parts(PLACE, {**TEXT, "text": "<|image_pad|>"})), "image_pad.*in its text"),
    "a part of another type": (
        lambda f: table(files(png()), parts({"type": "video"}, TEXT)), "a part of the type 'video'"),
    "an address in a part": (
        lambda f: table(files(png()), parts({**PLACE, "url": "http://x/y.png"}, TEXT)), "a picture inside of its part"),
    "an unknown role": (lambda f: table(files(png()), [{"role": "critic", "content": "x"}]), "the role 'critic'"),
    "a damaged file": (lambda f: table(files(png()[:90])), "picture 0 of row 0 .* cannot be read"),
    "a file that is none": (lambda f: table(files(b"no picture at all")), "picture 0 of row 0 .* cannot be read"),
    "a missing file": (lambda f: table([str(f / "none.png")]), "no such file"),
    "an address": (lambda f: table(["https://example.com/a.png"]), "is an address .* download it first"),
    "several frames": (
        lambda f: table(files(png(format="GIF", save_all=True, append_images=[picture(1)]))), "has 2 frames"),
    "a mode without 8 bits": (lambda f: table(files(png(mode="I;16"))), "has the mode I;16"),
    "numbers": (lambda f: table([1, 2]), "a picture is a datasets.Image, a path, bytes"),
    "a single picture in the column of several": (lambda f: table(str(f / "a.png")), "has to be a list of pictures"),
    "several in the column of one": (lambda f: table([str(f / "a.png")], column="image"), "has to be one picture"),
    "both columns": (lambda f: table(files(png()), image=None), "has both 'images' and 'image'"),
    "tokens beside pictures": (lambda f: table(files(png()), input_ids=[5, 60]), "pictures and 'input_ids'"),
    "a prompt of the teacher's": (lambda f: table(files(png()), teacher_prompt="x"), "pictures, and 'teacher_prompt'"),
    "no text": (lambda f: chats(1).remove_columns("messages"), "it needs 'text', 'messages'"),
    "a text without the mark": (
        lambda f: Dataset.from_list([{"images": files(png()), "text": "red"}]), "row 0 .* cannot be made a batch of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_trained_on_are_refused_before_anything_is_trained(tmp_path, case):
    make, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, make(tmp_path))


BAD_RUNS = {
    "packing": ({"packing": True}, "packing, eval_packing and padding_free join rows of text alone"),
    "padding_free": ({"padding_free": True, "max_length": None}, "padding_free join rows of text alone"),
    "the end kept": ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' would cut them off"),
    "long rows dropped": ({"drop_long_rows": True}, "drop_long_rows=True cannot see them"),
    "a short max_length": ({"max_length": 4}, "row 0 .* max_length=4 would cut them: raise max_length"),
    "completions of conversations": ({"completion_only_loss": True}, "take assistant_only_loss"),
    "a function that makes text": (
        {"trainer_settings": {"formatting_func": lambda row: "x"}}, "formatting_func makes text alone"),
    "a tokenizer": ({"processing_class": make_tokenizer()}, "pass the student's processor"),
    "neither": ({"processing_class": object()}, "has to be a tokenizer, or a processor"),
    "no processor": ({"processing_class": None}, "rows with pictures need the student's processor"),
    "a text-only student": ({"model": blind()}, "the student reads text alone"),
    "a text-only teacher": ({"teacher_model": blind()}, "the teacher LlamaForCausalLM reads text alone"),
    "a processor of another model": ({"processing_class": make_processor("gemma3")}, "do they belong together"),
    "a processor of other places": (
        {"processing_class": make_processor("llava_onevision")}, "cannot read the batches of its processor"),
    "a teacher's tokenizer": (
        {"trainer_settings": {"teacher_processing_class": make_tokenizer()}}, "pass its processor"),
    "a server": ({"teacher_model": "http://127.0.0.1:9/v1"}, "is asked by their tokens alone"),
    "routes": (
        {"teacher_model": {each: make_vlm("idefics3", 2) for each in "ab"}, "teacher_combination": "route"},
        "cannot divide the pixels"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
@pytest.mark.parametrize("case", BAD_RUNS)
def test_runs_that_pictures_do_not_go_together_with_are_refused(tmp_path, case):
    changes, message = BAD_RUNS[case]
    rows = chats(2).add_column("teacher", ["a", "b"]) if case == "routes" else chats(2)
    with pytest.raises(ValueError, match=message):
        distil(tmp_path, rows, **changes)


@pytest.mark.parametrize("case", ["padding", "assistant"])
def test_settings_that_do_not_go_together_with_completions_are_refused(tmp_path, case):
    changes = {"padding": {"pad_to_multiple_of": 8}, "assistant": {"assistant_only_loss": True}}[case]
    with pytest.raises(ValueError, match=r"pad_to_multiple_of|only the completion is trained"):
        distil(tmp_path, questions(2), **changes)


def test_held_out_pictures_need_pictures_in_training(tmp_path):
    text = chats(2).remove_columns("images")
    with pytest.raises(ValueError, match="the eval dataset has pictures, and the train dataset has none"):
        distil(tmp_path, text, trainer_settings={"eval_dataset": chats(2)})


@pytest.mark.parametrize(
    ("trainer", "config"),
    [(SpeculativeKDTrainer, SpeculativeKDConfig), (KVProjectionTrainer, KVProjectionConfig)],
)
def test_trainers_of_text_alone_say_so(tmp_path, trainer, config):
    for rows in (questions(2), questions(2).remove_columns("images")):
        with pytest.raises(ValueError, match=f"{trainer.__name__} works on text alone"):
            distil(tmp_path, rows, trainer=trainer, config=config)


def test_no_store_is_written_of_pictures(tmp_path):
    with pytest.raises(ValueError, match="the rows have pictures, and a store finds texts by their tokens alone"):
        distil(tmp_path, chats(2)).write_cache(tmp_path / "store")


def test_a_row_that_is_bad_past_the_tried_ones_is_refused_too(tmp_path):
    rows = [{"images": [{"bytes": png(), "path": None}], "messages": [ASK, ANSWER]} for _ in range(300)]
    rows[290]["images"][0]["bytes"] = b"no picture"
    with pytest.raises(ValueError, match="picture 0 of row 290 of the train dataset cannot be read"):
        distil(tmp_path, Dataset.from_list(rows))


def test_streams_are_read_as_they_come(tmp_path):
    rows = chats(4)
    stream = IterableDataset.from_generator(lambda: iter(rows), features=rows.features)
    trainer = distil(tmp_path, stream, per_device_train_batch_size=4)
    trainer.train()
    other = distil(tmp_path, rows, per_device_train_batch_size=4)
    other.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(other.state.log_history[0]["kd"], rel=1e-6)


# ------------------------------------------------------------------------------------------- rows of text, both sides


def test_a_vision_teacher_teaches_rows_of_text(tmp_path):
    """A student of text alone, with the vocabulary of the teacher."""
    teacher, tokenizer = make_vlm("idefics3", 2), make_tokenizer()
    tokenizer.chat_template = make_processor("idefics3").chat_template
    student = make_model(vocab_size=len(tokenizer), seed=1)
    trainer = KDTrainer(
        student, teacher, KDConfig(**settings(tmp_path, kd_weight=1.0)),
        train_dataset=Dataset.from_dict({"text": ["red circle"]}), processing_class=tokenizer,
        teacher_processing_class=make_processor("idefics3"),
    )  # fmt: skip
    trainer.train()
    ids = torch.tensor([tokenizer("red circle<eos>")["input_ids"]])
    with torch.no_grad():
        theirs = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
        mine = make_model(vocab_size=len(tokenizer), seed=1)(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(expected, rel=1e-4)


def test_a_text_only_teacher_teaches_a_vision_student_on_rows_of_text(tmp_path):
    tokenizer = make_tokenizer()
    for processing_class in (tokenizer, make_processor("idefics3")):
        trainer = KDTrainer(
            make_vlm("idefics3", 1), make_model(vocab_size=len(tokenizer), seed=2), KDConfig(**settings(tmp_path)),
            train_dataset=Dataset.from_dict({"text": ["red circle and blue square"]}),
            processing_class=processing_class, teacher_processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.log_history[0]["kd"] > 0


def test_another_vocabulary_is_refused_beside_pictures(tmp_path):
    processor = make_processor("idefics3", do_image_splitting=True)
    processor.tokenizer = make_text_tokenizer()
    with pytest.raises(ValueError, match="different vocabularies"):
        distil(tmp_path, chats(2), trainer_settings={"teacher_processing_class": processor})


def test_columns_that_are_not_read_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_distill")
    distil(tmp_path, chats(2).add_column("weight", [1.0, 2.0]))
    assert "not read: weight" in caplog.text


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_file_that_ends_too_early_is_found_where_it_is_read_whole(form):
    data = png(format=form)
    assert picture_problem(data, whole=True) is None
    for share in (0.6, 0.95):
        start = data[: int(share * len(data))]
        assert "cannot be read" in picture_problem(start, whole=True)
    if form != "TIFF":  # whose header is at the end
        assert picture_problem(data[: int(0.6 * len(data))], whole=False) is None


def test_a_changed_byte_of_a_png_is_found_where_it_is_read_whole():
    data = bytearray(png())
    data[len(data) // 2] ^= 1
    assert "cannot be read" in picture_problem(bytes(data), whole=True)
