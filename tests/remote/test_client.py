"""The client of servers: what it reads is what the model says, and what is no answer never becomes one."""

import json
import pickle
import time

import numpy as np
import pytest
import torch

from hf_distill.servers import TeacherAway
from hf_distill.servers.client import Server, distance, public_address
from hf_distill.servers.dialects import DIALECTS, VLLM, SGLang
from hf_distill.servers.handshake import Expected, greet
from tests.conftest import make_model
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

TEXTS = [[5, 9, 200, 31, 7], [17, 3], [40, 41, 42, 43, 44, 45, 46, 47]]


@pytest.fixture(params=["vllm", "sglang"])
def dialect(request):
    return request.param


@pytest.fixture
def open_stub(tiny, dialect):
    with Stub(tiny, dialect=dialect, max_logprobs=-1) as stub:
        yield stub


def client(stub, timeout=20.0, **settings):
    dialect = SGLang() if type(stub.dialect).__name__.lower().startswith("sg") else VLLM()
    return Server((stub.url.removesuffix("/v1"),), dialect, "t", timeout=timeout, **settings)


def log_probs(model, ids):
    """(T - 1, V), the log-probabilities of each next token, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.double().log_softmax(-1).numpy()


@pytest.mark.parametrize("num_entries", [1, 5, 384])
def test_scores_are_the_models_own(tiny, open_stub, num_entries):
    for text, scores in zip(TEXTS, client(open_stub).score(TEXTS, num_entries), strict=True):
        truth = log_probs(tiny.model, text)
        expected = -np.sort(-truth, axis=1)[:, :num_entries]
        np.testing.assert_allclose(scores.log_probs, expected, atol=2e-6)
        np.testing.assert_allclose(np.take_along_axis(truth, scores.ids.astype(int), 1), expected, atol=2e-6)
        np.testing.assert_allclose(scores.own, truth[np.arange(len(text) - 1), text[1:]], atol=2e-6)


def test_minus_one_is_the_whole_vocabulary(tiny):
    with Stub(tiny, max_logprobs=-1) as stub:
        (scores,) = client(stub).score(TEXTS[:1], -1)
    assert scores.ids.shape == (4, 384)
    assert (np.sort(scores.ids, 1) == np.arange(384)).all()


def test_only_what_is_asked_for_is_read(open_stub):
    whole = client(open_stub).score(TEXTS, 4)
    for start, text, full, part in zip(
        [3, 0, 5], TEXTS, whole, client(open_stub).score(TEXTS, 4, [3, 0, 5]), strict=True
    ):
        assert len(part.ids) == len(text) - 1 - start
        for side, other in zip(full, part, strict=True):
            np.testing.assert_array_equal(side[start:], other)


def test_addresses_share_the_texts_and_stand_in_for_each_other(tiny, dialect):
    with Stub(tiny, dialect=dialect) as one, Stub(tiny, dialect=dialect) as other:
        server = client(one)
        server.addresses = tuple(stub.url.removesuffix("/v1") for stub in (one, other))
        expected = client(one).score(TEXTS, 3)
        one.requests.clear()
        found = server.score(TEXTS, 3)
        # Which is asked first depends on the process.
        assert sorted(map(sorted, [one.prompts(), other.prompts()])) == sorted(
            [sorted([tuple(TEXTS[0]), tuple(TEXTS[2])]), [tuple(TEXTS[1])]]
        )
        other.kill()
        again = server.score(TEXTS, 3)
    for scores in (found, again):
        for a, b in zip(expected, scores, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.log_probs, b.log_probs)
    assert server.counts.retries >= 1


def test_long_batches_become_several_requests(open_stub, monkeypatch):
    monkeypatch.setattr("hf_distill.servers.client.REQUEST_BYTES", 69 * 3 * 8)
    server = client(open_stub)
    server.score(TEXTS, 3)
    assert server.counts.requests == open_stub.counts["requests"] == 2
    assert server.counts.positions == open_stub.counts["positions"] == sum(map(len, TEXTS))
    assert server.counts.bytes == open_stub.counts["bytes"]


PASSING = {
    "500": ("status", {"status": 500}),
    "503": ("status", {"status": 503}),
    "429": ("status", {"status": 429, "retry_after": 0.3}),
    "429, a date": ("status", {"status": 429, "retry_after": 0.3, "as_date": True}),
    "cut": ("cut", {}),
    "cut inside": ("cut_inside", {}),
    "half JSON": ("half_json", {}),
    "a page": ("html", {}),
    "empty": ("empty", {}),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(open_stub, fault):
    kind, settings = PASSING[fault]
    server = client(open_stub)
    expected = server.score(TEXTS, 3)
    server.take_counts()
    open_stub.fail(kind, times=2, **settings)
    start = time.monotonic()
    for a, b in zip(expected, server.score(TEXTS, 3), strict=True):
        np.testing.assert_array_equal(a.log_probs, b.log_probs)
    assert server.counts.retries == 2
    assert server.counts.requests == 3
    if fault == "429":
        assert time.monotonic() - start >= 0.6


WRONG = {
    "another id": ("wrong_id", {}, "at its place"),
    "NaN": ("value", {"value": "nan"}, "nan is no log-probability"),
    "infinity": ("value", {"value": "inf"}, "no logarithm"),
    "a probability of 2": ("value", {"value": 0.7}, "no logarithm"),
    "a position too few": ("short", {}, "positions"),
    "no field": ("no_field", {}, "there are no"),
    "null": ("null_field", {}, "there are no"),
    "fewer entries": ("capped", {"keep": 1}, "different entries were asked for"),
    "a text too few": ("fewer_rows", {}, "3 texts were sent"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_never_counts(open_stub, fault):
    kind, settings, message = WRONG[fault]
    open_stub.fail(kind, times=None, **settings)
    server = client(open_stub)
    with pytest.raises(TeacherAway, match=message):
        server.score(TEXTS, 4)
    assert server.counts.retries == 0


def test_an_id_that_comes_twice_never_counts(open_stub):
    open_stub.fail("duplicate")
    with pytest.raises(TeacherAway, match="different entries were asked for"):
        client(open_stub).score(TEXTS, 384)


@pytest.mark.parametrize("entry", [None, 3, {"rank": 1}, {"logprob": None}, {"logprob": "low"}])
def test_entries_of_another_form_never_count(open_stub, dialect, entry):
    dialects = {"vllm": VLLM, "sglang": SGLang}

    class Strange(dialects[dialect]):
        def scores(self, answer, *args):
            if dialect == "vllm":
                answer["choices"][0]["prompt_logprobs"][1]["7"] = entry
            else:
                answer[0]["meta_info"]["input_top_logprobs"][1][0] = entry
            return super().scores(answer, *args)

    server = client(open_stub)
    server.dialect = Strange()
    with pytest.raises(TeacherAway, match="wrong answer"):
        server.score(TEXTS, 4)


def test_a_server_that_does_not_stop_is_cut(open_stub, tiny):
    server = client(open_stub)
    (free,) = server.generate([TEXTS[0]], max_tokens=6, temperature=0, seeds=[0])

    class Deaf(type(server.dialect)):
        def generating(self, model, prompt, sampling):
            return super().generating(model, prompt, sampling._replace(stop_ids=()))

    server.dialect = Deaf()
    (ended,) = server.generate([TEXTS[0]], max_tokens=6, temperature=0, seeds=[0], stop_ids=[free[2]])
    assert ended == free[: free.index(free[2]) + 1]


def test_a_long_pause_of_one_address_does_not_keep_the_other_waiting(tiny):
    with Stub(tiny) as one, Stub(tiny) as other:
        server = client(one, timeout=10)
        server.addresses = tuple(stub.url.removesuffix("/v1") for stub in (one, other))
        for stub in (one, other):
            stub.fail("status", status=429, retry_after=3600, times=None if stub is one else 0)
        start = time.monotonic()
        server.score(TEXTS[:1], 3)
        server.score(TEXTS[:1], 3)
        assert time.monotonic() - start < 3


def test_answers_in_another_order_are_put_right(tiny):
    with Stub(tiny) as stub:
        expected = client(stub).score(TEXTS, 3)
        stub.fail("reversed")
        for a, b in zip(expected, client(stub).score(TEXTS, 3), strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)


@pytest.mark.parametrize(
    ("status", "kind"), [(401, "status"), (403, "status"), (404, "status"), (400, "status"), (307, "redirect")]
)
def test_what_does_not_pass_is_told_at_once(open_stub, status, kind):
    open_stub.fail(kind, times=None, status=status)
    server = client(open_stub)
    with pytest.raises(TeacherAway, match=f"HTTP {status}"):
        server.score(TEXTS, 3)
    assert server.counts.requests == 1


def test_the_time_is_limited(open_stub):
    open_stub.fail("status", times=None, status=503)
    start = time.monotonic()
    with pytest.raises(TeacherAway, match=r"has not answered for .*HTTP 503"):
        client(open_stub, timeout=1.5).score(TEXTS, 3)
    assert time.monotonic() - start < 2.5


def test_a_pause_longer_than_the_time_is_not_waited_for(open_stub):
    open_stub.fail("status", times=None, status=429, retry_after=3600)
    start = time.monotonic()
    with pytest.raises(TeacherAway):
        client(open_stub, timeout=1.5).score(TEXTS, 3)
    assert time.monotonic() - start < 2.5


def test_a_slow_answer_may_take_a_third_of_the_time(open_stub):
    open_stub.fail("slow", seconds=3, times=1)
    server = client(open_stub, timeout=6)
    server.score(TEXTS, 3)
    assert server.counts.retries == 1


def test_an_answer_that_drips_may_take_no_longer(open_stub):
    """No silence is long, so that a limit of silences would never end it."""
    expected = client(open_stub).score(TEXTS, 3)
    open_stub.fail("drip", seconds=8, times=None)
    server, start = client(open_stub, timeout=3), time.monotonic()
    with pytest.raises(TeacherAway, match=r"has not answered for .*had not ended in time, after [\d,]+ bytes"):
        server.score(TEXTS, 3)
    assert time.monotonic() - start < 5
    assert server.counts.retries == 1
    open_stub.heal()
    open_stub.fail("drip", seconds=0.5)
    for one, other in zip(client(open_stub).score(TEXTS, 3), expected, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def make_sure(seed):
    """A model whose distributions are far from flat."""
    model = make_model(seed=seed)
    model.lm_head.weight.data.mul_(20)
    return model


def greeted(stub, tiny, **settings):
    server = client(stub, **settings)
    return greet(server, None, None, Expected(384, (5, 9, 200, 31, 7, 3), lambda token: tiny.text([token])))


def test_another_model_after_a_restart_is_noticed(tiny, dialect):
    one, other = (ServedModel(make_sure(seed), tiny.tokenizer, name="t") for seed in (3, 9))
    with Stub(one, dialect=dialect) as stub:
        server = greeted(stub, tiny).server
        stub.kill()
        stub.restart()
        server.score(TEXTS, 3)  # the same one again
        stub.served = other
        with pytest.raises(TeacherAway, match="another model answers now"):
            server.score(TEXTS, 3)


def test_the_distance_is_the_total_variation(tiny, open_stub):
    other = make_sure(9)
    (scores,) = client(open_stub).score(TEXTS[2:], 384)
    probs, others = (np.exp(log_probs(model, TEXTS[2])) for model in (tiny.model, other))
    order = np.argsort(-others, 1)
    theirs = scores._replace(ids=order.astype(np.int32), log_probs=np.log(np.take_along_axis(others, order, 1)))
    top = scores.ids[:, :32].astype(int)
    expected = np.abs(np.take_along_axis(probs - others, top, 1)).sum(1).mean() / 2
    assert distance(scores, theirs) == pytest.approx(expected, rel=1e-5)
    assert distance(scores, scores) == 0


@pytest.mark.parametrize("prompt", TEXTS)
def test_greedy_continuations_are_the_models_own(tiny, open_stub, prompt):
    (found,) = client(open_stub).generate([prompt], max_tokens=6, temperature=0, seeds=[0])
    ids = list(prompt)
    for token in found:
        with torch.no_grad():
            assert token == int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert len(found) == 6


def test_continuations_end_where_they_are_told(tiny, open_stub):
    server = client(open_stub)
    (free,) = server.generate([TEXTS[0]], max_tokens=6, temperature=0, seeds=[0])
    (ended,) = server.generate([TEXTS[0]], max_tokens=6, temperature=0, seeds=[0], stop_ids=[free[2]])
    assert ended == free[: free.index(free[2]) + 1]


def test_sampled_tokens_follow_the_seed_and_the_law_within_the_vocabulary(tiny, open_stub):
    server = client(open_stub)
    draws = 200
    settings = {"max_tokens": 1, "temperature": 1.0, "vocab_size": 300}
    found = server.generate([TEXTS[0]] * draws, seeds=range(draws), **settings)
    assert found[:9] == server.generate([TEXTS[0]] * 9, seeds=range(9), **settings)
    counts = np.bincount([token for (token,) in found], minlength=384)
    assert counts[300:].sum() == 0
    with torch.no_grad():
        probs = tiny.model(torch.tensor([TEXTS[0]])).logits[0, -1, :300].double().softmax(-1).numpy()
    groups = np.arange(300) % 5  # outcomes of about a fifth each
    expected = draws * np.bincount(groups, probs)
    chi_square = ((np.bincount(groups, counts[:300]) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # of 4 degrees of freedom, at 0.1 %


def test_a_client_can_be_pickled_without_its_key(open_stub, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    server = client(open_stub, key_variable="TEACHER_KEY")
    server.score(TEXTS, 3)
    content = pickle.dumps(server)
    assert b"sk-secret" not in content
    pickle.loads(content).score(TEXTS, 3)


def test_the_key_is_sent_and_nothing_else(tiny, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with Stub(tiny, api_key="sk-secret") as stub:
        with pytest.raises(TeacherAway, match="401"):
            client(stub).score(TEXTS, 3)
        client(stub, key_variable="TEACHER_KEY").score(TEXTS, 3)
        body = stub.requests[-1].body
    assert set(body) == {"model", "prompt", "max_tokens", "temperature", "prompt_logprobs"}
    assert body["prompt"] == TEXTS


def test_addresses_are_public_without_user_and_password():
    assert public_address("http://me:sk-secret@host:8000/v1") == "http://host:8000/v1"
    assert public_address("http://host:8000/v1") == "http://host:8000/v1"
    assert public_address("http://me:sk#/?secret@host:8000/v1") == "http://host:8000/v1"
    assert "secret" not in repr(Server(("http://me:sk-secret@host",), VLLM(), "t"))


def test_every_dialect_reads_json_of_its_own_only():
    for dialect in DIALECTS:
        for answer in ({}, [], None, "text", {"choices": 3}, [[]], {"choices": [3]}, json.loads("[{}]")):
            with pytest.raises(ValueError, match=r"texts were sent|there are no"):
                dialect.scores(answer, [[1, 2]], 1, [0])
