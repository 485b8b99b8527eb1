"""What is refused before a run with a teacher at an address: each with the reason, and what to do."""

import collections
import socket
import threading

import pytest

from hf_distill import KDConfig
from hf_distill.servers.client import Server
from hf_distill.servers.dialects import VLLM
from hf_distill.servers.handshake import Expected, greet
from hf_distill.teachers.remote import RemoteTeacher
from tests.conftest import make_model, make_tokenizer
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub


def introduced(tmp_path, tokenizer, *urls, **settings):
    args = KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    teacher = RemoteTeacher(urls, args, index=0)
    teacher.introduce(tokenizer, 384)
    return teacher


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_server_tells_what_it_can_do(tmp_path, tiny, dialect):
    with Stub(tiny, dialect=dialect, max_logprobs=-1) as stub:
        teacher = introduced(tmp_path, tiny.tokenizer, stub.url)
        assert (teacher.name, teacher.num_entries, teacher.num_positions) == ("t", 64, 63)
        assert "0.32.0" in teacher.source or dialect == "sglang"
        assert not teacher.is_whole
        whole = introduced(tmp_path, tiny.tokenizer, stub.url, teacher_logprobs=-1, temperature=2.0)
        assert whole.is_whole


@pytest.mark.parametrize("cap", [3, 20, 33])
def test_the_cap_of_a_server_is_found(tmp_path, tiny, cap):
    with Stub(tiny, max_logprobs=cap) as stub:
        assert introduced(tmp_path, tiny.tokenizer, stub.url).num_entries == cap


def test_addresses_without_v1_and_with_a_slash_are_the_same(tmp_path, tiny):
    with Stub(tiny) as stub:
        root = stub.url.removesuffix("/v1")
        for url in (root, root + "/", root + "/v1/"):
            assert introduced(tmp_path, tiny.tokenizer, url).server.addresses == (root,)


@pytest.mark.parametrize(
    "address", ["http://", "http:///v1", "http://host:port/v1", "http://host:8000/v1?x=1", "https://:8000/v1"]
)
def test_what_is_no_address_is_refused(tmp_path, tiny, address):
    with pytest.raises(ValueError, match=r"no address of a server: it looks like http://host:8000/v1"):
        introduced(tmp_path, tiny.tokenizer, address)


def test_nobody_at_a_port_is_told(tmp_path, tiny):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match=rf"nothing answers at port {port} of 127.0.0.1 .*vllm serve"):
        introduced(tmp_path, tiny.tokenizer, f"http://127.0.0.1:{port}/v1")


def test_an_unknown_host_is_told(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"there is no host 'no-such-host.invalid'"):
        introduced(tmp_path, tiny.tokenizer, "http://no-such-host.invalid:8000/v1")


def test_https_to_a_server_of_http_is_told(tmp_path, tiny):
    with Stub(tiny) as stub, pytest.raises(ValueError, match="the secure connection fails"):
        introduced(tmp_path, tiny.tokenizer, stub.url.replace("http:", "https:"))


def test_a_wrong_path_is_told(tmp_path, tiny):
    with Stub(tiny) as stub, pytest.raises(ValueError, match=r"/v2/v1/models is not there .*ends before or after /v1"):
        introduced(tmp_path, tiny.tokenizer, stub.url.replace("/v1", "/v2"))


def test_a_key_is_asked_for_and_never_shown(tmp_path, tiny, monkeypatch):
    with Stub(tiny, api_key="sk-right") as stub:
        with pytest.raises(ValueError, match=r"wants a key, and there is none: name .*teacher_key_variable"):
            introduced(tmp_path, tiny.tokenizer, stub.url)
        monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
        with pytest.raises(ValueError, match=r"wants a key, and the one in TEACHER_KEY is not taken") as error:
            introduced(tmp_path, tiny.tokenizer, stub.url, teacher_key_variable="TEACHER_KEY")
        assert "sk-wrong" not in str(error.value)
        monkeypatch.setenv("TEACHER_KEY", "sk-right")
        introduced(tmp_path, tiny.tokenizer, stub.url, teacher_key_variable="TEACHER_KEY")
        with pytest.raises(ValueError, match="wants a key") as error:
            introduced(tmp_path, tiny.tokenizer, stub.url.replace("http://", "http://me:sk-hidden@"))
        assert "sk-hidden" not in str(error.value)


def test_a_key_in_the_place_of_its_name_is_not_repeated(tmp_path):
    with pytest.raises(ValueError, match="the name of an environment variable that is set") as error:
        KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, teacher_key_variable="sk-secret")
    assert "sk-secret" not in str(error.value)


def test_the_name_of_the_model_is_compared(tmp_path, tiny):
    with Stub(tiny) as stub, pytest.raises(ValueError, match=r"serves t, and teacher_served_name is 'other'"):
        introduced(tmp_path, tiny.tokenizer, stub.url, teacher_served_name="other")


def test_more_entries_than_allowed_are_refused_with_the_line_to_start(tmp_path, tiny):
    with Stub(tiny, max_logprobs=20) as stub:
        with pytest.raises(ValueError, match=r"asks for 50.*gives 20 at most.*vllm serve t --max-logprobs 50"):
            introduced(tmp_path, tiny.tokenizer, stub.url, teacher_logprobs=50)
        with pytest.raises(ValueError, match=r"asks for the whole vocabulary.*vllm serve t --max-logprobs -1"):
            introduced(tmp_path, tiny.tokenizer, stub.url, teacher_logprobs=-1)


@pytest.mark.parametrize(
    "kind", ["no_field", "null_field", "wrong_id", "short", "capped", "fewer_rows", "html", "half_json"]
)
@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_server_that_answers_otherwise_is_refused_with_the_line_to_start(tmp_path, tiny, dialect, kind):
    with Stub(tiny, dialect=dialect) as stub:
        stub.fail(kind, times=None)
        with pytest.raises(
            ValueError, match=r"does not give log-probabilities of a prompt.*vllm serve t --max-logprobs"
        ):
            introduced(tmp_path, tiny.tokenizer, stub.url)


def test_a_server_of_something_else_is_refused(tmp_path, tiny):
    import http.server

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}" if self.path.endswith("models") else b"hello")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="names no model: is it a server of vLLM or SGLang"):
            introduced(tmp_path, tiny.tokenizer, f"http://127.0.0.1:{server.server_address[1]}/v1")
        server.shutdown()


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path, tiny):
    other = make_tokenizer(corpus=["zebras quiz jumping vexed wizards by the dozen"] * 30)
    ids = other.get_vocab()
    other = make_tokenizer(added_tokens=tuple(f"<t{i}>" for i in range(384 - len(ids)))) if len(ids) < 384 else other
    served = ServedModel(tiny.model, make_renamed(tiny.tokenizer), name="t")
    with Stub(served) as stub, pytest.raises(ValueError, match=r"has another tokenizer than the student: \d+ of \d+"):
        introduced(tmp_path, tiny.tokenizer, stub.url)


def make_renamed(tokenizer):
    """A tokenizer of the same size whose tokens mean others."""

    class Renamed:
        def decode(self, ids, **kwargs):
            return "".join(tokenizer.decode([(i + 7) % 384], **kwargs) for i in ids)

        def convert_ids_to_tokens(self, ids):
            return tokenizer.convert_ids_to_tokens([(i + 7) % 384 for i in ids])

    return Renamed()


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_smaller_vocabulary_is_refused(tmp_path, tiny, dialect):
    model = make_model(vocab_size=300, max_position_embeddings=64)
    refused = pytest.raises(ValueError, match=r"which the student knows: its vocabulary is another|does not give")
    with Stub(ServedModel(model, None, name="t"), dialect=dialect) as stub, refused:
        introduced(tmp_path, tiny.tokenizer, stub.url)


def test_other_temperatures_need_the_whole_vocabulary(tmp_path, tiny):
    with Stub(tiny) as stub:
        for settings in ({"temperature": 2.0}, {"schedule": {"temperature": [2, 1]}}):
            with pytest.raises(ValueError, match=r"temperature=2.* needs the probabilities of the whole vocabulary"):
                introduced(tmp_path, tiny.tokenizer, stub.url, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name", "copies of one server, and they serve t, other"),
        ("weights", "serve different models: probabilities of one text are"),
        ("cap", r"gives 10 at most|copies of one server"),
    ],
)
def test_several_addresses_have_to_be_copies(tmp_path, tiny, change, message):
    sure = make_model(seed=5, max_position_embeddings=64)
    sure.lm_head.weight.data.mul_(30)
    other = {
        "name": Stub(ServedModel(tiny.model, tiny.tokenizer, name="other")),
        "weights": Stub(ServedModel(sure, tiny.tokenizer, name="t")),
        "cap": Stub(tiny, max_logprobs=10),
    }[change]
    with Stub(tiny) as one, other as two, pytest.raises(ValueError, match=message):
        introduced(tmp_path, tiny.tokenizer, one.url, two.url)


def test_several_models_need_a_name(tmp_path, tiny, monkeypatch):
    with Stub(tiny) as stub:
        get = stub.dialect.get

        def two(path):
            status, answer = get(path)
            if path == "/v1/models":
                answer["data"].append({**answer["data"][0], "id": "adapter"})
            return status, answer

        monkeypatch.setattr(stub.dialect, "get", two)
        with pytest.raises(ValueError, match=r"serves t, adapter: name the teacher, teacher_served_name"):
            introduced(tmp_path, tiny.tokenizer, stub.url)
        assert introduced(tmp_path, tiny.tokenizer, stub.url, teacher_served_name="t").name == "t"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_logprobs": 0}, "teacher_logprobs has to be at least 1"),
        ({"teacher_logprobs": -2}, "teacher_logprobs has to be at least 1"),
        ({"teacher_logprobs": 1.5}, "teacher_logprobs has to be a whole number"),
        ({"teacher_timeout": 0}, "teacher_timeout has to be above 0"),
        ({"teacher_timeout": 1e9}, "below ddp_timeout"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
    ],
)
def test_settings_that_no_server_could_serve_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        KDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_noise_is_measured_and_told(tmp_path, tiny, caplog):
    class Noisy(ServedModel):
        calls = collections.Counter()

        def log_probs(self, ids):
            self.calls[tuple(ids)] += 1
            return super().log_probs(ids) + 0.02 * (self.calls[tuple(ids)] // 2 % 2)

    with Stub(Noisy(tiny.model, tiny.tokenizer, name="t")) as stub:
        server = Server((stub.url.removesuffix("/v1"),), VLLM(), "t", timeout=10)
        served = greet(server, None, 5, Expected(384, (5, 9, 200), lambda token: tiny.text([token])))
        assert served.noise == pytest.approx(0.02, rel=1e-3)
        introduced(tmp_path, tiny.tokenizer, stub.url, teacher_logprobs=5)
    assert "nats apart" in caplog.text
