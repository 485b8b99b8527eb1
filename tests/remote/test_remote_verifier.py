"""Rollouts whose drafts a server checks, against rollouts with the same teacher in this process.

Shapes: B rows, C completion tokens, K entries at a position, V vocabulary.
"""

import itertools

import numpy as np
import pytest
import torch

from hf_distill.servers import Scores, TeacherAway
from hf_distill.servers.client import Counts
from hf_distill.speculative import RolloutConfig, rollout, verified_rollout
from hf_distill.teachers.remote_verifier import RemoteVerifier, divergence_of_entries
from tests.conftest import FAMILIES, make_model
from tests.remote.served_model import Sampling, ServedModel
from tests.test_speculative import (
    EOS,
    GREEDY,
    NEW,
    NO_EOS,
    PAD,
    PRIVILEGED,
    PROMPTS,
    VOCAB,
    assert_distribution,
    blocks_of,
    loud_outside,
    make_config,
    make_pair,
    next_probs,
    padded,
    texts,
)

SAMPLED = {"student_temperature": 1.2, "teacher_temperature": 0.8, "teacher_top_p": 0.9}


class Remembering(ServedModel):
    """Computes the log-probabilities of a text once."""

    def __init__(self, model):
        super().__init__(model)
        self.known = {}

    def log_probs(self, ids):
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = super().log_probs(ids)
        return self.known[key]


class Direct:
    """A server without a wire: the answers of [`hf_distill.servers.client.Server`], and a list of what was asked."""

    model = "tiny"

    def __init__(self, model):
        self.served, self.counts = Remembering(model), Counts()
        self.scored, self.starts, self.generated = [], [], []

    def score(self, texts, num_entries, starts=None):
        self.scored.append([list(text) for text in texts])
        self.starts.append(list(starts))
        self.counts.add(requests=1, positions=sum(map(len, texts)))
        return [self._scores(text, num_entries, start) for text, start in zip(texts, starts, strict=True)]

    def _scores(self, text, num_entries, start):
        log_probs = self.served.log_probs(text)[start:-1].numpy()  # (n, V)
        own = np.take_along_axis(log_probs, np.array(text[start + 1 :])[:, None], 1)[:, 0]
        ids = np.argsort(-log_probs, axis=1, kind="stable").astype(np.int32)
        ids = ids if num_entries == -1 else ids[:, :num_entries]
        return Scores(ids, np.take_along_axis(log_probs, ids, 1), own)

    def generate(self, prompts, *, max_tokens, temperature, seeds, top_p=1.0, stop_ids=(), vocab_size=None):
        self.generated += [(list(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        self.counts.add(requests=len(prompts))
        allowed = tuple(range(vocab_size))
        sampling = [
            Sampling(limit, temperature, top_p=top_p, seed=seed, stop_ids=tuple(stop_ids), ignore_eos=True,
                     allowed_ids=allowed)
            for limit, seed in zip(max_tokens, seeds, strict=True)
        ]  # fmt: skip
        return [self.served.generate(prompt, how).ids for prompt, how in zip(prompts, sampling, strict=True)]


def run(
    pair, config, prompts=PROMPTS, teacher_prompts=None, *, entries=20, eos=EOS, seed=0, vocab_size=VOCAB, **kwargs
):
    """The rollout with a server, and the server."""
    student, teacher = pair
    config = config if isinstance(config, RolloutConfig) else make_config(**config)
    server = Direct(teacher)
    verifier = RemoteVerifier(server, entries, *padded(teacher_prompts or prompts), config, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    found = verified_rollout(
        student, verifier, *padded(prompts), config, eos_token_id=eos, pad_token_id=PAD, generator=generator,
        vocab_size=vocab_size, **kwargs,
    )  # fmt: skip
    return found, server


def locally(pair, config, prompts=PROMPTS, teacher_prompts=None, *, eos=EOS, seed=0, vocab_size=VOCAB):
    config = config if isinstance(config, RolloutConfig) else make_config(**config)
    return rollout(
        *pair, *padded(prompts), *padded(teacher_prompts or prompts), config, eos_token_id=eos, pad_token_id=PAD,
        generator=torch.Generator().manual_seed(seed), vocab_size=vocab_size,
    )  # fmt: skip


def assert_same(found, expected):
    """Tokens, masks and blocks, row by row."""
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)
    assert torch.equal(found.drafted_mask, expected.drafted_mask)
    for row in range(len(found.completion_ids)):
        assert blocks_of(found, row) == blocks_of(expected, row)


def assert_evidence(found, model, prompts, tolerance=1e-5):
    """The entries are the most likely tokens, with their log-probabilities, of a clean forward."""
    for i, (prompt, tokens) in enumerate(zip(prompts, texts(found), strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)  # (C, V)
        ids, log_probs = (found.evidence[name][i, : len(tokens)] for name in ("ids", "log_probs"))
        assert torch.allclose(log_probs, expected.gather(1, ids.long()), atol=tolerance)
        assert torch.allclose(log_probs, expected.topk(ids.shape[1]).values, atol=tolerance)


# ---------------------------------------------------------------------------------------- as a teacher in this process

# (top_k, min_prob), draft length and adaptive, teacher's prompts
CASES = [
    ((1, 0.0), (NEW, False), None),
    ((3, 0.02), (4, False), PRIVILEGED),
    ((10, 0.0), (7, True), PRIVILEGED),
    ((VOCAB, 0.03), (NEW, True), None),
    ((3, 0.0), (1, False), None),
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_rollouts_are_token_for_token_those_of_a_local_teacher(family):
    pair = make_pair(family)
    corrected = 0
    for (top_k, min_prob), (draft_length, adaptive), teacher_prompts in CASES:
        rule = {"top_k": top_k, "min_prob": min_prob, "draft_length": draft_length, "adaptive": adaptive, **GREEDY}
        entries = VOCAB if top_k == VOCAB else 10
        found, _ = run(pair, rule, teacher_prompts=teacher_prompts, entries=entries)
        assert_same(found, locally(pair, rule, teacher_prompts=teacher_prompts))
        assert_evidence(found, pair[1], teacher_prompts or PROMPTS)
        corrected += int(found.stats.blocks.corrected.sum())
    assert corrected > 10


@pytest.mark.parametrize("student_top_p", [1.0, 0.8])
def test_sampled_drafts_with_a_greedy_teacher_are_those_of_a_local_one(student_top_p):
    pair = make_pair()
    for seed, draft_length in itertools.product(range(3), (3, NEW)):
        rule = {**GREEDY, "student_temperature": 1.2, "student_top_p": student_top_p, "draft_length": draft_length}
        assert_same(run(pair, rule, seed=seed)[0], locally(pair, rule, seed=seed))


def test_the_teacher_alone_generates_its_greedy_text_and_is_scored_once():
    pair = make_pair()
    found, server = run(pair, {"draft_length": 0, **GREEDY}, teacher_prompts=PRIVILEGED)
    expected = locally(pair, {"draft_length": 0, **GREEDY}, teacher_prompts=PRIVILEGED)
    assert texts(found) == texts(expected)
    assert len(set(map(len, texts(found)))) > 1  # some end early
    assert not found.drafted_mask.any()
    assert_evidence(found, pair[1], PRIVILEGED)
    assert server.scored == [[known + tokens for known, tokens in zip(PRIVILEGED, texts(found), strict=True)]]
    assert len(server.generated) == len(PROMPTS)


def test_the_student_alone_is_scored_once():
    pair = make_pair()
    alone = {"draft_length": NEW, "top_k": VOCAB, **SAMPLED}
    found, server = run(pair, alone, entries=4)
    assert_same(found, locally(pair, alone))
    assert server.scored == [[prompt + tokens for prompt, tokens in zip(PROMPTS, texts(found), strict=True)]]
    assert found.evidence["ids"].shape == (*found.completion_ids.shape, 4)


def test_a_completion_that_is_there_is_scored_once():
    pair = make_pair()
    found = locally(pair, GREEDY)
    lengths = found.completion_mask.sum(1)
    server = Direct(pair[1])
    verifier = RemoteVerifier(server, 6, *padded(PRIVILEGED), make_config(), VOCAB)
    evidence = verifier.read(found.completion_ids, lengths)
    assert_evidence(found._replace(evidence=evidence), pair[1], PRIVILEGED)
    assert len(server.scored) == 1
    assert verifier.asked.positions == sum(map(len, PRIVILEGED)) + int(lengths.sum())


@pytest.mark.parametrize("entries", [20, -1])
def test_a_padded_vocabulary_plays_no_part(entries):
    pair = make_pair(vocab_size=VOCAB + 16)
    for model in pair:
        loud_outside(model, VOCAB)
    config = {**GREEDY, "top_k": 3, "draft_length": NEW}
    found, _ = run(pair, config, entries=entries)
    assert_same(found, locally(pair, config))
    assert int(found.evidence["ids"].max()) < VOCAB
    assert found.completion_ids.max() < VOCAB
    sampled, server = run(pair, {**SAMPLED, "top_k": 3, "draft_length": NEW}, entries=entries)
    assert server.generated
    assert sampled.completion_ids.max() < VOCAB


def test_a_decision_that_hangs_on_unknown_tokens_is_none():
    pair = make_pair(vocab_size=VOCAB + 16)
    for model in pair:
        loud_outside(model, VOCAB)
    with pytest.raises(
        TeacherAway, match=r"3 of the 3 most likely tokens of tiny are outside .* raise teacher_logprobs"
    ):
        run(pair, {**GREEDY, "top_k": 3}, entries=4)


def test_equally_likely_tokens_are_accepted_together():
    """As locally, a token is rejected if `top_k` others are more likely; ranks of equal ones play no part."""
    student, teacher = make_pair()
    with torch.no_grad():
        teacher.lm_head.weight.zero_()  # all tokens are equally likely
    rule = {**GREEDY, "top_k": 1, "draft_length": NEW}
    found, _ = run((student, teacher), rule)
    assert found.drafted_mask.sum() == found.completion_mask.sum()
    assert_same(found, locally((student, teacher), rule))


# -------------------------------------------------------------------------------------------------- sampled corrections


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_corrections_have_the_distribution_of_a_local_teachers(temperature, top_p):
    """Chi-square, at the level 0.001."""
    pair = make_pair(vocab_size=8, noise=0.1)
    prompt, drafts = [3, 5, 2, 6], []
    config = {"top_k": 1, "max_new_tokens": 1, "teacher_temperature": temperature, "teacher_top_p": top_p}
    found, server = run(
        pair, config, [prompt] * 3000, eos=NO_EOS, entries=8, vocab_size=8,
        watch=lambda block: drafts.append(block.drafts[:, 0]),
    )  # fmt: skip
    corrected = ~found.drafted_mask[:, 0]
    assert corrected.sum() > 1000
    assert len({seed for _, seed in server.generated}) == len(server.generated) == int(corrected.sum())
    probs = next_probs(pair[1], prompt, temperature, top_p)
    assert_distribution(found.completion_ids[corrected, 0], probs)
    best = probs.argmax()
    assert (drafts[0][corrected] != best).all()


def test_the_teacher_alone_has_its_own_distribution():
    pair = make_pair(vocab_size=8, noise=0.1)
    prompt, config = [3, 5, 2, 6], {"draft_length": 0, "max_new_tokens": 2, "teacher_temperature": 0.7, "top_k": 8}
    found, _ = run(pair, config, [prompt] * 2000, eos=NO_EOS, entries=8, vocab_size=8)
    assert_distribution(found.completion_ids[:, 0], next_probs(pair[1], prompt, 0.7))
    first = int(found.completion_ids[:, 0].mode().values)
    following = found.completion_ids[found.completion_ids[:, 0] == first, 1]
    assert_distribution(following, next_probs(pair[1], [*prompt, first], 0.7))


def test_a_sampled_text_does_not_depend_on_draft_lengths_or_other_rows():
    pair = make_pair()
    whole, _ = run(pair, {**SAMPLED, "draft_length": NEW})
    assert 0 < whole.drafted_mask.sum() < whole.completion_mask.sum()
    for draft_length, adaptive in ((1, False), (3, False), (5, True)):
        found, _ = run(pair, {**SAMPLED, "draft_length": draft_length, "adaptive": adaptive})
        assert texts(found) == texts(whole)
    assert texts(run(pair, {**SAMPLED, "draft_length": NEW}, PROMPTS[:1])[0]) == texts(whole)[:1]
    assert texts(run(pair, {**SAMPLED, "draft_length": NEW}, seed=1)[0]) != texts(whole)


# ---------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_positions_and_requests_are_those_of_counting(settings):
    pair = make_pair()
    found, server = run(pair, {**settings, "draft_length": NEW}, teacher_prompts=PRIVILEGED)
    # By brute force: what each row wrote before a block, and what it drafted in it.
    expected = 0
    for row, known in enumerate(PRIVILEGED):
        written, rejections = 0, 0
        for _, drafted, accepted, corrected in blocks_of(found, row):
            expected += len(known) + written + drafted
            written += accepted + corrected
            rejections += accepted < drafted
        asked = sum(text[: len(known)] == known for texts in server.scored for text in texts)
        last_is_correction = not found.drafted_mask[row, written - 1]
        assert asked == rejections + 1 - last_is_correction
    assert found.stats.asked.positions == expected == sum(len(t) for texts in server.scored for t in texts)
    assert found.stats.asked.requests == len(server.scored) + len(server.generated)
    assert found.stats.teacher_forwards == len(server.scored)


def test_positions_of_a_local_teacher_are_the_tokens_that_it_reads():
    pair = make_pair()
    for draft_length in (1, 4, NEW):
        found = locally(pair, {**GREEDY, "draft_length": draft_length}, teacher_prompts=PRIVILEGED)
        drafted = int(found.stats.blocks.drafted.sum())
        assert found.stats.asked.positions == sum(map(len, PRIVILEGED)) - len(PRIVILEGED) + drafted
        assert found.stats.asked.requests == 0


def test_rows_that_are_finished_are_not_sent_and_prefixes_not_decoded():
    pair = make_pair()
    found, server = run(pair, {**GREEDY, "draft_length": 3})
    rows = [len(texts) for texts in server.scored]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[-1]
    written = {tuple(prompt): tokens for prompt, tokens in zip(PROMPTS, texts(found), strict=True)}
    for sent, starts in zip(server.scored, server.starts, strict=True):
        for text, start in zip(sent, starts, strict=True):
            # All that is known before the draft has been written.
            prompt, tokens = next((p, w) for p, w in written.items() if text[: len(p)] == list(p))
            assert [*prompt, *tokens][: start + 1] == text[: start + 1]
            assert len(text) - 1 - start <= 3


@pytest.mark.parametrize("entries", [3, 5, 9])
def test_divergence_of_entries_is_that_over_the_tokens_which_both_know(entries):
    torch.manual_seed(0)
    one, other = (3 * torch.randn(20, 9)).log_softmax(-1), (3 * torch.randn(20, 9)).log_softmax(-1)
    tops = [side.topk(entries) for side in (one, other)]
    expected = 0.0
    for row in range(20):
        shared = sorted(set(tops[0].indices[row].tolist()) & set(tops[1].indices[row].tolist()))
        p, q = ([*side[row, shared].exp().tolist()] for side in (one, other))
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        expected += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-6)
    # A token that lacks is another one, whatever stands in its place.
    (p_values, p_ids), (q_values, q_ids) = tops
    p_ids, p_values = torch.cat([p_ids, p_ids[:, :1] * 0 - 1], 1), torch.cat([p_values, p_values[:, :1] * 0 - 1e9], 1)
    found = divergence_of_entries(p_ids, p_values, q_ids, q_values)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    whole = (one.exp() * (one - other)).sum()
    assert found <= whole * (1 + 1e-5)
    assert entries < 9 or found.item() == pytest.approx(whole.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_rules_that_the_answers_cannot_decide_are_refused():
    prompt = padded(PROMPTS[:1])
    server = Direct(make_model(vocab_size=VOCAB))
    with pytest.raises(ValueError, match=r"top_k=25 needs .* asked for 20: .* vllm serve tiny --max-logprobs 25"):
        RemoteVerifier(server, 20, *prompt, make_config(top_k=25), VOCAB)
    with pytest.raises(ValueError, match=r"min_prob=0.1 is a probability at teacher_temperature=0.7"):
        RemoteVerifier(server, 20, *prompt, make_config(min_prob=0.1, teacher_temperature=0.7), VOCAB)
    for config in (
        make_config(top_k=20), make_config(min_prob=0.1, teacher_temperature=0), make_config(min_prob=0.1),
        make_config(top_k=VOCAB, teacher_temperature=0.7),
    ):  # fmt: skip
        RemoteVerifier(server, 20, *prompt, config, VOCAB)
    RemoteVerifier(server, -1, *prompt, make_config(top_k=25), VOCAB)


def test_an_answer_without_a_token_is_no_correction():
    pair = make_pair()
    server = Direct(pair[1])
    server.generate = lambda prompts, **_: [[] for _ in prompts]
    config = make_config(**SAMPLED, top_k=1)
    verifier = RemoteVerifier(server, 20, *padded(PROMPTS), config, VOCAB)
    with pytest.raises(TeacherAway, match=r"tiny was asked for \[1.*\] tokens at most, and wrote \[0"):
        verified_rollout(
            pair[0], verifier, *padded(PROMPTS), config, eos_token_id=EOS, pad_token_id=PAD, vocab_size=VOCAB
        )
