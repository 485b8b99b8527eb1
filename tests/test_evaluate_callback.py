"""EvaluateCallback: what it logs against `evaluate_models` itself, and that a training does not notice it."""

import pytest
import torch
from datasets import Dataset

from hf_distill import KDConfig, KDTrainer
from hf_distill.callbacks import EvaluateCallback, PerplexityCallback
from hf_distill.collators import PromptCollator
from hf_distill.evaluating.gaps import gap_recovered
from hf_distill.evaluating.models import Scoring, evaluate_models
from hf_distill.evaluating.questions import picture_questions, questions_of
from tests.conftest import SENTENCES, make_model
from tests.test_callbacks import LORA, TEXTS, make_trainer
from tests.trainers.test_kd import settings
from tests.vision import VOCAB, chats, make_processor, make_vlm
from tests.vision import questions as asked_of_pictures

SCORING = Scoring(["f1"], max_new_tokens=4)


@pytest.fixture(scope="module")
def questions(tokenizer):
    rows = [{"prompt": text[:12], "completion": text[12:24]} for text in SENTENCES]
    return questions_of(rows, PromptCollator(tokenizer))


def logged(trainer, key):
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def test_it_logs_what_evaluate_models_finds_and_the_gap_from_the_start(tmp_path, tokenizer, questions):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.add_callback(EvaluateCallback(trainer, 2, rows=TEXTS, questions=questions, scoring=SCORING))
    trainer.train()
    models = {"base": make_model(seed=1), "student": trainer.model, "teacher": make_model(seed=2)}
    found = evaluate_models(models, {"student": tokenizer}, rows=TEXTS, questions=questions, scoring=SCORING)
    for measure in found.measures:
        values = logged(trainer, f"evaluate/{measure.name}")
        assert list(values) == [0, 2, 4, 5]
        assert values[0] == pytest.approx(measure.values["base"], rel=1e-5)
        assert values[5] == pytest.approx(measure.values["student"], rel=1e-5)
        gaps, expected = logged(trainer, f"evaluate/{measure.name}_gap_recovered"), gap_recovered(measure)
        assert (5 in gaps) == (expected is not None)
        assert 0 not in gaps
        if expected is not None:
            assert gaps[5] == pytest.approx(expected.share, rel=1e-4)
    assert logged(trainer, "evaluate/kl_gap_recovered")[5] > 0


def test_several_callbacks_with_names_of_their_own_all_measure(tmp_path, tokenizer, questions):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=2)
    trainer.add_callback(EvaluateCallback(trainer, 1, rows=TEXTS))
    with pytest.raises(ValueError, match="EvaluateCallback: another one of this trainer has the name 'evaluate'"):
        EvaluateCallback(trainer, 1, questions=questions, scoring=SCORING)
    trainer.add_callback(EvaluateCallback(trainer, 2, questions=questions, scoring=SCORING, name="answers"))
    trainer.add_callback(PerplexityCallback(trainer, TEXTS, every=2))
    with pytest.raises(ValueError, match="PerplexityCallback: another one of this trainer has the name 'eval'"):
        PerplexityCallback(trainer, TEXTS)
    trainer.add_callback(PerplexityCallback(trainer, {"again": TEXTS}, every=2))
    trainer.train()
    steps = {name: list(logged(trainer, name)) for name in ("evaluate/perplexity", "answers/f1")}
    assert steps == {"evaluate/perplexity": [0, 1, 2], "answers/f1": [0, 2]}
    assert logged(trainer, "perplexity/again") == logged(trainer, "perplexity/eval")
    assert list(logged(trainer, "perplexity/again")) == [0, 2]


def test_a_training_is_the_same_with_and_without_it(tmp_path, tokenizer, questions):
    weights = []
    for measured in (False, True):
        trainer = make_trainer(tmp_path, tokenizer, LORA, gradient_checkpointing=True, max_steps=3)
        if measured:
            trainer.add_callback(EvaluateCallback(trainer, 1, rows=TEXTS, questions=questions, scoring=SCORING))
        trainer.train()
        weights.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
    assert list(logged(trainer, "evaluate/f1")) == [0, 1, 2, 3]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_a_resumed_run_measures_on_and_tells_no_gap(tmp_path, tokenizer):
    for steps, resume in ((2, None), (4, True)):
        trainer = make_trainer(tmp_path, tokenizer, max_steps=steps, save_strategy="steps", save_steps=2)
        trainer.add_callback(EvaluateCallback(trainer, 2, rows=TEXTS))
        trainer.train(resume_from_checkpoint=resume)
    assert list(logged(trainer, "evaluate/kl")) == [0, 2, 4]
    assert list(logged(trainer, "evaluate/kl_gap_recovered")) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nothing to measure"),
        ({"rows": TEXTS, "every": 0}, "every and batch_size have to be at least 1, got 0 and 8"),
        ({"rows": TEXTS.select([])}, "there are no rows to measure"),
        ({"rows": Dataset.from_dict({"story": SENTENCES})}, "the first of the rows has the columns story"),
        ({"questions": True, "scoring": Scoring(max_new_tokens=255)}, "row 0 has a prompt of .* positions"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(tmp_path, tokenizer, questions, options, message):
    trainer = make_trainer(tmp_path, tokenizer)
    if "questions" in options:
        options = {**options, "questions": questions}
    with pytest.raises(ValueError, match=message):
        EvaluateCallback(trainer, **options)


# ---------------------------------------------------------------------------------------------- rows with pictures


def seeing_trainer(folder, **changes):
    """A student and a teacher that read pictures; the teacher cuts them into more tiles."""
    arguments = {
        "model": make_vlm("idefics3", 1), "teacher_model": make_vlm("idefics3", 2),
        "args": KDConfig(**settings(folder, max_steps=2, learning_rate=1e-2)), "train_dataset": chats(4),
        "processing_class": make_processor("idefics3"),
        "teacher_processing_class": make_processor("idefics3", do_image_splitting=True),
    }  # fmt: skip
    return KDTrainer(**arguments | changes)


@pytest.mark.parametrize("tiles", [False, True], ids=["one processor", "two processors"])
@pytest.mark.parametrize("rows", [chats(5, seed=7), asked_of_pictures(5, seed=7)], ids=["messages", "completions"])
def test_rows_with_pictures_are_measured_as_evaluate_models_does(tmp_path, rows, tiles):
    processors = {
        "student": make_processor("idefics3"),
        "teacher": make_processor("idefics3", do_image_splitting=tiles),
    }
    trainer = seeing_trainer(tmp_path, teacher_processing_class=processors["teacher"])
    trainer.add_callback(EvaluateCallback(trainer, 2, rows=rows, batch_size=2))
    trainer.train()
    models = {"base": make_vlm("idefics3", 1), "student": trainer.model, "teacher": make_vlm("idefics3", 2)}
    found = evaluate_models(models, processors, rows=rows)
    assert [measure.name for measure in found.measures] == ["perplexity", "kl", "agreement", "acceptance"]
    for measure in found.measures:
        values = logged(trainer, f"evaluate/{measure.name}")
        assert list(values) == [0, 2]
        assert values[0] == pytest.approx(measure.values["base"], rel=1e-5)
        assert values[2] == pytest.approx(measure.values["student"], rel=1e-5)
    assert logged(trainer, "evaluate/kl_gap_recovered")[2] > 0


def test_a_teacher_of_the_callers_reads_pictures_through_its_own_processor(tmp_path):
    rows, own = chats(3, seed=7), make_processor("idefics3", do_image_splitting=True)
    found = []
    for processor in (own, None):
        trainer = seeing_trainer(tmp_path, teacher_processing_class=None)
        teacher = make_vlm("idefics3", 3)
        callback = EvaluateCallback(trainer, rows=rows, teacher=teacher, teacher_processing_class=processor)
        trainer.add_callback(callback)
        trainer.train()
        found.append(logged(trainer, "evaluate/kl")[0])
    models = {"student": make_vlm("idefics3", 1), "teacher": teacher}
    student = make_processor("idefics3")
    for value, processor in zip(found, (own, student), strict=True):
        expected = evaluate_models(models, {"student": student, "teacher": processor}, rows=rows)
        assert value == pytest.approx(expected.measures[1].values["student"], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_a_training_with_pictures_is_the_same_with_and_without_it(tmp_path):
    weights = []
    for measured in (False, True):
        trainer = seeing_trainer(tmp_path)
        if measured:
            trainer.add_callback(EvaluateCallback(trainer, 1, rows=chats(3, seed=7)))
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert list(logged(trainer, "evaluate/kl")) == [0, 1, 2]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def with_another_template(processor):
    processor.chat_template = processor.chat_template.replace("<|user|>", "user").replace("<|{{", "{{")
    return processor


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (chats(3), {"max_length": 5}, "would cut them: raise max_length"),
        (Dataset.from_dict({"images": [["nowhere.png"]], "messages": chats(1)["messages"]}), {}, "no such file"),
        (chats(3), {"teacher": make_model(vocab_size=VOCAB)}, "reads text alone: remove the column of pictures"),
        (
            chats(3),
            {"teacher_processing_class": with_another_template(make_processor("idefics3"))},
            "make different texts of a row",
        ),
    ],
)
def test_pictures_that_cannot_be_measured_are_refused_before_the_training(tmp_path, rows, options, message):
    trainer = seeing_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        EvaluateCallback(trainer, rows=rows, **options)


def test_questions_about_pictures_are_tried_before_the_training(tmp_path):
    trainer = seeing_trainer(tmp_path)
    asked = picture_questions(asked_of_pictures(3, seed=7), make_processor("idefics3"))
    with pytest.raises(ValueError, match=r"row 0 has a prompt of .* would go beyond the 256 positions"):
        EvaluateCallback(trainer, questions=asked, scoring=Scoring(max_new_tokens=250))
    blind = make_model(vocab_size=VOCAB, max_position_embeddings=300)
    with pytest.raises(ValueError, match="reads text alone: remove the column of pictures"):
        EvaluateCallback(trainer, questions=asked, scoring=Scoring(max_new_tokens=4), teacher=blind)
