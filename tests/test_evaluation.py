import math

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_distill import evaluate_fidelity
from tests.conftest import SENTENCES, make_model


def plain_fidelity(student, teacher, rows, vocab_size):
    """Row by row, from dense float64 logits; rows are (ids, index of the first label)."""
    sums = torch.zeros(5, dtype=torch.float64)
    count = 0
    for ids, start in rows:
        ids = torch.tensor([ids])
        start = max(start, 1)
        with torch.no_grad():
            s, t = (
                m(input_ids=ids).logits[0, start - 1 : -1, :vocab_size].double().log_softmax(-1)
                for m in (student, teacher)
            )
        labels = ids[0, start:].unsqueeze(-1)
        sums += torch.stack(
            [
                -s.gather(-1, labels).sum(),
                -t.gather(-1, labels).sum(),
                (t.exp() * (t - s)).sum(),
                (s.argmax(-1) == t.argmax(-1)).double().sum(),
                torch.minimum(s.exp(), t.exp()).sum(),
            ]
        )
        count += len(labels)
    student_ce, teacher_ce, kl, agreement, acceptance = (sums / count).tolist()
    return {
        "student_perplexity": math.exp(student_ce),
        "teacher_perplexity": math.exp(teacher_ce),
        "kl": kl,
        "agreement": agreement,
        "expected_acceptance": acceptance,
        "num_tokens": count,
    }


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere"])
def test_equals_a_dense_row_by_row_computation_for_any_batch_size(tokenizer, family):
    student = make_model("llama", seed=1, vocab_size=400)  # differently padded heads
    teacher = make_model(family, seed=2)
    expected = plain_fidelity(student, teacher, [(tokenizer(t)["input_ids"], 0) for t in SENTENCES], len(tokenizer))
    for batch_size in (1, 3, 8):
        found = evaluate_fidelity(
            student, teacher, Dataset.from_dict({"text": SENTENCES}), tokenizer, batch_size=batch_size
        )
        assert found == pytest.approx(expected, rel=1e-4)


def test_completions_alone_count_and_the_prompt_does_not(tokenizer, prompt_dataset):
    student, teacher = make_model(seed=1), make_model(seed=2)
    rows = []
    for row in prompt_dataset:
        prompt, ids = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert ids[: len(prompt)] == prompt
        rows.append((ids, len(prompt)))
    expected = plain_fidelity(student, teacher, rows, len(tokenizer))
    assert evaluate_fidelity(student, teacher, prompt_dataset, tokenizer) == pytest.approx(expected, rel=1e-4)


def test_messages_go_through_the_chat_template(tokenizer, messages_dataset):
    student, teacher = make_model(seed=1), make_model(seed=2)
    rows = [(tokenizer.apply_chat_template(row["messages"], return_dict=False), 0) for row in messages_dataset]
    expected = plain_fidelity(student, teacher, rows, len(tokenizer))
    assert evaluate_fidelity(student, teacher, messages_dataset, tokenizer) == pytest.approx(expected, rel=1e-4)


def test_labels_of_tokenised_rows_and_max_length_are_respected(tokenizer):
    student, teacher = make_model(seed=1), make_model(seed=2)
    ids = [tokenizer(t)["input_ids"] for t in SENTENCES]
    labelled = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4 + row[4:] for row in ids]})
    expected = plain_fidelity(student, teacher, [(row[:10], 4) for row in ids], len(tokenizer))
    found = evaluate_fidelity(student, teacher, labelled, tokenizer, max_length=10)
    assert found == pytest.approx(expected, rel=1e-4)


def test_packed_rows_are_measured_document_by_document(tokenizer):
    """As SFTTrainer packs them: several documents in a row, their lengths beside it."""
    student, teacher = make_model(seed=1), make_model(seed=2)
    ids = [tokenizer(t)["input_ids"] for t in SENTENCES]
    expected = plain_fidelity(student, teacher, [(row, 0) for row in ids], len(tokenizer))
    packed = [ids[0] + ids[1] + ids[2], ids[3], ids[4] + ids[5], ids[6] + ids[7]]
    lengths = [[len(ids[i]) for i in group] for group in ([0, 1, 2], [3], [4, 5], [6, 7])]
    dataset = Dataset.from_dict({"input_ids": packed, "labels": packed, "seq_lengths": lengths})
    for batch_size in (1, 3, 8):
        found = evaluate_fidelity(student, teacher, dataset, tokenizer, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-4)


def test_ids_past_the_true_vocabulary_get_no_probability(tokenizer):
    student, teacher = make_model(seed=1), make_model(seed=2)
    rows = [([5, 6, 7, 8, 9, 10], 0)]
    dataset = Dataset.from_dict({"input_ids": [rows[0][0]]})
    found = evaluate_fidelity(student, teacher, dataset, tokenizer, vocab_size=100)
    assert found == pytest.approx(plain_fidelity(student, teacher, rows, 100), rel=1e-4)


def test_a_model_agrees_with_itself(tokenizer):
    model = make_model()
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in SENTENCES))
    result = evaluate_fidelity(model, model, stream, tokenizer)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["agreement"] == 1
    assert result["expected_acceptance"] == pytest.approx(1)


def test_leaves_the_models_in_the_mode_they_were_in(tokenizer, text_dataset):
    student, teacher = make_model(seed=1).train(), make_model(seed=2).eval()
    evaluate_fidelity(student, teacher, text_dataset, tokenizer)
    assert student.training
    assert not teacher.training


def test_rows_without_text_or_labels_are_refused_in_words(tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="columns question"):
        evaluate_fidelity(model, model, Dataset.from_dict({"question": ["?"]}), tokenizer)
    masked = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[-100, -100]]})
    with pytest.raises(ValueError, match="no label-bearing token"):
        evaluate_fidelity(model, model, masked, tokenizer)
