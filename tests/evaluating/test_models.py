"""Base, student and teacher side by side, against the functions that measure one of them."""

import numpy as np
import pytest
from datasets import Dataset

from hf_distill import LUPICollator, evaluate_fidelity
from hf_distill.collators import PromptCollator
from hf_distill.evaluating.gaps import gap_recovered
from hf_distill.evaluating.generation import generate_answers
from hf_distill.evaluating.models import Scoring, evaluate_models
from hf_distill.evaluating.questions import Questions, questions_of
from hf_distill.evaluation import perplexity, row_sums
from tests.conftest import SENTENCES, make_model, make_tokenizer


@pytest.fixture(scope="module")
def models():
    return {"base": make_model(seed=1), "student": make_model(seed=2), "teacher": make_model(seed=3)}


def by_name(found):
    return {measure.name: measure for measure in found.measures}


def test_numbers_on_rows_are_those_of_evaluate_fidelity_for_each_student(tokenizer, models, prompt_dataset):
    found = by_name(evaluate_models(models, {"student": tokenizer}, rows=prompt_dataset, batch_size=3))
    for name in ("base", "student"):
        expected = evaluate_fidelity(models[name], models["teacher"], prompt_dataset, tokenizer)
        assert found["perplexity"].values[name] == pytest.approx(expected["student_perplexity"], rel=1e-5)
        assert found["kl"].values[name] == pytest.approx(expected["kl"], rel=1e-5)
        assert found["agreement"].values[name] == pytest.approx(expected["agreement"])
        assert found["acceptance"].values[name] == pytest.approx(expected["expected_acceptance"], rel=1e-5)
        assert found["perplexity"].values["teacher"] == pytest.approx(expected["teacher_perplexity"], rel=1e-5)
    teacher = {name: measure.values["teacher"] for name, measure in found.items() if name != "perplexity"}
    assert teacher == {"kl": 0, "agreement": 1, "acceptance": 1}


def test_results_show_themselves_as_a_line_for_each_measure(tokenizer, models, prompt_dataset):
    found = evaluate_models(models, {"student": tokenizer}, rows=prompt_dataset)
    assert "|  | base | student | teacher | gap recovered |" in found._repr_markdown_()
    for measure in found.measures:
        assert f"| {measure.name} | {measure.form.format(measure.values['base'])} |" in found._repr_markdown_()
        assert measure.name in repr(found)


def test_sums_of_a_row_are_those_of_the_row_alone(tokenizer, models):
    rows = Dataset.from_dict({"text": SENTENCES})
    sums = row_sums((models["student"],), models["teacher"], rows, tokenizer, batch_size=3)
    for i in range(len(rows)):
        alone = evaluate_fidelity(models["student"], models["teacher"], rows.select([i]), tokenizer)
        assert sums.num_tokens[i] == alone["num_tokens"]
        assert sums.students[0]["kl"][i] / sums.num_tokens[i] == pytest.approx(alone["kl"], rel=1e-4)
        nats = np.log(alone["teacher_perplexity"])
        assert sums.teacher_ce[i] / sums.num_tokens[i] == pytest.approx(nats, rel=1e-5)


def test_rows_of_many_tokens_are_summed_over_their_chunks(tokenizer, models, monkeypatch):
    rows = Dataset.from_dict({"text": SENTENCES})
    whole = row_sums((models["student"],), models["teacher"], rows, tokenizer)
    monkeypatch.setattr("hf_distill.evaluation.default_chunk_size", lambda device, size: 7)
    cut = row_sums((models["student"],), models["teacher"], rows, tokenizer, batch_size=3)
    assert cut.num_tokens.tolist() == whole.num_tokens.tolist()
    for name, values in whole.students[0].items():
        np.testing.assert_allclose(cut.students[0][name], values, rtol=1e-4)


def test_without_a_teacher_there_is_perplexity_alone(tokenizer, models, text_dataset):
    found = by_name(evaluate_models({"student": models["student"]}, {"student": tokenizer}, rows=text_dataset))
    assert list(found) == ["perplexity"]
    expected = perplexity(models["student"], text_dataset, tokenizer)["perplexity"]
    assert found["perplexity"].values == {"student": pytest.approx(expected, rel=1e-5)}


def test_a_teacher_with_another_tokenizer_is_compared_by_answers_alone(tokenizer, models, prompt_dataset):
    other = make_tokenizer(300, corpus=[text[::-1] for text in SENTENCES])
    questions = questions_of(prompt_dataset, PromptCollator(tokenizer), PromptCollator(other))
    tokenizers = {"student": tokenizer, "teacher": other}
    scoring = Scoring(max_new_tokens=4)
    found = evaluate_models(models, tokenizers, rows=prompt_dataset, questions=questions, scoring=scoring)
    assert set(by_name(found)["perplexity"].values) == {"base", "student"}
    assert set(by_name(found)["f1"].values) == {"base", "student", "teacher"}
    assert "another tokenizer" in found.notes[0]


def test_scores_are_means_over_the_answers_that_were_generated(tokenizer, models, prompt_dataset):
    questions = questions_of(prompt_dataset, PromptCollator(tokenizer))
    texts = generate_answers(models["teacher"], tokenizer, questions.prompts, max_new_tokens=8)
    answers = [[text, "other"] if i % 4 else ["nothing"] for i, text in enumerate(texts)]
    scoring = Scoring(("exact_match", "squad"), max_new_tokens=8)
    found = evaluate_models(
        models, {"student": tokenizer}, questions=questions._replace(answers=answers), scoring=scoring
    )
    measure = by_name(found)["exact_match"]
    assert measure.values["teacher"] == 12 / 16
    assert measure.sums["teacher"].tolist() == [float(i % 4 > 0) for i in range(16)]
    assert [row["teacher"]["text"] for row in found.generated] == texts
    assert found.generated[1]["teacher"]["exact_match"] == 1
    assert found.generated[1]["answers"] == answers[1]
    decoded = tokenizer.batch_decode(questions.prompts, skip_special_tokens=True)
    assert [row["prompt"] for row in found.generated] == decoded
    assert list(by_name(found)) == ["exact_match", "squad_exact_match", "squad_f1"]


def test_gap_recovered_is_0_at_the_base_and_1_at_the_teacher(tokenizer, models, text_dataset):
    for student, share in (("base", 0), ("teacher", 1)):
        sides = {**models, "student": models[student]}
        found = by_name(evaluate_models(sides, {"student": tokenizer}, rows=text_dataset))
        for name in ("perplexity", "kl", "agreement", "acceptance"):
            if (gap := gap_recovered(found[name])) is not None:
                assert gap == pytest.approx((share, share, share), abs=1e-5)
        assert gap_recovered(found["kl"]) is not None


def test_patterns_take_the_answer_out_of_both_texts():
    scoring = Scoring(("exact_match", "number"), pattern=r"<a>(.*?)</a>")
    assert scoring.scores("I think <a>42</a> of 50", ["42"]) == {"exact_match": 1, "number": 1}
    assert scoring.scores("I think <a>42</a>", ["so <a>42</a>!"])["exact_match"] == 1
    assert scoring.scores("42", ["42"]) == {"exact_match": 0, "number": 0}  # no answer where it does not match


def test_prompts_of_messages_go_through_the_template_of_each_tokenizer(tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]}]
    other = make_tokenizer()
    other.chat_template = "{% for message in messages %}Q: {{ message['content'] }} A:{% endfor %}"
    found = questions_of(rows, PromptCollator(tokenizer), PromptCollator(other))
    assert tokenizer.decode(found.prompts[0]) == "<|user|>2 + 2?<eos><|assistant|>"
    assert other.decode(found.teacher_prompts[0]) == "Q: 2 + 2? A:"
    assert found.answers == [["4"]]
    whole = [{"messages": rows[0]["prompt"] + rows[0]["completion"]}]
    assert questions_of(whole, PromptCollator(tokenizer)) == Questions(found.prompts, found.prompts, [["4"]])


def test_the_teacher_alone_reads_knowledge(tokenizer):
    rows = [{"query": "설날에 무엇을 먹나요?", "knowledge": "설날에는 떡국을 먹는다.", "answer": "떡국"}]
    found = questions_of(rows, LUPICollator(tokenizer), answer_column="answer")
    assert "떡국" not in tokenizer.decode(found.prompts[0])
    assert "떡국" in tokenizer.decode(found.teacher_prompts[0])
    assert found.answers == [["떡국"]]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ({"text": ["one", "two"], "answer_start": [0, 4]}, ["one", "two"]),
        (42, ["42"]),
    ],
)
def test_right_answers_come_in_the_forms_of_data_sets(tokenizer, cell, answers):
    rows = [{"prompt": "Q", "gold": cell}]
    assert questions_of(rows, PromptCollator(tokenizer), answer_column="gold").answers == [answers]


def test_prompt_and_right_answer_are_of_the_same_conversation(tokenizer):
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    found = questions_of([{"prompt": "Q", "completion": "A", "messages": messages}], PromptCollator(tokenizer))
    assert found.answers == [["Two."]]
    assert "One?" in tokenizer.decode(found.prompts[0])
    answer = [{"role": "assistant", "content": "A"}]
    found = questions_of([{"completion": answer, "messages": messages[:1]}], PromptCollator(tokenizer))
    assert found.answers == [["A"]]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"prompt": "Q"}, None, "row 0 has no text as its completion"),
        ({"prompt": "Q", "gold": []}, "gold", "row 0 has an empty list of right answers"),
        ({"prompt": "Q", "gold": {"text": [], "answer_start": []}}, "gold", "row 0 has an empty list .* SQuAD v2"),
        ({"prompt": "Q", "gold": None}, "gold", "row 0 has no text in its column 'gold'"),
        ({"prompt": "Q"}, "gold", "row 0 has no column 'gold' with its right answers; its columns are prompt"),
        ({"text": "Q", "gold": "A"}, "gold", "row 0 has no prompt"),
    ],
)
def test_rows_without_a_question_or_an_answer_are_named(tokenizer, row, column, message):
    with pytest.raises(ValueError, match=message):
        questions_of([row], PromptCollator(tokenizer), answer_column=column)


@pytest.mark.parametrize("text", ["<think>\n\n</think>\n\nParis", "Rome? No.\n</think>\nParis", "Paris"])
def test_a_thought_before_an_answer_does_not_count(text):
    """Templates of some models begin the thought in the prompt."""
    scoring = Scoring(["exact_match", "f1"])
    assert scoring.scores(text, ["Paris"]) == {"exact_match": 1, "f1": 1}
    assert scoring.scores("Paris", [text]) == {"exact_match": 1, "f1": 1}
    assert Scoring(["exact_match"], pattern=r"\w+").scores(text, ["Paris"]) == {"exact_match": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["bleu"]}, "there is no metric 'bleu'; there are exact_match, f1, squad, number"),
        ({"metrics": []}, "metrics is empty"),
        ({"pattern": "("}, "is no regular expression"),
        ({"max_new_tokens": 0}, "max_new_tokens has to be at least 1"),
    ],
)
def test_settings_that_cannot_score_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Scoring(**settings)


def test_models_of_other_names_are_refused(tokenizer, models, text_dataset):
    with pytest.raises(ValueError, match="models are a student and, with it, base and teacher; got teacher"):
        evaluate_models({"teacher": models["teacher"]}, {"student": tokenizer}, rows=text_dataset)
