"""The servers that the tests in this folder ask.

`server` is a stub and, with HF_DISTILL_TEACHER_URL (an address that ends in /v1) and HF_DISTILL_TEACHER_MODEL (the
folder of the model that it serves, in float32), also a real server: tests that use it run with each of the two.
`make remote-test` starts one and sets both. Tests that need faults, counts or a certain vocabulary use `stub`.
"""

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass

import pytest

from tests.conftest import make_model, make_tokenizer
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

REAL_URL = os.environ.get("HF_DISTILL_TEACHER_URL")


@dataclass
class Server:
    """A server, and in `truth` the same model in this process."""

    url: str
    truth: ServedModel
    tolerance: float  # of log-probabilities, against transformers
    between_batches: float = 0.0  # the same, between a row alone and in a batch
    ties: int = 0  # ranks may differ by so many

    def ask(self, path: str, body=None):
        return ask(self.url.removesuffix("/v1") + path, body)


def ask(url: str, body=None, **headers):
    """Status and JSON of an answer; a text where it is no JSON."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            status, raw = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    try:
        return status, json.loads(raw or b"null")
    except ValueError:
        return status, raw.decode()


@pytest.fixture(scope="session")
def tiny():
    """A model of some thousand parameters with its tokenizer."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(seed=3, **small, num_hidden_layers=1, max_position_embeddings=64)
    return ServedModel(model, make_tokenizer(), name="t")


@pytest.fixture
def stub(tiny):
    with Stub(tiny) as stub:
        yield stub


@pytest.fixture(scope="session", params=["stub", "real"] if REAL_URL else ["stub"])
def server(request, tiny):
    if request.param == "real":
        _, models = ask(f"{REAL_URL}/models")
        card = models["data"][0]
        folder = os.environ["HF_DISTILL_TEACHER_MODEL"]
        truth = ServedModel.load(folder, name=card["id"], max_model_len=card["max_model_len"])
        yield Server(REAL_URL, truth, tolerance=1e-4, between_batches=1e-4, ties=2)
        return
    with Stub(tiny, max_logprobs=-1) as stub:
        yield Server(stub.url, tiny, 1e-6)
