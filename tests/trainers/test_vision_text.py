"""Rows of text alone: vision-language models read them, and models of text with an unused column of pictures."""

import pytest
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer, named
from hf_distill.evaluation import evaluate_fidelity
from hf_distill.modeling import vision_tower
from hf_distill.planning import plan_run
from tests.conftest import make_model, make_tokenizer
from tests.trainers.test_kd import settings
from tests.vision import FAMILIES, NEEDS_5_18, WORDS, chats, make_processor, make_vlm
from tests.vision import make_tokenizer as vision_tokenizer


def texts(form: str) -> Dataset:
    if form == "text":
        return Dataset.from_dict({"text": [" ".join(WORDS[i : 3 * i + 4]) for i in range(4)]})
    return chats(4).remove_columns("images")


def test_an_unused_column_of_pictures_is_none_of_a_model_of_text():
    rows = Dataset.from_dict({"text": ["a red circle", "two squares"], "image": ["a.png", "b.png"]})
    models = make_model("llama", seed=1), make_model("llama", seed=2)
    found = evaluate_fidelity(*models, rows, make_tokenizer())
    assert found == evaluate_fidelity(*models, rows.remove_columns("image"), make_tokenizer())
    seeing = make_vlm("idefics3", 1), make_vlm("idefics3", 2)
    with pytest.raises(ValueError, match="the rows have pictures: pass the student's processor"):
        evaluate_fidelity(*seeing, rows, vision_tokenizer())


@NEEDS_5_18
@pytest.mark.parametrize("form", ["text", "messages"])
@pytest.mark.parametrize("changes", [{}, {"packing": True, "max_length": 16}], ids=["rows", "packed"])
def test_a_student_that_sees_keeps_its_processor_where_rows_are_text(tmp_path, form, changes):
    make_vlm("idefics3", 1).save_pretrained(tmp_path / "student")
    make_processor("idefics3").save_pretrained(tmp_path / "student")
    found = []
    for processing_class in (None, vision_tokenizer()):
        if processing_class is not None:
            processing_class.chat_template = make_processor("idefics3").chat_template
        trainer = KDTrainer(
            str(tmp_path / "student"), make_vlm("idefics3", 2), KDConfig(**settings(tmp_path / "out", **changes)),
            texts(form), processing_class=processing_class, teacher_processing_class=vision_tokenizer(),
        )  # fmt: skip
        trainer.train()
        found.append(trainer.state.log_history[0]["kd"])
        if processing_class is None:
            trainer.save_model()
            assert (tmp_path / "out" / "processor_config.json").exists()
    assert found[0] == found[1] > 0


def test_a_processor_that_cannot_be_loaded_is_told(tmp_path, monkeypatch, caplog):
    def missing(*_, **__):
        raise ImportError("torchvision is not installed")

    make_vlm("idefics3", 1).save_pretrained(tmp_path / "student")
    make_processor("idefics3").tokenizer.save_pretrained(tmp_path / "student")
    monkeypatch.setattr(named, "load_processor", missing)
    KDTrainer(
        str(tmp_path / "student"), make_vlm("idefics3", 2), KDConfig(**settings(tmp_path / "out")), texts("text"),
        teacher_processing_class=vision_tokenizer(),
    )  # fmt: skip
    assert "saved without a processor of pictures: " in caplog.text
    assert "torchvision is not installed" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_all_of_a_model_that_sees(tmp_path, family):
    model = make_vlm(family)
    model.save_pretrained(tmp_path)
    number = sum(parameter.numel() for parameter in model.parameters())
    tower = sum(parameter.numel() for parameter in vision_tower(model)[1].parameters())
    options = {"output_dir": "out", "use_cpu": True, "bf16": False, "max_length": 32}
    for freezes in (True, False):
        args = KDConfig(**options, freeze_vision_tower=freezes)
        plan = plan_run(str(tmp_path), str(tmp_path), args)
        assert plan.counts["student's parameters"] == plan.counts["teacher's parameters"] == number
        assert plan.counts["trained parameters"] == number - tower * freezes
        assert "reads pictures, and rows of text alone are counted: --picture_tokens" in plan.notes[-1]
