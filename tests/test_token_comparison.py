"""Student and teacher token by token, against dense float64 logits of one row at a time."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_distill import KDConfig, KDTrainer, evaluate_fidelity
from hf_distill.losses.sparse import SparseSignal, TopKSignal
from hf_distill.losses.sum import SumSignal
from hf_distill.teachers.writing import Method
from hf_distill.token_comparison import ESTIMATE, EXACT, LOWER_BOUND, compare_tokens
from hf_distill.token_data import comparison_data
from tests.conftest import SENTENCES, make_model, make_tokenizer

ROWS = Dataset.from_dict({"text": SENTENCES})


def dense(model, ids, size):
    """Log-probabilities (T - 1, size) in float64 of the tokens after the first."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids])).logits[0, :-1, :size].log_softmax(-1)
    model.float()
    return logits


def by_hand(student, teachers, ids, size):
    """KL, the five likeliest tokens and the probability of the next one of both sides; teachers are mixed."""
    s = dense(student, ids, size)
    t = torch.stack([dense(model, ids, size).exp() * weight for weight, model in teachers]).sum(0).log()
    kl = (t.exp() * (t - s)).sum(-1)
    following = torch.tensor(ids[1:]).unsqueeze(-1)
    return kl, *((side.exp().topk(5), side.exp().gather(-1, following).squeeze(-1)) for side in (s, t))


def check_row(row, expected, places=None):
    kl, *sides = expected
    places = range(1, len(row.input_ids)) if places is None else places
    assert row.places.tolist() == list(places)
    at = [place - 1 for place in places]
    np.testing.assert_allclose(row.kl, kl[at].numpy(), rtol=1e-3, atol=1e-6)
    for found, (likeliest, own) in zip((row.student, row.teacher), sides, strict=True):
        assert found.ids.tolist() == likeliest.indices[at].tolist()
        np.testing.assert_allclose(found.probs, likeliest.values[at].numpy(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.own, own[at].numpy(), rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def models():
    return make_model(seed=1, vocab_size=400), make_model("gemma2", seed=2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_numbers_are_those_of_float64_logits_whatever_the_batch_and_the_chunk(
    models, tokenizer, batch_size, monkeypatch
):
    monkeypatch.setattr("hf_distill.token_comparison.default_chunk_size", lambda *_: 7)
    student, teacher = models
    found = compare_tokens(student, teacher, ROWS, tokenizer, batch_size=batch_size)
    assert (found.kl_is, found.notes, found.num_rows) == (EXACT, [], len(SENTENCES))
    assert [row.number for row in found.rows] == list(range(len(SENTENCES)))
    for row, text in zip(found.rows, SENTENCES, strict=True):
        assert row.input_ids == tokenizer(text)["input_ids"]
        check_row(row, by_hand(student, [(1.0, teacher)], row.input_ids, len(tokenizer)))


def test_their_means_are_the_results_of_an_evaluation(models, tokenizer):
    expected = evaluate_fidelity(*models, ROWS, tokenizer)
    found = compare_tokens(*models, ROWS, tokenizer)
    kl = np.concatenate([row.kl for row in found.rows])
    same = np.concatenate([row.student.ids[:, 0] == row.teacher.ids[:, 0] for row in found.rows])
    assert len(kl) == expected["num_tokens"]
    assert kl.mean() == pytest.approx(expected["kl"], rel=1e-5)
    assert same.mean() == pytest.approx(expected["agreement"])
    own = np.concatenate([row.student.own for row in found.rows])
    assert math.exp(-np.log(own).mean()) == pytest.approx(expected["student_perplexity"], rel=1e-4)
    embedded = [value for row in comparison_data(found)["rows"] for value in row["kl"]]
    assert np.mean(embedded) == pytest.approx(expected["kl"], abs=1e-4)


def test_labels_rows_and_tokens_past_the_limits_are_left_out(models, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES]
    labels = [[-100] * 3 + row[3:] for row in ids]
    labels[1] = [-100] * len(ids[1])
    rows = Dataset.from_dict({"input_ids": ids, "labels": labels})
    found = compare_tokens(*models, rows, tokenizer, max_rows=3, max_tokens=6)
    assert [row.number for row in found.rows] == [0, 2]  # row 1 has no label
    for row in found.rows:
        assert (row.input_ids, row.length) == (ids[row.number][:6], len(ids[row.number]))
        check_row(row, by_hand(models[0], [(1.0, models[1])], ids[row.number], len(tokenizer)), range(3, 6))


def test_documents_of_a_packed_row_are_rows(models, tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES[:2]]
    packed = Dataset.from_list([{"input_ids": [*ids[0], *ids[1]], "seq_lengths": [len(row) for row in ids]}])
    found = compare_tokens(*models, packed, tokenizer)
    assert [(row.number, row.input_ids) for row in found.rows] == [(0, ids[0]), (0, ids[1])]


def test_rows_without_any_label_are_refused(models, tokenizer):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100] * 3]})
    with pytest.raises(ValueError, match="no label-bearing token"):
        compare_tokens(*models, rows, tokenizer)


def make_trainer(tmp_path, teacher, tokenizer, student=None, rows=ROWS, **kwargs):
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none"}
    settings |= kwargs.pop("settings", {})
    student = make_model(seed=1) if student is None else student
    return KDTrainer(
        student, teacher, KDConfig(**settings), rows, eval_dataset=rows, processing_class=tokenizer, **kwargs
    )


def of_trainer(trainer):
    return compare_tokens(
        trainer.model, trainer.teacher, trainer.eval_dataset, trainer.processing_class, vocab_size=trainer.vocab_size
    )


@pytest.mark.parametrize("combination", ["mixture", "sum"])
def test_several_teachers_are_their_mixture(tmp_path, tokenizer, combination):
    teachers = {"a": make_model(seed=2), "b": make_model("gpt2", seed=3)}
    settings = {"teacher_weights": [3.0, 1.0], "teacher_combination": combination}
    trainer = make_trainer(tmp_path, teachers, tokenizer, teacher_processing_class=tokenizer, settings=settings)
    found = of_trainer(trainer)
    assert found.kl_is == EXACT
    assert "several teachers" in found.notes[0]
    mixed = list(zip((0.75, 0.25), teachers.values(), strict=True))
    for row in found.rows:
        check_row(row, by_hand(trainer.model, mixed, row.input_ids, len(tokenizer)))


def test_a_teacher_that_is_the_students_base_is_asked_without_adapters(tmp_path, tokenizer):
    student = make_model(seed=1)
    model = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trainer = make_trainer(tmp_path, "base", tokenizer, student=model)
    found = of_trainer(trainer)
    base = make_model(seed=1)
    for row in found.rows[:2]:
        check_row(row, by_hand(trainer.model, [(1.0, base)], row.input_ids, len(tokenizer)))


def test_a_teacher_may_read_a_prompt_of_its_own(tmp_path, tokenizer):
    words = [text.split(" ", 4) for text in SENTENCES]
    rows = Dataset.from_dict(
        {
            "prompt": [" ".join(row[:4]) for row in words],
            "completion": [" " + row[4] for row in words],
            "teacher_prompt": ["Listen. " + " ".join(row[:4]) for row in words],
        }
    )
    teacher = make_model(seed=2)
    trainer = make_trainer(tmp_path, teacher, tokenizer, rows=rows, teacher_processing_class=tokenizer)
    found = of_trainer(trainer)
    for row, prepared in zip(found.rows, trainer.eval_dataset, strict=True):
        own, count = prepared["teacher_input_ids"], len(row.places)
        t = dense(teacher, own, len(tokenizer))[-count:]
        s = dense(trainer.model, row.input_ids, len(tokenizer))[-count:]
        np.testing.assert_allclose(row.kl, (t.exp() * (t - s)).sum(-1).numpy(), rtol=1e-3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("stores")
    teacher = make_model(seed=2)
    trainer = make_trainer(folder / "run", teacher, tokenizer, teacher_processing_class=tokenizer)
    kinds = {
        "hidden": Method(dtype="float32") if "float32" in str(Method.__doc__) else Method(),
        "sampled": Method("sampled", entries=30.0),
        "topk": Method("topk", entries=20),
    }
    for name, method in kinds.items():
        trainer.write_cache(folder / name, method)
    return folder, teacher


def stored(tmp_path, stores, tokenizer, name):
    trainer = make_trainer(tmp_path, f"cache:{stores[0] / name}", tokenizer)
    return trainer, of_trainer(trainer)


def test_a_store_of_hidden_states_gives_what_its_teacher_would(tmp_path, stores, tokenizer):
    trainer, found = stored(tmp_path, stores, tokenizer, "hidden")
    assert (found.kl_is, found.notes) == (EXACT, [])
    direct = compare_tokens(trainer.model, stores[1], trainer.eval_dataset, tokenizer)
    for row, expected in zip(found.rows, direct.rows, strict=True):
        np.testing.assert_allclose(row.kl, expected.kl, rtol=2e-2, atol=1e-3)  # half precision


def test_a_store_of_the_most_likely_tokens_gives_a_lower_bound(tmp_path, stores, tokenizer):
    trainer, found = stored(tmp_path, stores, tokenizer, "topk")
    assert found.kl_is == LOWER_BOUND
    assert "lower bound" in found.notes[0]
    for row in found.rows:
        kl, (_, _), (likeliest, own) = by_hand(trainer.model, [(1.0, stores[1])], row.input_ids, len(tokenizer))
        assert (row.kl <= kl.numpy() + 1e-3).all()
        s, t = (dense(m, row.input_ids, len(tokenizer)).exp() for m in (trainer.model, stores[1]))
        ids = t.topk(20).indices
        kept = [
            torch.cat([side.gather(-1, ids), 1 - side.gather(-1, ids).sum(-1, keepdim=True)], -1) for side in (s, t)
        ]
        np.testing.assert_allclose(row.kl, (kept[1] * (kept[1] / kept[0]).log()).sum(-1).numpy(), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(row.teacher.probs, likeliest.values.numpy(), rtol=1e-2, atol=1e-3)
        known = ~np.isnan(row.teacher.own)
        np.testing.assert_allclose(row.teacher.own[known], own.numpy()[known], rtol=1e-2, atol=1e-3)


def test_a_store_of_samples_gives_an_estimate_that_is_right_on_average(tmp_path, stores, tokenizer):
    trainer, found = stored(tmp_path, stores, tokenizer, "sampled")
    assert found.kl_is == ESTIMATE
    assert "estimate" in found.notes[0]
    kl = np.concatenate([row.kl for row in found.rows])
    expected = evaluate_fidelity(trainer.model, stores[1], trainer.eval_dataset, tokenizer)["kl"]
    error = kl.std() / math.sqrt(len(kl))
    assert abs(kl.mean() - expected) < 4 * error
    # The trainer's own evaluation has the same sample.
    assert kl.mean() == pytest.approx(trainer.evaluate()["eval_kd"], rel=1e-3)


def test_a_teacher_with_another_tokenizer_has_no_kl_and_says_what_it_expects_where_both_begin(tmp_path, tokenizer):
    other = make_tokenizer(corpus=[text[::-1] for text in SENTENCES])
    teacher = make_model(seed=2)
    trainer = make_trainer(tmp_path, teacher, tokenizer, teacher_processing_class=other)
    found = of_trainer(trainer)
    assert found.kl_is is None
    assert "another tokenizer" in found.notes[0]
    row = found.rows[0]
    own = [*other(SENTENCES[0])["input_ids"], other.eos_token_id]  # as the trainer ends both texts
    expected = dense(teacher, own, len(other)).exp().topk(5)
    assert np.isnan(row.kl).all()
    ends = {len(other.decode(own[: i + 1])): i for i in range(len(own) - 1)}
    seen = 0
    for j, place in enumerate(row.places):
        before = len(tokenizer.decode(row.input_ids[:place]))
        if row.teacher.ids[j, 0] >= 0:
            seen += 1
            assert row.teacher.ids[j].tolist() == expected.indices[ends[before]].tolist()
    assert 0 < seen <= len(row.places)
    data = comparison_data(found)["rows"][0]
    np.testing.assert_allclose(data["surprise"], -np.log(row.student.own), atol=1e-4)
    assert "kl" not in data


class Silent:
    """A teacher of a user's own, with a signal that nobody else knows."""

    name = "silent"

    def prepare(self, dataset, name):
        return dataset

    def collate(self, rows):
        return {}

    def __call__(self, inputs, positions):
        return SumSignal([(1.0, object())])


def test_of_a_teacher_that_says_no_probabilities_only_the_students_side_is_shown(models, tokenizer):
    found = compare_tokens(models[0], Silent(), ROWS, tokenizer)
    assert found.kl_is is None
    assert "does not say its probabilities" in found.notes[0]
    expected = compare_tokens(*models, ROWS, tokenizer)
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert (row.student.ids == other.student.ids).all()
        assert (row.teacher.ids == -1).all()
        assert np.isnan(row.kl).all()


def test_signals_with_few_entries_are_filled_up_with_none(models, tokenizer):
    class Few(Silent):
        def __call__(self, inputs, positions):
            n = len(positions)
            if self.sampled:
                return SparseSignal(torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1), torch.zeros(n))
            return TopKSignal(torch.tensor([[3, -1]]).expand(n, 2), torch.tensor([[-0.1, -math.inf]]).expand(n, 2))

    for sampled in (True, False):
        teacher = Few()
        teacher.sampled = sampled
        for row in compare_tokens(models[0], teacher, ROWS, tokenizer).rows:
            assert (row.teacher.ids[:, 1:] == -1).all()
            assert (row.teacher.ids[:, 0] == (0 if sampled else 3)).all()
            assert np.isfinite(row.kl).all()


def test_a_store_of_samples_at_another_temperature_says_so(tmp_path, tokenizer):
    teacher, settings = make_model(seed=2), {"temperature": 2.0}
    trainer = make_trainer(tmp_path / "run", teacher, tokenizer, teacher_processing_class=tokenizer, settings=settings)
    trainer.write_cache(tmp_path / "store", Method("sampled", entries=30.0))
    reader = make_trainer(tmp_path / "read", f"cache:{tmp_path / 'store'}", tokenizer, settings=settings)
    found = of_trainer(reader)
    (note,) = (note for note in found.notes if "temperature" in note)
    assert "KL are those at 2, the student's probabilities those at 1" in note
    expected = []
    for row in found.rows:
        s, t = ((dense(model, row.input_ids, len(tokenizer)) / 2).log_softmax(-1) for model in (reader.model, teacher))
        expected.append((t.exp() * (t - s)).sum(-1).numpy())
        likeliest = dense(reader.model, row.input_ids, len(tokenizer)).exp().topk(5).values
        np.testing.assert_allclose(row.student.probs, likeliest.numpy(), rtol=1e-4)
    kl, expected = np.concatenate([row.kl for row in found.rows]), np.concatenate(expected)
    assert abs((kl - expected).mean()) < 4 * (kl - expected).std() / math.sqrt(len(kl))
