"""The stub server: its numbers against transformers in float64, its answers, its refusals and its faults.

Tests with `server` also run against a real vLLM where one is given (see conftest.py): the stub's shapes are vLLM's.
"""

import copy
import email.utils
import http.client
import itertools
import time
import urllib.error

import pytest
import torch

from tests.conftest import make_model
from tests.remote.conftest import ask
from tests.remote.faults import KINDS_OF_ANSWER
from tests.remote.served_model import Sampling, ServedModel
from tests.remote.stub import Stub, launch


def truth_of(served: ServedModel, ids):
    """Log-probabilities `(N, V)` in float64."""
    with torch.no_grad():
        model = copy.deepcopy(served.model).double()
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def some_ids(served: ServedModel, *shape: int, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, served.vocab_size, shape, generator=generator).tolist()


def score(server, prompt, **more):
    body = {"model": server.truth.name, "prompt": prompt, "max_tokens": 1, "temperature": 0.0} | more
    status, answer = server.ask("/v1/completions", body)
    assert status == 200, answer
    return answer["choices"]


def refusal(server, **body):
    status, answer = server.ask("/v1/completions", {"model": server.truth.name} | body)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == status
    return status, answer["error"]


class TestScoring:
    def test_log_probabilities_are_those_of_the_model(self, server):
        ids = some_ids(server.truth, 24)
        rows = score(server, ids, prompt_logprobs=5)[0]["prompt_logprobs"]
        expected = truth_of(server.truth, ids)
        assert rows[0] is None
        assert len(rows) == len(ids)
        for position, row in enumerate(rows[1:], start=1):
            for id, entry in row.items():
                assert entry["logprob"] == pytest.approx(float(expected[position - 1, int(id)]), abs=server.tolerance)

    def test_the_whole_vocabulary_sums_to_one(self, server):
        ids = some_ids(server.truth, 12)
        rows = score(server, ids, prompt_logprobs=-1)[0]["prompt_logprobs"]
        for row in rows[1:]:
            assert len(row) == server.truth.vocab_size
            assert sum(torch.tensor([e["logprob"] for e in row.values()]).double().exp()) == pytest.approx(1, abs=1e-4)

    def test_entries_are_k_or_one_more_with_the_actual_token_first(self, server):
        ids = some_ids(server.truth, 40)
        expected = truth_of(server.truth, ids)
        rows = score(server, ids, prompt_logprobs=3)[0]["prompt_logprobs"]
        outside = 0
        for position, row in enumerate(rows[1:], start=1):
            actual, log_probs = ids[position], expected[position - 1]
            assert next(iter(row)) == str(actual)
            rank = int((log_probs >= log_probs[actual]).sum())
            assert abs(row[str(actual)]["rank"] - rank) <= server.ties
            assert len(row) == (4 if rank > 3 else 3)
            assert set(map(int, row)) == {actual, *log_probs.topk(3).indices.tolist()}
            outside += rank > 3
        assert outside

    def test_rows_of_a_batch_equal_rows_alone(self, server):
        batch = [some_ids(server.truth, length, seed=length) for length in (7, 21, 13)]
        together = score(server, batch, prompt_logprobs=4)
        assert [choice["index"] for choice in together] == [0, 1, 2]
        for ids, choice in zip(batch, together, strict=True):
            alone = score(server, ids, prompt_logprobs=4)[0]["prompt_logprobs"]
            for one, other in zip(alone[1:], choice["prompt_logprobs"][1:], strict=True):
                values = [[row[str(id)]["logprob"] for id in map(int, one)] for row in (one, other)]
                difference = max(abs(a - b) for a, b in zip(*values, strict=True))
                assert difference <= server.between_batches

    def test_temperature_does_not_reach_the_prompt(self, server):
        ids = some_ids(server.truth, 9)
        cold, warm = (score(server, ids, prompt_logprobs=2, temperature=t)[0]["prompt_logprobs"] for t in (0.0, 2.0))
        for one, other in zip(cold[1:], warm[1:], strict=True):
            for id in one:
                assert one[id]["logprob"] == pytest.approx(other[id]["logprob"], abs=1e-4)

    def test_a_prompt_of_one_token_has_one_null(self, server):
        assert score(server, some_ids(server.truth, 1), prompt_logprobs=2)[0]["prompt_logprobs"] == [None]

    def test_ids_come_back_where_asked_for(self, server):
        ids = some_ids(server.truth, 6)
        choice = score(server, ids, prompt_logprobs=1, return_token_ids=True)[0]
        assert choice["prompt_token_ids"] == ids
        assert len(choice["token_ids"]) == 1
        assert score(server, ids)[0]["prompt_token_ids"] is None

    def test_echo_hides_the_token_that_is_generated_all_the_same(self, server):
        ids = some_ids(server.truth, 6)
        choice = score(server, ids, max_tokens=0, echo=True, prompt_logprobs=1, return_token_ids=True)[0]
        assert choice["prompt_token_ids"] == ids
        assert len(choice["prompt_logprobs"]) == 6
        assert (choice["text"], len(choice["token_ids"])) == ("", 1)


class TestGeneration:
    def test_greedy_tokens_are_the_models(self, server):
        ids = some_ids(server.truth, 8)
        choice = score(server, ids, max_tokens=6, ignore_eos=True, return_token_ids=True)[0]
        found = list(ids)
        for _ in range(6):
            found.append(int(truth_of(server.truth, found)[-1].argmax()))
        assert choice["token_ids"] == found[8:]
        assert choice["finish_reason"] == "length"

    def test_log_probabilities_of_generated_tokens_are_raw(self, server):
        ids = some_ids(server.truth, 8)
        more = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
        choice = score(server, ids, max_tokens=3, logprobs=2, temperature=0.5, seed=1, **more)[0]
        expected = truth_of(server.truth, ids + choice["token_ids"])[7:-1]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]
        for place, id in enumerate(choice["token_ids"]):
            assert logprobs["token_logprobs"][place] == pytest.approx(float(expected[place, id]), abs=server.tolerance)
            wanted = {f"token_id:{id}", *(f"token_id:{i}" for i in expected[place].topk(2).indices.tolist())}
            assert set(logprobs["top_logprobs"][place]) == wanted

    def test_a_stop_id_ends_the_row_and_is_named(self, server):
        ids = some_ids(server.truth, 8)
        stop = int(truth_of(server.truth, ids)[-1].argmax())
        choice = score(server, ids, max_tokens=6, stop_token_ids=[stop], return_token_ids=True)[0]
        assert choice["token_ids"] == [stop]
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] == stop

    def test_a_seed_makes_the_same_tokens(self, server):
        ids = some_ids(server.truth, 8)
        how = {"max_tokens": 8, "temperature": 1.0, "return_token_ids": True, "ignore_eos": True}
        one, same, other = (score(server, ids, seed=seed, **how)[0]["token_ids"] for seed in (5, 5, 6))
        assert one == same
        assert one != other

    def test_allowed_ids_are_the_only_ones(self, server):
        ids = some_ids(server.truth, 8)
        choice = score(
            server, ids, max_tokens=5, temperature=1.0, allowed_token_ids=[7, 9], seed=0, return_token_ids=True
        )[0]
        assert set(choice["token_ids"]) <= {7, 9}

    def test_sampled_tokens_follow_the_softmax(self, tiny):
        ids = some_ids(tiny, 8)
        how = [Sampling(max_tokens=1, seed=seed, top_k=4, temperature=0.7) for seed in range(200)]
        drawn = torch.tensor([tiny.generate(ids, each).ids[0] for each in how])
        values, top = truth_of(tiny, ids)[-1].topk(4)
        expected = (values / 0.7).softmax(-1) * len(how)
        counts = torch.tensor([int((drawn == id).sum()) for id in top])
        assert int(counts.sum()) == len(how)
        assert float(((counts - expected) ** 2 / expected).sum()) < 16.27  # chi-square, 3 degrees of freedom, 0.1 %


class TestRefusals:
    def test_more_log_probabilities_than_allowed(self, server):
        most = server.truth.vocab_size
        status, error = refusal(server, prompt=[5, 6, 7], max_tokens=1, prompt_logprobs=most + 1)
        assert status == 400
        assert error["type"] == "BadRequestError"
        assert error["param"] == "prompt_logprobs"
        assert error["message"].startswith(
            f"Requested prompt logprobs of {most + 1}, which is greater than max allowed"
        )

    def test_the_limit_is_twenty_by_default(self, stub):
        for number in (21, -1):
            status, answer = ask(
                f"{stub.url}/completions", {"prompt": [5, 6], "max_tokens": 1, "prompt_logprobs": number}
            )
            assert status == 400
            assert "which is greater than max allowed: 20 (" in answer["error"]["message"]

    def test_no_tokens_without_echo(self, server):
        status, error = refusal(server, prompt=[5, 6, 7], max_tokens=0)
        assert status == 400
        assert error["message"] == "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"

    def test_more_tokens_than_the_context_has(self, server):
        most = server.truth.max_model_len
        status, error = refusal(server, prompt=[5, 6, 7], max_tokens=most + 1)
        assert (status, error["param"]) == (400, "max_tokens")
        ids = some_ids(server.truth, most - 2)
        choice = score(server, ids, max_tokens=9, ignore_eos=True, return_token_ids=True)[0]
        assert len(choice["token_ids"]) == 2  # cut to what fits

    def test_empty_prompts(self, server):
        assert refusal(server, prompt=[], max_tokens=1)[1]["message"] == "You must pass at least one prompt"
        assert refusal(server, prompt=[[], [5]], max_tokens=1)[1]["message"] == "The decoder prompt cannot be empty"

    def test_an_id_outside_of_the_vocabulary(self, server):
        outside = server.truth.vocab_size
        status, error = refusal(server, prompt=[5, outside], max_tokens=1)
        assert status == 400
        assert str(outside) in error["message"]

    def test_a_prompt_may_fill_the_context_but_for_one_token(self, server):
        most = server.truth.max_model_len
        ids = some_ids(server.truth, most)
        assert len(score(server, ids[:-1], prompt_logprobs=1)[0]["prompt_logprobs"]) == most - 1
        status, error = refusal(server, prompt=ids, max_tokens=0, echo=True)
        assert status == 400
        assert error["message"].startswith(f"The decoder prompt (length {most}) plus")
        status, error = refusal(server, prompt=ids, max_tokens=1)
        assert status == 400
        assert error["message"] == "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"
        status, error = refusal(server, prompt=[*ids, 5], max_tokens=1)
        assert status == 400
        assert error["message"].startswith(
            f"This model's maximum context length is {most} tokens. However, your prompt"
        )

    def test_another_model(self, server):
        status, error = refusal(server, model="another", prompt=[5, 6], max_tokens=1)
        assert status == 404
        assert error["type"] == "NotFoundError"
        assert error["message"].startswith("The model `another` does not exist.")

    def test_a_wrong_key(self, tiny):
        with Stub(tiny, api_key="secret") as stub:
            status, answer = ask(f"{stub.url}/models")
            assert (status, answer) == (401, {"error": "Unauthorized"})
            assert ask(f"{stub.url}/models", Authorization="Bearer secret")[0] == 200
            assert ask(stub.url.removesuffix("/v1") + "/version")[0] == 200
            assert all("secret" not in str(seen) for seen in stub.requests)

    def test_the_model_card_tells_name_and_context(self, server):
        status, answer = server.ask("/v1/models")
        assert status == 200
        card = answer["data"][0]
        assert (card["id"], card["max_model_len"]) == (server.truth.name, server.truth.max_model_len)
        assert card["owned_by"] == "vllm"
        assert set(server.ask("/version")[1]) == {"version"}
        assert server.ask("/nowhere")[0] == 404


class TestSGLang:
    @pytest.fixture
    def sglang(self, tiny):
        with Stub(tiny, dialect="sglang") as stub:
            yield stub

    def generate(self, stub, **body):
        return ask(stub.url.removesuffix("/v1") + "/generate", body)

    def test_log_probabilities_are_those_of_the_model(self, sglang, tiny):
        ids = [*some_ids(tiny, 10), tiny.vocab_size - 1]
        body = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 4}
        status, answer = self.generate(sglang, input_ids=ids, sampling_params={"max_new_tokens": 0}, **body)
        assert status == 200
        meta = answer["meta_info"]
        assert meta["prompt_tokens"] == 11
        assert meta["input_token_logprobs"][0] == [None, ids[0], None]
        assert meta["input_top_logprobs"][0] is None
        expected = truth_of(tiny, ids)
        for position in range(1, 11):
            value, id, text = meta["input_token_logprobs"][position]
            assert value == pytest.approx(float(expected[position - 1, ids[position]]), abs=1e-6)
            assert id == (ids[position] if position < 10 else 0)  # its last id comes back as 0
            assert text is None
            top = meta["input_top_logprobs"][position]
            values, indices = expected[position - 1].topk(4)
            assert [entry[1] for entry in top] == indices.tolist()
            assert [entry[0] for entry in top] == pytest.approx(values.tolist(), abs=1e-6)

    def test_a_batch_is_a_list(self, sglang, tiny):
        rows = [some_ids(tiny, 5), some_ids(tiny, 8)]
        body = {"return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 1}
        _, answer = self.generate(sglang, input_ids=rows, sampling_params={"max_new_tokens": 2}, **body)
        assert [len(each["meta_info"]["input_token_logprobs"]) for each in answer] == [3, 6]
        assert all(each["meta_info"]["input_token_logprobs"][0][0] is None for each in answer)
        assert [len(each["output_ids"]) for each in answer] == [2, 2]

    def test_refusals(self, sglang, tiny):
        ids = some_ids(tiny, tiny.max_model_len)
        status, answer = self.generate(sglang, input_ids=ids, sampling_params={"max_new_tokens": 0})
        assert status == 400
        assert "is longer than the model's context length" in answer["error"]["message"]
        status, answer = self.generate(sglang, input_ids=[tiny.vocab_size], sampling_params={"max_new_tokens": 0})
        assert status == 400
        assert "greater than the vocab size" in answer["error"]["message"]

    @pytest.mark.parametrize("kind", KINDS_OF_ANSWER)
    def test_faults_change_the_answer(self, sglang, tiny, kind):
        body = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 4}
        body |= {"input_ids": [some_ids(tiny, 6)] * 2}
        body |= {"sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        right = self.generate(sglang, **body)[1]
        sglang.fail(kind)
        wrong = self.generate(sglang, **body)[1]
        for answer in (*right, *wrong):
            for name in ("id", "e2e_latency"):
                answer["meta_info"].pop(name)
        assert (str(right) != str(wrong)) == (kind != "reversed")  # the two rows are the same ones


class TestFaults:
    def scored(self, stub, **more):
        body = {"prompt": [[5, 6, 7, 8], [9, 10, 11, 12]], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 3}
        return ask(f"{stub.url}/completions", body | {"return_token_ids": True} | more)

    def test_hit_the_requests_that_they_are_meant_for(self, stub):
        stub.fail("status", status=503, times=2, every=2, after=1)
        assert [self.scored(stub)[0] for _ in range(7)] == [200, 200, 503, 200, 503, 200, 200]
        assert stub.counts["faults"] == 2
        stub.fail("status", status=500, times=None)
        assert {self.scored(stub)[0] for _ in range(3)} == {500}
        assert ask(f"{stub.url}/models")[0] == 200
        stub.heal()
        assert self.scored(stub)[0] == 200

    def test_errors_tell_when_to_come_back(self, stub):
        for settings in ({"retry_after": 2}, {"retry_after": 2, "as_date": True}):
            stub.fail("status", status=429, **settings)
            connection = http.client.HTTPConnection("127.0.0.1", stub.port)
            connection.request("POST", "/v1/completions", b"{}")
            answer = connection.getresponse()
            assert answer.status == 429
            told = answer.headers["Retry-After"]
            seconds = float(told) if told == "2" else email.utils.parsedate_to_datetime(told).timestamp() - time.time()
            assert 0 < seconds <= 2
            connection.close()

    def test_a_slow_answer_is_right(self, stub):
        stub.fail("slow", seconds=0.3)
        start = time.monotonic()
        assert self.scored(stub)[0] == 200
        assert time.monotonic() - start >= 0.3

    def test_broken_answers(self, stub):
        stub.fail("cut")
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            self.scored(stub)
        stub.fail("cut_inside")
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            self.scored(stub)
        stub.fail("half_json")
        status, text = self.scored(stub)
        assert status == 200
        assert text.startswith('{"id"')
        stub.fail("html")
        assert self.scored(stub)[1].startswith("<html>")
        stub.fail("empty")
        assert self.scored(stub) == (200, None)
        stub.fail("redirect")
        assert self.scored(stub)[0] == 307
        assert self.scored(stub)[0] == 200

    def test_wrong_answers(self, stub):
        right = self.scored(stub)[1]["choices"]

        def wrong(kind, **settings):
            stub.fail(kind, **settings)
            return self.scored(stub)[1]["choices"]

        def first(choices):
            return choices[0]["prompt_logprobs"]

        value = next(iter(first(wrong("value", value="nan", position=2))[2].values()))["logprob"]
        assert value != value
        assert next(iter(first(wrong("value", value="inf"))[1].values()))["logprob"] == float("inf")
        assert next(iter(first(wrong("value", value=0.25))[1].values()))["logprob"] == 0.25
        other = wrong("wrong_id", position=2)
        assert other[0]["prompt_token_ids"] == [5, 6, 8, 8]
        assert next(iter(first(other)[2])) == "8"
        assert len(first(wrong("short", positions=2))) == 2
        assert "prompt_logprobs" not in wrong("no_field")[0]
        assert first(wrong("null_field")) is None
        assert all(len(row) <= 2 for row in first(wrong("capped", keep=1))[1:])
        assert len(first(wrong("duplicate"))[1]) < len(first(right)[1])
        assert wrong("outside")[0]["token_ids"] == [stub.served.vocab_size + 3]
        assert wrong("no_tokens")[0]["token_ids"] == []
        assert len(wrong("fewer_rows")) == 1
        assert [choice["index"] for choice in wrong("reversed")] == [1, 0]
        assert first(self.scored(stub)[1]["choices"]) == first(right)

    def test_an_unknown_kind_is_refused(self, stub):
        with pytest.raises(ValueError, match="unknown fault 'slowly'"):
            stub.fail("slowly")


class TestRunning:
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2}

    def test_requests_are_counted_and_remembered(self, stub):
        ask(f"{stub.url}/models", Authorization="Bearer private")
        ask(f"{stub.url}/completions", self.body | {"prompt": [[5, 6], [7, 8, 9]]})
        counts = stub.counts
        assert (counts["requests"], counts["positions"], counts["generated"]) == (1, 5, 2)
        assert counts["bytes"] > 500
        assert counts["most_in_flight"] == 1
        assert stub.prompts() == [(5, 6), (7, 8, 9)]
        assert [(seen.method, seen.path, seen.status) for seen in stub.requests] == [
            ("GET", "/v1/models", 200),
            ("POST", "/v1/completions", 200),
        ]
        assert stub.requests[0].headers["Authorization"] == "***"

    def test_another_model_or_name_answers_at_once(self, stub, tiny):
        one = ask(f"{stub.url}/completions", self.body)[1]
        stub.served = ServedModel(make_model(seed=9), name="t")
        other = ask(f"{stub.url}/completions", self.body)[1]
        assert one["choices"][0]["prompt_logprobs"] != other["choices"][0]["prompt_logprobs"]
        stub.served = ServedModel(tiny.model, tiny.tokenizer, name="u")
        assert ask(f"{stub.url}/completions", self.body | {"model": "t"})[0] == 404

    def test_a_killed_stub_refuses_and_starts_again_on_its_port(self, stub):
        connection = http.client.HTTPConnection("127.0.0.1", stub.port)
        connection.request("GET", "/v1/models")
        connection.getresponse().read()
        before = ask(f"{stub.url}/completions", self.body)[1]["choices"]
        for _ in range(3):
            stub.kill()
            with pytest.raises(urllib.error.URLError, match="refused"):
                ask(f"{stub.url}/models")
            stub.restart()
            assert ask(f"{stub.url}/completions", self.body)[1]["choices"] == before
        assert connection.sock.recv(1) == b""  # the other end is closed

    def test_defaults_of_the_server_hold_where_a_request_has_none(self, tiny):
        with Stub(tiny, defaults={"temperature": 0.0}) as stub:
            body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
            greedy = ask(f"{stub.url}/completions", body | {"temperature": 0})[1]["choices"][0]["token_ids"]
            assert ask(f"{stub.url}/completions", body)[1]["choices"][0]["token_ids"] == greedy
            warm = (body | {"temperature": 2.0, "seed": seed} for seed in itertools.count())
            found = (ask(f"{stub.url}/completions", each)[1]["choices"][0]["token_ids"] for each in warm)
            assert any(ids != greedy for ids in itertools.islice(found, 4))

    @pytest.mark.slow
    def test_a_process_of_its_own_gives_the_same_bits(self, tiny, tmp_path):
        tiny.model.save_pretrained(tmp_path)
        tiny.tokenizer.save_pretrained(tmp_path)
        with Stub(tiny) as here, launch(tmp_path) as there:
            for _ in range(2):
                one, other = (ask(f"{stub.url}/completions", self.body)[1]["choices"] for stub in (here, there))
                assert one == other
                there.kill()
                there.restart()
            there.fail("status", status=503)
            assert ask(f"{there.url}/completions", self.body)[0] == 503
            assert there.counts["faults"] == 1
            assert there.prompts() == []
