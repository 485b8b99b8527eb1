import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from hf_distill import evaluate_fidelity, evaluation
from hf_distill.evaluation import perplexity, window_length
from hf_distill.losses.fused_linear import Head
from hf_distill.teachers.loading import load_teacher
from hf_distill.token_comparison import compare_tokens
from tests.conftest import SENTENCES, make_model


def plain_fidelity(student, teacher, rows, vocab_size):
    """Row by row, from dense float64 logits; rows are (ids, index of the first label)."""
    sums = torch.zeros(5, dtype=torch.float64)
    count = num_rows = 0
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
        num_rows += len(labels) > 0
    student_ce, teacher_ce, kl, agreement, acceptance = (sums / count).tolist()
    return {
        "student_perplexity": math.exp(student_ce),
        "teacher_perplexity": math.exp(teacher_ce),
        "kl": kl,
        "agreement": agreement,
        "expected_acceptance": acceptance,
        "num_tokens": count,
        "num_rows": num_rows,
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


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_offloaded_teacher_says_what_it_says_on_its_device(tokenizer, text_dataset, family):
    """The head of Qwen2 is tied to its embeddings. The tokens are compared by another function, in a report."""
    student, teacher = make_model(seed=1), make_model(family, seed=2)
    expected = evaluate_fidelity(student, teacher, text_dataset, tokenizer, batch_size=3)
    tokens = compare_tokens(student, teacher, text_dataset, tokenizer)
    offloaded = load_teacher(teacher, device="offload", student_device="cpu")
    assert evaluate_fidelity(student, offloaded, text_dataset, tokenizer, batch_size=3) == pytest.approx(expected)
    assert perplexity(offloaded, text_dataset, tokenizer)["perplexity"] == pytest.approx(expected["teacher_perplexity"])
    found = compare_tokens(student, offloaded, text_dataset, tokenizer)
    for row, other in zip(found.rows, tokens.rows, strict=True):
        assert row.kl == pytest.approx(other.kl)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


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


def test_tokens_that_a_model_does_not_know_are_refused(tokenizer, text_dataset):
    models = make_model(seed=1), make_model(seed=2, vocab_size=100)
    for student, teacher in (models, models[::-1]):
        with pytest.raises(
            ValueError,
            match=r"row 0 of the dataset has token id \d+ at place \d+, but the models have embeddings only for",
        ):
            evaluate_fidelity(student, teacher, text_dataset, tokenizer)


def test_rows_without_text_or_labels_are_refused_in_words(tokenizer):
    model = make_model()
    with pytest.raises(ValueError, match="columns question"):
        evaluate_fidelity(model, model, Dataset.from_dict({"question": ["?"]}), tokenizer)
    masked = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[-100, -100]]})
    with pytest.raises(ValueError, match="no label-bearing token"):
        evaluate_fidelity(model, model, masked, tokenizer)


# ------------------------------------------------------------------------------------------------------- perplexity


def nats_by_hand(model, ids, contexts, vocab_size):
    """Mean nats of the tokens (their index -> the index at which their context begins), each from a forward of its own.

    Only what stands before a token is read, so nothing depends on windows, masks or the order of labels.
    """
    nats = []
    for index, start in contexts.items():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:index]])).logits[0, -1, :vocab_size]
        nats.append(-logits.double().log_softmax(-1)[ids[index]].item())
    return sum(nats) / len(nats)


@pytest.fixture
def long_ids(tokenizer):
    return tokenizer(" ".join(SENTENCES))["input_ids"][:41]


def test_perplexity_is_over_tokens_for_any_batch_size_and_what_fidelity_says(tokenizer, prompt_dataset):
    model = make_model()
    expected = evaluate_fidelity(model, make_model(seed=2), prompt_dataset, tokenizer)
    for batch_size in (1, 3, 16):
        found = perplexity(model, prompt_dataset, tokenizer, batch_size=batch_size)
        assert found["perplexity"] == pytest.approx(expected["student_perplexity"], rel=1e-6)
        assert found["num_tokens"] == expected["num_tokens"]
        assert found["nats_per_token"] == pytest.approx(math.log(found["perplexity"]))


@pytest.mark.parametrize(("max_length", "stride"), [(16, 5), (16, 8), (16, 15), (7, 3), (2, 1), (40, 39), (41, 1)])
def test_a_window_slides_and_counts_every_token_once(tokenizer, long_ids, max_length, stride):
    model = make_model()
    contexts = {}
    for end in [*range(max_length, len(long_ids), stride), len(long_ids)]:
        new = {i: max(0, end - max_length) for i in range(1, end) if i not in contexts}
        contexts |= new
    assert len(contexts) == len(long_ids) - 1
    expected = nats_by_hand(model, long_ids, contexts, len(tokenizer))
    rows = Dataset.from_dict({"input_ids": [long_ids]})
    for batch_size in (1, 4):
        found = perplexity(model, rows, tokenizer, batch_size=batch_size, max_length=max_length, stride=stride)
        assert found["num_tokens"] == len(long_ids) - 1
        assert found["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_a_stride_of_one_gives_every_token_all_the_context_that_fits(tokenizer, long_ids):
    model = make_model()
    contexts = {i: max(0, i - 9) for i in range(1, len(long_ids))}  # ten tokens, the predicted one among them
    expected = nats_by_hand(model, long_ids, contexts, len(tokenizer))
    rows = Dataset.from_dict({"input_ids": [long_ids]})
    found = perplexity(model, rows, tokenizer, max_length=10, stride=1)
    assert found["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_more_context_changes_the_number_and_half_a_window_is_the_default_stride(tokenizer, long_ids):
    model, rows = make_model(), Dataset.from_dict({"input_ids": [long_ids]})
    found = [perplexity(model, rows, tokenizer, max_length=10, stride=s)["nats_per_token"] for s in (1, 5, 9)]
    assert len({round(nats, 4) for nats in found}) == 3
    assert perplexity(model, rows, tokenizer, max_length=10)["nats_per_token"] == found[1]


def test_windows_count_only_completions_and_know_the_prompt(tokenizer, long_ids):
    model = make_model()
    labels = [-100] * 25 + long_ids[25:33] + [-100] * 8
    rows = Dataset.from_dict({"input_ids": [long_ids, long_ids[:9]], "labels": [labels, [-100] * 9]})
    ends = {i: next(e for e in (12, 18, 24, 30, 36) if e > i) for i in range(25, 33)}
    expected = nats_by_hand(model, long_ids, {i: end - 12 for i, end in ends.items()}, len(tokenizer))
    found = perplexity(model, rows, tokenizer, max_length=12, stride=6)
    assert found["num_tokens"] == 8
    assert found["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_the_models_own_positions_are_the_window_by_default(tokenizer, long_ids):
    model = make_model("gpt2", n_positions=24)  # has no embedding for a later position
    rows = Dataset.from_dict({"input_ids": [long_ids]})
    assert perplexity(model, rows, tokenizer) == perplexity(model, rows, tokenizer, max_length=24, stride=12)


def test_stretched_positions_belong_to_the_window():
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    assert window_length(make_model(rope_parameters=yarn), None, 300) == 512


def test_logits_exist_for_one_chunk_of_positions_at_a_time(tokenizer, text_dataset, monkeypatch):
    model, sizes = make_model(), []
    whole = perplexity(model, text_dataset, tokenizer)
    logits = Head.logits
    monkeypatch.setattr(evaluation, "default_chunk_size", lambda *_: 7)
    monkeypatch.setattr(Head, "logits", lambda head, hidden: sizes.append(len(hidden)) or logits(head, hidden))
    assert perplexity(model, text_dataset, tokenizer) == pytest.approx(whole, rel=1e-6)
    assert max(sizes) == 7
    assert sum(sizes) == whole["num_tokens"]


def test_bits_per_character_of_a_uniform_model_are_known(tokenizer):
    """Every token costs log2 V; the characters are those of the counted tokens, not of the first one or a prompt."""
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    bits = math.log2(len(tokenizer))
    text = SENTENCES[0]
    ids = tokenizer(text)["input_ids"]
    characters = len(text) - len(tokenizer.decode(ids[:1]))
    found = perplexity(model, Dataset.from_dict({"text": [text]}), tokenizer)
    assert found["perplexity"] == pytest.approx(len(tokenizer), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx((len(ids) - 1) * bits / characters, rel=1e-5)
    row = {"prompt": "The small dog", "completion": " ran to the river and saw a fish."}
    count = len(tokenizer(row["completion"])["input_ids"])
    found = perplexity(model, Dataset.from_list([row]), tokenizer)
    assert found["num_tokens"] == count
    assert found["bits_per_character"] == pytest.approx(count * bits / len(row["completion"]), rel=1e-5)


def test_there_are_no_bits_per_character_where_the_text_is_not_known(tokenizer, messages_dataset, long_ids):
    for rows in (messages_dataset, Dataset.from_dict({"input_ids": [long_ids], "text": ["something else"]})):
        assert set(perplexity(make_model(), rows, tokenizer)) == {"perplexity", "nats_per_token", "num_tokens"}


def test_adapters_count(tokenizer, text_dataset):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    with_adapters = perplexity(model, text_dataset, tokenizer)["perplexity"]
    with model.disable_adapter():
        without = perplexity(model, text_dataset, tokenizer)["perplexity"]
    assert abs(with_adapters / without - 1) > 1e-3
    merged = perplexity(model.merge_and_unload(), text_dataset, tokenizer)["perplexity"]
    assert with_adapters == pytest.approx(merged, rel=1e-4)


def test_every_part_of_a_model_gets_back_the_mode_it_was_in(tokenizer, text_dataset):
    model = make_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    perplexity(model, text_dataset, tokenizer)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="columns question"):
        perplexity(model, Dataset.from_dict({"question": ["?"]}), tokenizer)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length has to be at least 2"),
        ({"max_length": 8, "stride": 8}, r"below max_length \(8\).*got 8"),
        ({"max_length": 8, "stride": 0}, r"at least 1.*got 0"),
    ],
)
def test_windows_that_would_leave_tokens_out_are_refused(tokenizer, text_dataset, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(make_model(), text_dataset, tokenizer, **options)


def test_rows_without_anything_to_predict_are_refused(tokenizer):
    for ids in ([[5]], [[]]):
        with pytest.raises(ValueError, match="no label-bearing token"):
            perplexity(make_model(), Dataset.from_dict({"input_ids": ids}), tokenizer)


def test_a_model_whose_head_is_not_known_is_refused_before_it_is_measured(tokenizer, text_dataset):
    model, other = make_model(seed=1), make_model(seed=2)
    perplexity(model, text_dataset, tokenizer)
    odd = make_model(seed=1)
    odd.lm_head.register_forward_hook(lambda *args: 2 * args[2])
    with pytest.raises(ValueError, match=r"the model \(LlamaForCausalLM\) does not compute its logits as"):
        perplexity(odd, text_dataset, tokenizer)
    for name, pair in {"student": (odd, other), "teacher": (other, odd)}.items():
        with pytest.raises(ValueError, match=rf"the {name} \(LlamaForCausalLM\) does not compute its logits as"):
            evaluate_fidelity(*pair, text_dataset, tokenizer)
