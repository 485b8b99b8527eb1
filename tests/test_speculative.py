"""Rollouts, against the same rule carried out row by row without a cache (`tests/speculative_oracle.py`).

Shapes: B rows, P prompt tokens, C completion tokens, V vocabulary.
"""

import copy
import gc
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MambaConfig

from hf_distill import verifying
from hf_distill.modeling.probes import remembered
from hf_distill.speculative import Block, RolloutConfig, completion_hidden, rollout, sample
from tests.conftest import FAMILIES, make_model
from tests.speculative_oracle import NARROW, Oracle, softmax

VOCAB, NEW, PAD = 48, 14, 0
EOS = (1, 9, 17, 30, 41)
NO_EOS = VOCAB + 1000  # an id that nobody writes
GREEDY = {"student_temperature": 0.0, "teacher_temperature": 0.0}
SAMPLED = {"student_temperature": 1.2, "teacher_temperature": 0.8, "teacher_top_p": 0.9}
DRAFTS = {"1": {"draft_length": 1}, "4": {"draft_length": 4}, "7": {"draft_length": 7, "adaptive": True}}
# Ragged, some longer than a sliding window of 8.
PROMPTS = [[int(i) for i in torch.randint(2, VOCAB, (n,), generator=torch.manual_seed(n))] for n in (11, 3, 17, 9)]
KNOWLEDGE = [[int(i) for i in torch.randint(2, VOCAB, (n,), generator=torch.manual_seed(n))] for n in (5, 21, 2, 8)]
PRIVILEGED = [known + prompt for known, prompt in zip(KNOWLEDGE, PROMPTS, strict=True)]


def make_pair(family="llama", noise=0.03, vocab_size=VOCAB, **config):
    """A student, and a teacher that is the student with noise on its weights: they agree on most tokens, not on all."""
    student = make_model(family, vocab_size=vocab_size, seed=1, **config)
    teacher = copy.deepcopy(student)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=noise)
    return student, teacher


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def padded(prompts, pad=PAD):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def run(pair, config=None, prompts=PROMPTS, teacher_prompts=None, *, eos=EOS, seed=0, **kwargs):
    if not isinstance(config, RolloutConfig):
        config = make_config(**(config or {}))
    kwargs = {"pad_token_id": PAD, "generator": torch.Generator().manual_seed(seed), **kwargs}
    teacher_ids, teacher_mask = padded(teacher_prompts or prompts)
    return rollout(*pair, *padded(prompts), teacher_ids, teacher_mask, config, eos_token_id=eos, **kwargs)


def make_config(**settings):
    return RolloutConfig(**{"max_new_tokens": NEW, "draft_length": 4, "top_k": 3, **settings})


def noise_of(rows, seed=0, places=NEW):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, places, 2, generator=generator, dtype=torch.float64).numpy()


def expect(oracle, config, prompts=PROMPTS, teacher_prompts=None, eos=EOS, seed=0):
    noise = noise_of(len(prompts), seed, config.max_new_tokens)
    return oracle.write(zip(prompts, teacher_prompts or prompts, strict=True), noise, config, eos)


def texts(found):
    return [ids[mask].tolist() for ids, mask in zip(found.completion_ids, found.completion_mask, strict=True)]


def blocks_of(found, row):
    columns = [column[found.stats.blocks.row == row].tolist() for column in found.stats.blocks[1:]]
    return list(zip(*columns, strict=True))


def rounds(histories):
    """How many rows read what in each round of blocks: (rows, longest draft)."""
    for blocks in itertools.zip_longest(*histories):
        drafted = [block[1] for block in blocks if block is not None]
        yield len(drafted), max(drafted)


def assert_equal_to_oracle(found, expected):
    """Tokens, masks and blocks; returns how many rows have been compared.

    Of adaptive drafts, the blocks of a row depend on all rows.
    """
    clear = [i for i, row in enumerate(expected) if row.margin > NARROW]
    adapt = len({length for row in expected for length, *_ in row.blocks}) > 1
    lengths = found.completion_mask.sum(1).tolist()
    assert found.completion_ids.shape[1] == max(lengths)
    for i in clear:
        assert texts(found)[i] == expected[i].tokens
        assert found.completion_mask[i].tolist() == [j < lengths[i] for j in range(max(lengths))]
        assert found.drafted_mask[i].tolist() == expected[i].is_draft + [False] * (max(lengths) - lengths[i])
        assert (found.completion_ids[i, lengths[i] :] == PAD).all()
        assert blocks_of(found, i) == expected[i].blocks or (adapt and len(clear) < len(expected))
        assert (found.teacher_hidden[i, lengths[i] :] == 0).all()
    if len(clear) == len(expected):
        schedule = list(rounds([row.blocks for row in expected]))
        assert found.stats.student_forwards == sum(longest for _, longest in schedule)
        assert found.stats.teacher_forwards == len(schedule)
    return len(clear)


# ----------------------------------------------------------------------------------------------------- the whole rule

# (top_k, min_prob), draft, temperatures, teacher's prompts, rows: every value at least twice, for every family.
CASES = [
    ((1, 0.0), "4", GREEDY, None, (0, 1, 2, 3)),
    ((3, 0.02), "7", SAMPLED, None, (3, 1, 0)),
    ((10, 0.0), "1", SAMPLED, PRIVILEGED, (2,)),
    ((VOCAB, 0.03), "7", GREEDY, PRIVILEGED, (0, 1, 2, 3)),
    ((10, 0.02), "4", SAMPLED, PRIVILEGED, (1, 0)),
    ((3, 0.0), "7", {**GREEDY, "student_temperature": 1.0, "student_top_p": 0.8}, None, (2, 3)),
]


def compare(oracle, pair, rule, drafts, temperatures, teacher_prompts, rows, seed=0):
    config = make_config(top_k=rule[0], min_prob=rule[1], **DRAFTS[drafts], **temperatures)
    prompts = [PROMPTS[row] for row in rows]
    teacher_prompts = teacher_prompts and [teacher_prompts[row] for row in rows]
    expected = expect(oracle, config, prompts, teacher_prompts, seed=seed)
    compared = assert_equal_to_oracle(run(pair, config, prompts, teacher_prompts, seed=seed), expected)
    return compared, expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_and_blocks_are_those_of_the_rule(family):
    pair = make_pair(family)
    oracle = Oracle(*pair, VOCAB)
    compared, written = 0, []
    for case in CASES:
        count, expected = compare(oracle, pair, *case)
        compared, written = compared + count, written + expected
    assert compared > 0.8 * len(written)
    # What has been compared is worth it: some drafts are kept, some in part, some not; rows end in many ways.
    accepted = [(block[1], block[2]) for row in written for block in row.blocks]
    assert sum(kept == drafted for drafted, kept in accepted) >= 5
    assert sum(kept < drafted for drafted, kept in accepted) >= 5
    assert sum(0 < kept < drafted for drafted, kept in accepted) >= 2
    assert len({len(row.tokens) for row in written}) >= 2


def test_models_that_never_agree_are_written_by_the_rule_too():
    pair = make_model(vocab_size=VOCAB, seed=1), make_model("gpt2", vocab_size=VOCAB, seed=5)
    oracle = Oracle(*pair, VOCAB)
    assert sum(compare(oracle, pair, *case)[0] for case in CASES) > 0.8 * sum(len(case[-1]) for case in CASES)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_whole_cross_product_is_written_by_the_rule(family):
    pair = make_pair(family)
    oracle = Oracle(*pair, VOCAB)
    rules = itertools.product((1, 3, 10, VOCAB), (0.0, 0.03))
    rows = [(0, 1, 2, 3), (2, 0, 3, 1), (2,)]
    compared, total = 0, 0
    for seed, case in enumerate(itertools.product(rules, DRAFTS, (GREEDY, SAMPLED), (None, PRIVILEGED), rows)):
        count, expected = compare(oracle, pair, *case, seed=seed)
        compared, total = compared + count, total + len(expected)
    assert compared > 0.9 * total


def test_teacher_writes_alone_without_a_draft(pair):
    for settings, adaptive in itertools.product((GREEDY, SAMPLED), (False, True)):
        config = make_config(draft_length=0, adaptive=adaptive, **settings)
        expected = expect(Oracle(*pair, VOCAB), config, teacher_prompts=PRIVILEGED)
        found = run(pair, config, teacher_prompts=PRIVILEGED)
        assert assert_equal_to_oracle(found, expected) >= 3
        assert not found.drafted_mask.any()
        assert found.stats.student_forwards == 0


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_does_not_depend_on_draft_length_or_padding(pair, settings):
    expected = texts(run(pair, settings))
    for draft_length, adaptive in itertools.product((1, 2, 5, NEW, 50), (False, True)):
        assert texts(run(pair, {**settings, "draft_length": draft_length, "adaptive": adaptive})) == expected
    ids, mask = padded(PROMPTS)
    wide = [torch.nn.functional.pad(tensor, (6, 0), value=value) for tensor, value in ((ids, 33), (mask, 0))]
    found = rollout(
        *pair, *wide, ids, mask.bool(), make_config(**settings), eos_token_id=EOS, pad_token_id=PAD,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert texts(found) == expected


def test_rows_do_not_depend_on_the_rows_beside_them(pair):
    # Greedy: the random numbers of a row are those of its place in the batch.
    alone = [texts(run(pair, GREEDY, [prompt]))[0] for prompt in PROMPTS]
    assert texts(run(pair, GREEDY)) == alone
    assert texts(run(pair, GREEDY, PROMPTS[::-1])) == alone[::-1]
    assert texts(run(pair, {**GREEDY, "draft_length": 7, "adaptive": True}, PROMPTS * 3)) == alone * 3
    # Sampled: the first row of a batch has the first numbers.
    batch = texts(run(pair, SAMPLED))[0]
    assert texts(run(pair, SAMPLED, PROMPTS[:1])) == [batch]
    assert texts(run(pair, SAMPLED, [PROMPTS[0], PROMPTS[3]]))[0] == batch


# ------------------------------------------------------------------------------------------- the rule, from the results


def check_rule(found, pair, config, prompts, teacher_prompts, slack=1e-4):
    """Reads every finished text at once and holds each token against the rule; counts kept and corrected tokens."""
    counts = [0, 0]
    student, teacher = pair
    for prompt, known, tokens, is_draft in zip(prompts, teacher_prompts, texts(found), found.drafted_mask, strict=True):
        own, checked = (
            model(input_ids=torch.tensor([text + tokens])).logits[0, len(text) - 1 : -1].detach().double()
            for model, text in ((student, prompt), (teacher, known))
        )
        for j, token in enumerate(tokens):
            worst = checked[j].topk(config.top_k).values[-1]
            prob = (checked[j] / (config.teacher_temperature or 1.0)).softmax(-1)
            if is_draft[j]:
                assert checked[j, token] >= worst - slack
                assert prob[token] >= config.min_prob - slack
                assert config.student_temperature or own[j, token] >= own[j].max() - slack
            elif config.student_temperature == 0:
                wanted = own[j].argmax()  # has been drafted here, and rejected
                assert checked[j, wanted] <= worst + slack or prob[wanted] <= config.min_prob + slack
            if not is_draft[j] and config.teacher_temperature == 0:
                assert checked[j, token] >= checked[j].max() - slack
            counts[not is_draft[j]] += 1
    return counts


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_token_stands_up_to_the_rule(family, settings):
    pair = make_pair(family)
    counts = torch.zeros(2)
    for top_k, min_prob in ((1, 0.0), (5, 0.0), (VOCAB, 0.03), (4, 0.03)):
        config = make_config(top_k=top_k, min_prob=min_prob, max_new_tokens=24, **settings)
        found = run(pair, config, teacher_prompts=PRIVILEGED, eos=NO_EOS)
        counts += torch.tensor(check_rule(found, pair, config, PROMPTS, PRIVILEGED))
    assert counts.sum() == 4 * 4 * 24
    assert counts.min() > 20


def test_min_prob_is_taken_at_the_teachers_temperature(pair):
    """The least probability decides: of a teacher with a temperature at this one, of a greedy one at 1."""
    prompt = PROMPTS[0]
    logits = pair[1](input_ids=torch.tensor([prompt])).logits[0, -1].detach().double()
    token = pair[0](input_ids=torch.tensor([prompt])).logits[0, -1].argmax()
    for temperature, used in ((0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (3.0, 3.0)):
        prob = (logits / used).softmax(-1)[token].item()
        for min_prob, is_kept in ((prob * 0.99, True), (prob * 1.01, False)):
            config = make_config(
                top_k=VOCAB, min_prob=min_prob, max_new_tokens=1, teacher_temperature=temperature,
                student_temperature=0.0, teacher_top_p=0.7,
            )  # fmt: skip
            assert run(pair, config, [prompt]).drafted_mask.tolist() == [[is_kept]]
    # At least: with one token there is only the probability 1.
    assert run(pair, {"top_k": 1, "min_prob": 1.0}, vocab_size=1).drafted_mask.all()


# -------------------------------------------------------------------------------------------------------------- limits


def test_whatever_the_student_writes_is_kept_if_every_token_is_acceptable(pair):
    student, other = pair[0], make_model("gpt2", vocab_size=VOCAB, seed=9)
    oracle = Oracle(student, other, VOCAB)
    for draft_length, settings in itertools.product((1, 5, NEW), (SAMPLED, {"student_top_p": 0.7}, GREEDY)):
        config = make_config(draft_length=draft_length, top_k=VOCAB, **settings)
        found = run((student, other), config, teacher_prompts=PRIVILEGED)
        noise = noise_of(len(PROMPTS))
        for i, prompt in enumerate(PROMPTS):
            oracle.margin, tokens = 1.0, []
            while len(tokens) < NEW and not set(tokens) & set(EOS):
                logits = oracle.logits("student", prompt + tokens)
                uniform = noise[i, len(tokens), 0]
                tokens.append(oracle.draw(logits, uniform, config.student_temperature, config.student_top_p))
            assert texts(found)[i] == tokens or oracle.margin < NARROW
        assert torch.equal(found.drafted_mask, found.completion_mask)


@pytest.mark.parametrize("student_temperature", [0.0, 1.0])
def test_a_greedy_teacher_with_top_k_1_writes_its_own_text(pair, student_temperature):
    for draft_length in (0, 1, 4):
        found = run(
            pair, teacher_prompts=PRIVILEGED,
            config={"draft_length": draft_length, "top_k": 1, **GREEDY, "student_temperature": student_temperature},
        )  # fmt: skip
        ids, mask = padded(PRIVILEGED)
        expected = pair[1].generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=list(EOS),
            pad_token_id=PAD,
        )[:, ids.shape[1] :]  # fmt: skip
        assert torch.equal(found.completion_ids, expected)
        assert found.drafted_mask.any() == (draft_length > 0)


# Quantiles of the chi-square distribution at 0.999, by degrees of freedom.
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


def assert_distribution(tokens, probs):
    """Chi-square test of tokens (n,) against probabilities (V,), at the level 0.001."""
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    possible = probs > 0
    assert (counts[~possible] == 0).all()
    assert (probs[possible] * len(tokens)).min() >= 5, "too few rows for this test"
    expected = probs[possible] * len(tokens)
    assert ((counts[possible] - expected) ** 2 / expected).sum() < CRITICAL[int(possible.sum()) - 1]


@pytest.fixture(scope="module")
def small_pair():
    return make_pair(vocab_size=8, noise=0.1)


def next_probs(model, text, temperature=1.0, top_p=1.0):
    logits = model(input_ids=torch.tensor([text])).logits[0, -1].detach().double()
    probs = (logits / temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    keep = order[: int((ordered.cumsum(0) < top_p).sum()) + 1]
    return torch.zeros_like(probs).index_copy(0, keep, probs[keep]) / probs[keep].sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_drafts_have_the_students_distribution(small_pair, temperature, top_p):
    prompt, config = [3, 5, 2, 6], {"top_k": 8, "max_new_tokens": 2}
    config |= {"student_temperature": temperature, "student_top_p": top_p}
    found = run(small_pair, config, [prompt] * 4000, eos=NO_EOS).completion_ids
    assert_distribution(found[:, 0], next_probs(small_pair[0], prompt, temperature, top_p))
    first = int(found[:, 0].mode().values)
    following = found[found[:, 0] == first, 1]
    assert_distribution(following, next_probs(small_pair[0], [*prompt, first], temperature, top_p))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_corrections_have_the_teachers_distribution_whatever_was_rejected(small_pair, temperature, top_p):
    prompt, drafts = [3, 5, 2, 6], []
    config = {"top_k": 8, "min_prob": 1.0, "max_new_tokens": 1, "teacher_temperature": temperature}
    found = run(
        small_pair, {**config, "teacher_top_p": top_p}, [prompt] * 4000, eos=NO_EOS,
        watch=lambda block: drafts.append(block.drafts[:, 0]),
    )  # fmt: skip
    assert not found.drafted_mask.any()
    probs = next_probs(small_pair[1], prompt, temperature, top_p)
    assert_distribution(found.completion_ids[:, 0], probs)
    rejected = drafts[0] == drafts[0].mode().values
    assert_distribution(found.completion_ids[rejected, 0], probs)
    assert_distribution(drafts[0], next_probs(small_pair[0], prompt))


def test_two_places_of_a_row_and_two_rows_are_drawn_independently():
    """A student whose next token is the same in every context: its text has to be independent draws."""
    student = make_model(vocab_size=4, seed=3)
    with torch.no_grad():
        student.model.norm.weight.zero_()  # all logits 0
    found = run((student, student), {"top_k": 4, "max_new_tokens": 2}, [[2]] * 4000, eos=NO_EOS).completion_ids
    assert_distribution(found[:, 0] + 4 * (found[:, 1] // 2), torch.full((8,), 1 / 8).double())
    assert_distribution(found[:-1:2, 0] + 4 * (found[1::2, 0] // 2), torch.full((8,), 1 / 8).double())


def test_sample_inverts_the_distribution_function():
    logits = torch.tensor([0.1, 0.2, 0.4, 0.0, 0.3]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.5, 0.7001, 1 - 1e-12], dtype=torch.float64)
    assert sample(logits, uniform, 1.0, 1.0).tolist() == [0, 0, 1, 2, 4, 4]
    assert sample(logits, uniform, 0.0, 0.5).tolist() == [2] * 6
    # 0.4 and 0.3 reach 0.7; with 0.71 a third token is needed.
    assert sample(logits, uniform, 1.0, 0.69).tolist() == [2, 2, 2, 2, 4, 4]
    assert sample(logits, uniform, 1.0, 0.71).tolist() == [1, 1, 1, 2, 4, 4]
    assert sample(logits, uniform, 1.0, 1e-6).tolist() == [2] * 6
    edges = torch.tensor([1.0, 5.0, 21.0, 21.0, 30.0]) / 30  # of the squares
    expected = [int((edges[:-1] <= u).sum()) for u in uniform]
    assert sample(logits, uniform, 0.5, 1.0).tolist() == expected


# --------------------------------------------------------------------------------------------------------- end of text


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("is_drafted", [True, False], ids=["drafted", "correction"])
def test_any_end_of_text_ends_a_row_and_belongs_to_it(pair, settings, is_drafted):
    whole = run(pair, settings, eos=NO_EOS)
    expected = texts(whole)
    assert [len(row) for row in expected] == [NEW] * 4
    # The last token of this kind that the row has not had before.
    row, place = next(
        (i, j)
        for i, j in itertools.product(range(4), range(NEW - 1, 0, -1))
        if bool(whole.drafted_mask[i, j]) == is_drafted and expected[i][j] not in expected[i][:j]
    )
    eos = expected[row][place]
    for ids in (eos, [eos], [NO_EOS, eos], (eos, 10**6)):
        found = run(pair, settings, eos=ids)
        assert texts(found)[row] == expected[row][: place + 1]
        assert bool(found.drafted_mask[row, place]) == is_drafted
        for other in range(4):
            end = expected[other].index(eos) + 1 if eos in expected[other] else NEW
            assert texts(found)[other] == expected[other][:end]
    # Two ids at once: each row ends at the first of them.
    second = expected[(row + 1) % 4][1]
    ends = [next((j + 1 for j, token in enumerate(text) if token in (eos, second)), NEW) for text in expected]
    assert texts(run(pair, settings, eos=[eos, second])) == [
        text[:end] for text, end in zip(expected, ends, strict=True)
    ]


def test_a_row_goes_on_after_an_end_of_text_that_was_rejected(pair):
    rejected = []

    def watch(block):
        for row, draft, drafted, accepted in zip(*block[:4], strict=True):
            if accepted < drafted:
                rejected.append((int(row), int(draft[accepted])))

    expected = texts(run(pair, GREEDY, eos=NO_EOS, watch=watch))
    row, eos = next((row, token) for row, token in rejected if token not in expected[row])
    found = run(pair, GREEDY, eos=eos)
    assert texts(found)[row] == expected[row]
    assert len(expected[row]) == NEW


def test_first_token_can_end_all_rows(pair):
    found = run(pair, GREEDY, eos=list(range(VOCAB)))
    assert found.completion_ids.shape == (4, 1)
    assert found.completion_mask.all()
    assert (found.stats.student_forwards, found.stats.teacher_forwards) == (1, 1)


def test_padding_may_be_the_end_of_text(pair):
    found = run(pair, GREEDY)
    again = run(pair, GREEDY, pad_token_id=EOS[0])
    assert texts(again) == texts(found)
    assert (again.completion_ids[~again.completion_mask] == EOS[0]).all()


# -------------------------------------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_teacher_hidden_is_that_of_a_clean_forward_on_its_own_prompt(family):
    pair, lengths = make_pair(family), set()
    for settings in ({**GREEDY, "draft_length": 5}, {**SAMPLED, "draft_length": 7, "adaptive": True}):
        found = run(pair, settings, teacher_prompts=PRIVILEGED)
        for i, tokens in enumerate(texts(found)):
            lengths.add(len(tokens))
            states = pair[1].base_model(input_ids=torch.tensor([PRIVILEGED[i] + tokens])).last_hidden_state[0]
            expected = states[len(PRIVILEGED[i]) - 1 : -1]
            assert torch.allclose(found.teacher_hidden[i, : len(tokens)], expected, atol=1e-5)
            assert (found.teacher_hidden[i, len(tokens) :] == 0).all()
        assert not found.teacher_hidden.requires_grad
    assert len(lengths) > 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_completion_hidden_is_that_of_a_clean_forward(family):
    model = make_model(family, vocab_size=VOCAB).train()
    completions = [[5, 6, 7, 8], [9], [10, 11], [12, 13, 14, 15]]
    ids = torch.tensor([row + [PAD] * (4 - len(row)) for row in completions])
    for width in (4, 1):
        found = completion_hidden(model, *padded(PRIVILEGED), ids[:, :width])
        assert found.shape == (4, width, 32)
        for i, row in enumerate(completions):
            row = row[:width]
            states = model.eval().base_model(input_ids=torch.tensor([PRIVILEGED[i] + row])).last_hidden_state[0]
            assert torch.allclose(found[i, : len(row)], states[len(PRIVILEGED[i]) - 1 : -1], atol=1e-5)
        model.train()


def test_padding_beyond_the_embedding_is_never_read(pair):
    """A tokenizer may have added its padding token at the end; a model that has not been resized has no row for it."""
    outside = VOCAB + 3
    expected = run(pair, SAMPLED)
    found = rollout(
        *pair, *padded(PROMPTS, outside), *padded(PROMPTS, outside), make_config(**SAMPLED), eos_token_id=EOS,
        pad_token_id=outside, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert texts(found) == texts(expected)
    hidden = completion_hidden(pair[1], *padded(PROMPTS, outside), found.completion_ids)
    mask = found.completion_mask
    assert torch.allclose(hidden[mask], expected.teacher_hidden[mask], atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- forwards


def test_rows_that_are_finished_are_not_read_any_more(pair, monkeypatch):
    run(pair)  # models are tried out the first time
    seen = {"student": [], "teacher": []}
    for side, model in zip(seen, pair, strict=True):
        forward = model.base_model.forward

        def counting(*args, _forward=forward, _seen=seen[side], **kwargs):
            _seen.append(kwargs["input_ids"].shape)
            return _forward(*args, **kwargs)

        monkeypatch.setattr(model.base_model, "forward", counting)
    for drafts in DRAFTS.values():
        for shapes in seen.values():
            shapes.clear()
        config = make_config(top_k=10, **SAMPLED, **drafts)
        found = run(pair, config, teacher_prompts=PRIVILEGED)
        assert len({len(text) for text in texts(found)}) > 1
        schedule = list(rounds([blocks_of(found, i) for i in range(4)]))
        assert [shape[0] for shape in seen["teacher"]] == [rows for rows, _ in schedule]
        assert [shape[0] for shape in seen["student"]] == [rows for rows, longest in schedule for _ in range(longest)]
        # After the prompt the teacher reads the token that it has not read yet, and all but the last of the draft.
        assert [shape[1] for shape in seen["teacher"][1:]] == [longest for _, longest in schedule[1:]]
        assert found.stats.teacher_forwards == len(seen["teacher"])
        assert found.stats.student_forwards == len(seen["student"])
        # The student reads a prompt once, then a token at a time.
        assert all(width <= 2 for _, width in seen["student"][1:])


def test_blocks_say_what_was_written(pair):
    seen = []
    found = run(pair, {**SAMPLED, "draft_length": 7, "adaptive": True}, watch=seen.append)
    blocks = found.stats.blocks
    assert all(isinstance(block, Block) for block in seen)
    assert all(len(column) == len(blocks.row) for column in blocks)
    assert torch.cat([block.rows for block in seen]).tolist() == blocks.row.tolist()
    assert torch.cat([block.accepted for block in seen]).tolist() == blocks.accepted.tolist()
    assert torch.cat([block.drafted for block in seen]).tolist() == blocks.drafted.tolist()
    assert found.stats.seconds > 0
    for i in range(4):
        text = []
        for block in seen:
            for j in (block.rows == i).nonzero().flatten().tolist():
                text += block.drafts[j, : block.accepted[j]].tolist()
                if block.accepted[j] < block.drafted[j]:
                    text.append(int(block.corrections[j]))
        assert text == texts(found)[i]
        history = blocks_of(found, i)
        assert sum(accepted + corrected for _, _, accepted, corrected in history) == len(text)
        assert sum(accepted for _, _, accepted, _ in history) == int(found.drafted_mask[i].sum())
    own = [7] * 4
    for block in itertools.zip_longest(*(blocks_of(found, i) for i in range(4))):
        going = [i for i, row in enumerate(block) if row is not None]
        expected = math.ceil(sum(own[i] for i in going) / len(going))
        for i in going:
            length, _, accepted, corrected = block[i]
            assert length == expected
            own[i] = max(1, accepted + 1) if corrected else min(7, length + 2)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_in_training_write_the_same_and_stay_in_training(family):
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5} if family == "gpt2" else {"attention_dropout": 0.5}
    pair = make_pair(family, **dropout)
    expected = run(pair, SAMPLED, teacher_prompts=PRIVILEGED)
    for model in pair:
        model.train()
        model.gradient_checkpointing_enable()
    frozen = next(iter(pair[0].base_model.children()))
    frozen.eval()
    flags = [[module.training for module in model.modules()] for model in pair]
    found = run(pair, SAMPLED, teacher_prompts=PRIVILEGED)
    assert texts(found) == texts(expected)
    assert torch.equal(found.teacher_hidden, expected.teacher_hidden)
    assert [[module.training for module in model.modules()] for model in pair] == flags
    assert not frozen.training
    assert all(model.is_gradient_checkpointing for model in pair)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pair[0].parameters())


def test_models_stay_in_training_after_an_error(pair):
    def fail(block):
        raise KeyError("stop")

    student = copy.deepcopy(pair[0]).train()
    with pytest.raises(KeyError, match="stop"):
        run((student, pair[1]), GREEDY, watch=fail)
    assert all(module.training for module in student.modules())
    assert not pair[1].training


def test_a_student_with_adapters_writes_what_it_writes_when_they_are_merged(pair):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_dropout=0.5, init_lora_weights=False)
    student = get_peft_model(copy.deepcopy(pair[0]), config).train()
    found = run((student, pair[1]), SAMPLED, teacher_prompts=PRIVILEGED)
    assert texts(found) != texts(run(pair, SAMPLED, teacher_prompts=PRIVILEGED))
    assert student.training
    merged = copy.deepcopy(student).merge_and_unload().eval()
    assert texts(found) == texts(run((merged, pair[1]), SAMPLED, teacher_prompts=PRIVILEGED))
    # The teacher may have adapters, too.
    assert texts(run((pair[0], student), GREEDY)) == texts(run((pair[0], merged), GREEDY))


def test_student_and_teacher_may_be_one_model(pair):
    found = run((pair[0], pair[0]), {"top_k": 1, **GREEDY})
    assert torch.equal(found.drafted_mask, found.completion_mask)


def test_a_teacher_in_half_precision_checks_a_student_in_full(pair):
    half = pair[0], copy.deepcopy(pair[1]).to(torch.bfloat16)
    config = make_config(max_new_tokens=24, min_prob=0.02, **GREEDY)
    found = run(half, config, teacher_prompts=PRIVILEGED, eos=NO_EOS)
    assert found.teacher_hidden.dtype == torch.bfloat16
    kept, corrected = check_rule(found, half, config, PROMPTS, PRIVILEGED, slack=0.1)
    assert min(kept, corrected) > 3
    again = run(half, {"max_new_tokens": 24, **SAMPLED}, teacher_prompts=PRIVILEGED)
    for i, tokens in enumerate(texts(again)):
        states = half[1].base_model(input_ids=torch.tensor([PRIVILEGED[i] + tokens])).last_hidden_state[0]
        expected = states[len(PRIVILEGED[i]) - 1 : -1].float()
        assert (again.teacher_hidden[i, : len(tokens)].float() - expected).norm() < 0.05 * expected.norm()


# ----------------------------------------------------------------------------------------------------------- randomness


def test_one_seed_gives_one_text_and_the_global_generator_is_left_alone(pair):
    state = torch.random.get_rng_state()
    first, second, other = (run(pair, SAMPLED, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.teacher_hidden, second.teacher_hidden)
    assert texts(first) != texts(other)


def test_a_generator_goes_on_from_call_to_call(pair):
    generator = torch.Generator().manual_seed(5)
    first, second = (run(pair, SAMPLED, generator=generator) for _ in range(2))
    assert texts(first) == texts(run(pair, SAMPLED, seed=5))
    assert texts(first) != texts(second)
    # One table, whatever is written: a row that ends early does not shift the numbers of the next call.
    generator.manual_seed(5)
    run(pair, {**SAMPLED, "draft_length": 1}, generator=generator, eos=list(range(VOCAB)))
    assert texts(run(pair, SAMPLED, generator=generator)) == texts(second)


def test_the_global_generator_is_used_where_none_is_given(pair):
    torch.manual_seed(5)
    first = run(pair, SAMPLED, generator=None)
    assert texts(run(pair, SAMPLED, generator=None)) != texts(first)
    torch.manual_seed(5)
    assert texts(run(pair, SAMPLED, generator=None)) == texts(first)


# ----------------------------------------------------------------------------------------------------------- vocabulary


def loud_outside(model, vocab_size):
    """Makes the tokens from `vocab_size` on the most likely ones."""
    with torch.no_grad():
        model.get_output_embeddings().weight[vocab_size:] *= 20
    return model


def test_tokens_outside_of_the_vocabulary_are_never_written():
    pair = [loud_outside(model, 40) for model in make_pair()]
    for settings, top_k in [(GREEDY, 3), (SAMPLED, 1), (SAMPLED, 40)]:
        config = make_config(top_k=top_k, **settings)
        assert max(token for text in texts(run(pair, config)) for token in text) >= 40
        found = run(pair, config, vocab_size=40)
        assert found.completion_ids.max() < 40
        expected = expect(Oracle(*pair, 40), config)
        assert assert_equal_to_oracle(found, expected) >= 3


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_heads_of_different_sizes_share_the_tokens_of_the_smaller(larger):
    small, large = make_pair()[0], loud_outside(make_model(vocab_size=VOCAB + 16, seed=3), VOCAB)
    pair = (large, small) if larger == "student" else (small, large)
    for settings, top_k in [(GREEDY, 3), (SAMPLED, VOCAB)]:
        config = make_config(top_k=top_k, **settings)
        assert assert_equal_to_oracle(run(pair, config), expect(Oracle(*pair, VOCAB), config)) >= 3


def test_a_bias_of_the_head_counts_and_is_cut_with_it():
    pair = make_pair("phi")
    for model, seed in zip(pair, (0, 1), strict=True):
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.lm_head.bias)
        with torch.no_grad():
            model.lm_head.bias[40:] += 20
    config = make_config(**SAMPLED)
    found = run(pair, config, vocab_size=40, seed=1)
    assert assert_equal_to_oracle(found, expect(Oracle(*pair, 40), config, seed=1)) >= 3


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens has to be at least 1, got 0"),
        ({"draft_length": -1}, "draft_length has to be at least 0, got -1"),
        ({"top_k": 0}, "top_k has to be at least 1, got 0"),
        ({"min_prob": -0.1}, r"min_prob has to lie in \[0, 1\], got -0.1"),
        ({"min_prob": 1.1}, "min_prob has to lie in"),
        ({"min_prob": float("nan")}, "min_prob has to lie in"),
        ({"student_temperature": -1.0}, "student_temperature has to be at least 0"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature has to be .* finite, got inf"),
        ({"teacher_temperature": float("nan")}, "teacher_temperature has to be"),
        ({"student_top_p": 0.0}, r"student_top_p has to lie in \(0, 1\], got 0.0"),
        ({"teacher_top_p": 1.5}, "teacher_top_p has to lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": {"top_k": VOCAB + 1}}, "top_k=49 is more than the vocabulary has tokens"),
        ({"config": {"top_k": 30}, "vocab_size": 20}, "top_k=30 is more than the vocabulary has tokens"),
        ({"vocab_size": VOCAB + 1}, r"vocab_size has to lie in \[1, 48\]"),
        ({"vocab_size": 0}, "vocab_size has to lie in"),
        ({"eos": []}, "eos_token_id is missing"),
        ({"eos": None}, "eos_token_id is missing"),
        ({"eos": [1, None]}, "eos_token_id is missing"),
        ({"prompts": [[3, 4], []]}, "the student's prompt of row 1 is empty"),
        ({"teacher_prompts": [[3], [], [4], []]}, "the teacher's prompt of row 1 is empty"),
        ({"prompts": [[3]]}, "1 student prompts, but 4 teacher prompts"),
        ({"prompts": [[3, VOCAB]] * 4}, "the student's prompts have token id 48"),
        ({"teacher_prompts": [[3]] * 3 + [[VOCAB + 2]]}, "the teacher's prompts have token id 50"),
        ({"prompts": [[3] * 243] * 4}, "make 257 tokens, but the student has 256 positions"),
        ({"teacher_prompts": [[3] * 300] + [[3]] * 3}, "make 314 tokens, but the teacher has 256 positions"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_bad_input_is_refused_in_words(pair, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(pair, **{"teacher_prompts": PROMPTS, **kwargs})


def test_masks_and_ends_of_text_may_be_of_any_type(pair):
    ids, mask = padded(PROMPTS)
    expected = run(pair, GREEDY, eos=[1, 5]).completion_ids
    for eos, masks in ((torch.tensor([1, 5]), mask.bool()), (np.array([1, 5]), mask.float())):
        found = rollout(*pair, ids, masks, ids, masks, make_config(**GREEDY), eos_token_id=eos, pad_token_id=PAD)
        assert torch.equal(found.completion_ids, expected)
    assert run(pair, eos=np.int64(1)).completion_ids.numel()
    with pytest.raises(ValueError, match="pad_token_id is missing"):
        rollout(*pair, ids, mask, ids, mask, make_config(), eos_token_id=1, pad_token_id=None)


def test_hidden_states_of_completions_are_refused_for_prompts_that_are_no_tokens(pair):
    ids, mask = padded(PROMPTS)
    for strange in (-1, VOCAB):
        with pytest.raises(ValueError, match=f"the model's prompts have token id {strange}"):
            completion_hidden(pair[0], torch.where(mask.bool(), strange, ids), mask, ids)


def test_the_last_position_can_be_written(pair):
    assert texts(run(pair, GREEDY, [[3] * (256 - NEW)], eos=NO_EOS))[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_at_its_last_position_waits_while_others_draft_on(family):
    """A table of positions ends there, and the row is read with the others all the same."""
    pair = make_pair(family, noise=0.08)
    prompts = [prompt + [5] * (256 - NEW - len(prompt)) for prompt in PROMPTS]
    config = make_config(**GREEDY)
    expected = expect(Oracle(*pair, VOCAB), config, prompts, eos=[NO_EOS])
    assert len({len(row.blocks) for row in expected}) > 1
    assert assert_equal_to_oracle(run(pair, config, prompts, eos=NO_EOS), expected) == len(prompts)


def test_stretched_positions_can_be_written_and_no_more(pair):
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    stretched = make_model("llama", vocab_size=VOCAB, rope_parameters=yarn)
    run((stretched, stretched), GREEDY, [[3] * (512 - NEW)], eos=NO_EOS)
    with pytest.raises(ValueError, match="make 513 tokens, but the student has 512 positions"):
        run((stretched, stretched), GREEDY, [[3] * (513 - NEW)])


def test_texts_end_where_a_rotary_embedding_changes():
    """Keys in a cache were rotated as those of a short text; up to there the text is that of fresh forwards."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    pair = make_pair("phi3", original_max_position_embeddings=40, rope_parameters=rope, noise=0.08)
    config = make_config(**GREEDY)
    prompts = [[5] * (40 - NEW), [7] * (40 - NEW), [9, 5]]
    expected = expect(Oracle(*pair, VOCAB), config, prompts, eos=[NO_EOS])
    assert assert_equal_to_oracle(run(pair, config, prompts, eos=NO_EOS), expected) == len(prompts)
    with pytest.raises(ValueError, match=r"make 41 tokens, but the student has 40 positions \(with longrope"):
        run(pair, config, [[5] * (41 - NEW)])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_malformed_prompts_are_refused_in_words(pair, side):
    ids, mask = padded(PROMPTS)
    for bad, message in (
        ((ids, mask.flip(1)), f"the {side}'s prompts have to be padded on the left"),
        ((ids, torch.ones_like(mask).index_fill(1, torch.tensor([4]), 0)), "padded on the left"),
        ((ids, mask[:, 1:]), f"{side}_prompt_ids and {side}_prompt_mask have to have one shape"),
        ((ids[0], mask[0]), "have to have one shape"),
        ((ids[:0], mask[:0]), "have to have one shape"),
        ((ids[:, :0], mask[:, :0]), f"the {side}'s prompt of row 0 is empty"),
    ):
        prompts = (*bad, ids, mask) if side == "student" else (ids, mask, *bad)
        with pytest.raises(ValueError, match=message):
            rollout(*pair, *prompts, make_config(), eos_token_id=1, pad_token_id=PAD)


def test_oracle_softmax_is_torchs():
    logits = torch.tensor([1.0, 1000.0, 998.5], dtype=torch.float64)
    assert torch.allclose(torch.from_numpy(softmax(logits.numpy())), logits.softmax(0))


# ----------------------------------------------------------------------------------------------- models that do not fit


def recurrent():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_recurrent_model_is_refused_before_it_writes_without_history(pair, side):
    models = {"student": pair[0], "teacher": pair[1], side: recurrent()}
    with pytest.raises(ValueError, match=rf"the {side} \(MambaForCausalLM\) cannot take back what it has read"):
        run(tuple(models.values()))
    if side == "student":
        run(tuple(models.values()), make_config(draft_length=0))  # it is not read
    ids, mask = padded(PROMPTS)
    with pytest.raises(ValueError, match="cannot take back what it has read"):
        completion_hidden(recurrent(), ids, mask, ids)


def test_a_head_that_is_not_known_is_refused(pair):
    student = copy.deepcopy(pair[0])
    student.lm_head.register_forward_hook(lambda *args: 2 * args[2])
    with pytest.raises(ValueError, match=r"the student \(\w+\) does not compute its logits as"):
        run((student, pair[1]))


def test_a_model_is_tried_out_once(monkeypatch):
    calls = []

    @remembered
    def head(model, name):
        calls.append(("head", model))

    @remembered
    def cache(model, name):
        calls.append(("cache", model))

    monkeypatch.setattr(verifying, "check_head", head)
    monkeypatch.setattr(verifying, "check_cache", cache)
    models = make_pair()
    for _ in range(2):
        run(models)
    student, teacher = models
    assert calls == [("head", teacher), ("cache", teacher), ("head", student), ("cache", student)]
    dead = weakref.ref(student)
    del models, student, calls[:]
    gc.collect()
    assert dead() is None  # nothing remembers a model that nobody uses
