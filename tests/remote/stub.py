"""A server in the tests that answers like vLLM or like SGLang, from a real tiny model, with faults on demand.

In a thread of the test's process, on a free port of this machine:

    with Stub(ServedModel(make_model(), make_tokenizer(), name="t"), dialect="vllm", max_logprobs=20) as stub:
        stub.url                             # "http://127.0.0.1:PORT/v1", what a user gives as teacher_model
        stub.fail("status", status=429, retry_after=0.1, times=2)     # the next two requests; kinds in faults.py
        stub.heal()                          # no fault any more
        stub.served = ServedModel(other)     # another model, or another name, from the next request on
        stub.kill(); stub.restart()          # connections are cut and refused; then the same port again
        stub.counts["requests"]              # see `Stub.counts`
        stub.requests[-1].body               # the last requests: method, path, headers, body, status
        stub.prompts()                       # token ids of each row of each answered request, in order

`api_key="..."` asks for a key. `launch(folder, ...)` is the same in a process of its own, for tests that end processes;
its methods have the same names and go over the wire (`POST /_fault`, `/_heal`, `GET /_seen`). On the command line:

    python -m tests.remote.stub --model FOLDER --port 8000 [--name t] [--dialect sglang] [--max-logprobs 20]
        [--max-model-len 256] [--api-key KEY] [--version 0.32.0]

The numbers are transformers' in float32, row by row: requests of one row and of many have the same bits. A generated
token is a function of the seed and the prompt; without a seed it is another one each time.
"""

import argparse
import collections
import contextlib
import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.remote.dialects import DIALECTS
from tests.remote.faults import ASKED, KINDS_OF_ANSWER, Fault, as_json
from tests.remote.served_model import ServedModel

KEPT = 1000  # requests that are remembered
DRIPS = 20  # pieces of an answer that drips


@dataclass
class Seen:
    """A request as it came, without the value of its key, and the status of the answer (0: none came through)."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict | None = None
    status: int = 0
    fault: list[str] = field(default_factory=list)
    at: float = 0.0  # seconds of time.monotonic() at which it came


class Stub:
    """A server in a thread; see the head of this file.

    Args:
        served: the model.
        dialect: "vllm" or "sglang".
        max_logprobs: the largest K it allows, -1 for the vocabulary.
        api_key: the key that requests need.
        defaults: sampling settings that hold where a request has none, as a server takes them from the model's
            generation config.
        port: 0 for a free one.
    """

    def __init__(self, served: ServedModel, *, dialect="vllm", max_logprobs=20, api_key=None, defaults=None, port=0):
        self._settings = (dialect, max_logprobs, defaults)
        self.api_key = api_key
        self.faults: list[Fault] = []
        self.requests: collections.deque[Seen] = collections.deque(maxlen=KEPT)
        # requests: to the two addresses that ask the model. positions: prompt tokens of answers sent. generated:
        # tokens. bytes: of all bodies sent. faults: requests that were hit. in_flight, most_in_flight: at once.
        self.counts = collections.Counter()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.served = served
        self.port = port
        self.restart()

    @property
    def served(self) -> ServedModel:
        return self._served

    @served.setter
    def served(self, served: ServedModel):
        dialect, max_logprobs, defaults = self._settings
        self._served = served
        self.dialect = DIALECTS[dialect](served, max_logprobs, defaults)

    @property
    def url(self) -> str:
        """The address that a user gives as the teacher."""
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, kind: str, **settings) -> Fault:
        """Adds a fault, beside those that are there."""
        fault = Fault(kind, **settings)
        with self._lock:
            self.faults.append(fault)
        return fault

    def heal(self):
        """Removes all faults."""
        with self._lock:
            self.faults.clear()

    def prompts(self) -> list[tuple[int, ...]]:
        """The rows that were asked for in requests answered with 200, in order, as token ids."""
        found = []
        for seen in list(self.requests):
            if seen.path in ASKED and seen.status == 200:
                ids = seen.body.get("prompt") or seen.body.get("input_ids")
                found += map(tuple, ids if isinstance(ids[0], list) else [ids])
        return found

    def kill(self):
        """Stops as a process that dies: connections are cut, new ones refused."""
        with self._lock:
            for connection in self._connections:
                _shut(connection)
        _shut(self._server.socket)  # forked workers hold copies of this socket: closing alone would leave it open
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def restart(self):
        """Listens on the port again."""
        stub = self

        class Handler(_Handler):
            owner = stub

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._thread.is_alive():
            self.kill()

    def due(self, path: str) -> list[Fault]:
        """The faults that hit this request."""
        with self._lock:
            due = [fault for fault in self.faults if fault.is_due(path)]
            self.counts["faults"] += bool(due)
        return due

    def count(self, **numbers: int):
        with self._lock:
            self.counts.update(numbers)
            self.counts["most_in_flight"] = max(self.counts["most_in_flight"], self.counts["in_flight"])

    def connected(self, connection: socket.socket, is_open: bool):
        with self._lock:
            (self._connections.add if is_open else self._connections.discard)(connection)


def _shut(connection: socket.socket):
    with contextlib.suppress(OSError):  # it was closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a client may go away; anything else is an error of ours
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Stub

    def setup(self):
        super().setup()
        self.owner.connected(self.connection, True)

    def finish(self):
        self.owner.connected(self.connection, False)
        super().finish()

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw or b"null")
        except ValueError:
            body = None
        self._answer(body)

    def _answer(self, body):
        headers = {name: "***" if name.lower() == "authorization" else text for name, text in self.headers.items()}
        self.seen = Seen(self.command, self.path, headers, body, at=time.monotonic())
        if self.path.startswith("/_"):
            return self._steer(body)
        self.owner.requests.append(self.seen)
        asked = self.path in ASKED
        self.owner.count(requests=asked, in_flight=asked)
        try:
            self._answer_with(self.owner.due(self.path), body)
        finally:
            self.owner.count(in_flight=-asked)

    def _answer_with(self, faults: list[Fault], body):
        self.seen.fault = [fault.kind for fault in faults]
        kinds = {fault.kind: fault for fault in faults}
        if "slow" in kinds:
            time.sleep(kinds["slow"].seconds)
        if "cut" in kinds:
            return self._cut()
        if "redirect" in kinds:
            return self._send(kinds["redirect"].status or 307, b"", {"Location": kinds["redirect"].location})
        if "status" in kinds:
            status, headers, error = kinds["status"].error()
            return self._send(status, as_json(error), headers)
        if "html" in kinds:
            return self._send(200, b"<html><body>Sign in</body></html>", {"Content-Type": "text/html"})
        if "empty" in kinds:
            return self._send(200, b"")
        status, answer = self._right_answer(body)
        usage = answer.get("usage", {}) if isinstance(answer, dict) else {}
        if status == 200 and self.path in ASKED:
            for fault in faults:
                if fault.kind in KINDS_OF_ANSWER:
                    answer = fault.change(answer, self.owner.served.vocab_size)
            metas = [row["meta_info"] for row in (answer if isinstance(answer, list) else [answer]) if not usage]
            self.owner.count(
                positions=usage.get("prompt_tokens", 0) or sum(meta["prompt_tokens"] for meta in metas),
                generated=usage.get("completion_tokens", 0) or sum(meta["completion_tokens"] for meta in metas),
            )
        content = b"" if answer is None else as_json(answer)
        if "half_json" in kinds:
            content = content[: len(content) // 2]
        drip = kinds["drip"].seconds if "drip" in kinds else 0.0
        self._send(status, content, cut_inside="cut_inside" in kinds, drip=drip)

    def _right_answer(self, body):
        owner, path = self.owner, self.path
        dialect = owner.dialect
        guarded = path.startswith(dialect.guarded) and path not in getattr(dialect, "unguarded", ())
        if owner.api_key and guarded and self.headers.get("Authorization") != f"Bearer {owner.api_key}":
            return 401, {"error": "Unauthorized"}
        if self.command == "GET":
            return dialect.get(path)
        if not isinstance(body, dict):
            detail = {"message": "1 validation error", "type": "Bad Request", "param": "body", "code": 400}
            return 400, {"error": detail}
        return dialect.post(path, body)

    def _send(self, status: int, content: bytes, headers=None, cut_inside=False, drip=0.0):
        self.seen.status = status
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        whole = b"" if drip else content[: len(content) // 2 if cut_inside else None]
        self._headers_buffer.append(b"\r\n" + whole)
        self.owner.count(bytes=len(content))
        try:
            self.flush_headers()
            if drip:
                step = -(-len(content) // DRIPS)
                for start in range(0, len(content), step):
                    time.sleep(drip / DRIPS)
                    self.wfile.write(content[start : start + step])
        except OSError:
            self.seen.status = 0
            raise
        if cut_inside:
            self._cut()

    def _cut(self):
        self.seen.status = 0
        self.close_connection = True
        _shut(self.connection)

    def _steer(self, body):
        """What the other process of `launch` asks for."""
        owner = self.owner
        if self.path == "/_fault":
            owner.fail(**body)
        elif self.path == "/_heal":
            owner.heal()
        seen = {"counts": owner.counts, "prompts": owner.prompts(), "requests": [asdict(r) for r in owner.requests]}
        self._send(200, as_json(seen if self.path == "/_seen" else {}))


class StubProcess:
    """A stub in a process of its own, which can be ended with a signal and started again on its port."""

    def __init__(self, folder, *options: str, port: int = 0):
        self.folder, self.options = Path(folder), options
        self.port = port or free_port()
        self.restart()

    url = Stub.url

    def restart(self, folder=None, *options: str, seconds: float = 120.0):
        """Starts the process, with another model or other options if given, and waits until it is healthy."""
        self.folder, self.options = Path(folder or self.folder), options or self.options
        command = [sys.executable, "-m", "tests.remote.stub", "--model", str(self.folder), "--port", str(self.port)]
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([*command, *self.options], cwd=root, env=environment)
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return self._ask("/health")
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"the stub on port {self.port} did not start (exit code {self.process.poll()})")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def fail(self, kind: str, **settings):
        self._ask("/_fault", {"kind": kind} | settings)

    def heal(self):
        self._ask("/_heal", {})

    @property
    def counts(self) -> dict[str, int]:
        return self._ask("/_seen")["counts"]

    def prompts(self) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in self._ask("/_seen")["prompts"]]

    @property
    def requests(self) -> list[Seen]:
        return [Seen(**seen) for seen in self._ask("/_seen")["requests"]]

    def _ask(self, path: str, body=None):
        content = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", content, timeout=10) as answer:
            return json.loads(answer.read() or b"null")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


def launch(folder, *options: str, port: int = 0) -> StubProcess:
    """A stub in a process of its own; options as on the command line, such as `"--max-logprobs", "-1"`."""
    return StubProcess(folder, *options, port=port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description="A server for tests that answers like vLLM or SGLang.")
    parser.add_argument("--model", required=True, help="a folder with a model of transformers")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="t")
    parser.add_argument("--dialect", default="vllm", choices=DIALECTS)
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--api-key")
    parser.add_argument("--version", default="0.32.0")
    given = parser.parse_args()
    served = ServedModel.load(given.model, name=given.name, max_model_len=given.max_model_len, version=given.version)
    settings = {"dialect": given.dialect, "max_logprobs": given.max_logprobs, "api_key": given.api_key}
    with Stub(served, port=given.port, **settings) as stub:
        print(f"serving {given.name} on {stub.url}", flush=True)
        stub._thread.join()


if __name__ == "__main__":
    main()
