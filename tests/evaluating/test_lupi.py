"""The fact book of examples/lupi.py through `evaluate_models`: facts that a student has learned without their book."""

import pytest
import transformers
from datasets import Dataset

from hf_distill import LUPICollator, SpeculativeKDConfig, SpeculativeKDTrainer
from hf_distill.evaluating.gaps import gap_recovered
from hf_distill.evaluating.models import Scoring, evaluate_models
from hf_distill.evaluating.questions import questions_of
from tests.test_examples import load_example


@pytest.mark.slow
def test_a_student_of_the_fact_book_has_closed_most_of_the_gap_without_the_book(tmp_path):
    lupi = load_example("lupi")
    transformers.set_seed(0)
    lupi.random.seed(0)
    tokenizer, teacher, student = lupi.make_models()
    _, _, base = lupi.make_models()
    base.load_state_dict(student.state_dict())
    settings = {"output_dir": str(tmp_path), "learning_rate": 2e-3, "use_cpu": True, "bf16": False, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True}
    places = lupi.random.sample(lupi.NAMES, len(lupi.NAMES))
    facts = [lupi.make_fact(place) for place in places[:48]]
    lupi.teach_to_read(teacher, tokenizer, places[48:], **settings, max_steps=400)
    args = SpeculativeKDConfig(
        max_new_tokens=6, adaptive=True, top_k=5, student_temperature=0.7, teacher_temperature=0.7,
        per_device_train_batch_size=16, max_steps=100, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    collator = LUPICollator(tokenizer, allow_missing_knowledge=True)
    tools = {"data_collator": collator, "teacher_processing_class": tokenizer}
    SpeculativeKDTrainer(student, teacher, args, Dataset.from_list(facts), None, tokenizer, **tools).train()

    models = {"base": base, "student": student, "teacher": teacher}
    questions = questions_of(facts, collator, answer_column="answer")
    found = evaluate_models(
        models, {"student": tokenizer}, questions=questions, scoring=Scoring(["exact_match"], max_new_tokens=6)
    )
    (measure,) = found.measures
    bare = [{**fact, "knowledge": ""} for fact in facts]
    expected = {
        "base": lupi.accuracy(base, collator, bare), "student": lupi.accuracy(student, collator, bare),
        "teacher": lupi.accuracy(teacher, collator, facts),
    }  # fmt: skip
    assert measure.values == pytest.approx(expected)
    gap = gap_recovered(measure)
    assert gap.low > 0.7
