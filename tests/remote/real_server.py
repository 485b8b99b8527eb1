"""A real vLLM on the CPU, and the tests of this folder against it. `make remote-test` builds what this needs:

    python -m tests.remote.real_server --vllm .venv-vllm/bin/vllm --model FOLDER [--port P] [pytest's arguments]

vLLM's attention on the CPU needs heads of 32 dimensions or more. `widen` writes a Llama with smaller heads as the same
function with wider ones. A server takes one to two minutes to start.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.remote.stub import free_port

WIDTH = 32  # the narrowest heads of vLLM's attention on the CPU
ROOT = Path(__file__).resolve().parents[2]


def widen(model, width: int = WIDTH):
    """The same function as a Llama with heads of `width` dimensions, the new ones zero.

    A rotary pair keeps its frequency: pair j of d/2 is pair j * width / d of the wide head. Queries are scaled by
    sqrt(width / d), because attention divides by the root of the width.
    """
    config, old = model.config, model.config.head_dim
    if not isinstance(model, LlamaForCausalLM) or width % old:
        raise ValueError(f"only a Llama whose heads divide {width} can be widened, not {type(model).__name__} ({old})")
    settings = config.to_dict() | {"head_dim": width}
    wide = LlamaForCausalLM(type(config)(**settings)).to(model.dtype).eval()
    pairs = torch.arange(old // 2) * (width // old)
    places = torch.cat([pairs, pairs + width // 2])  # where the d old dimensions of a head are in the new one
    state = model.state_dict()
    for name, tensor in state.items():
        projection = name.split(".")[-2]
        if projection in ("q_proj", "k_proj", "v_proj"):
            heads = tensor.unflatten(0, (-1, old))  # (heads, d, ...)
            padded = heads.new_zeros(heads.shape[0], width, *heads.shape[2:])
            padded[:, places] = heads * ((width / old) ** 0.5 if projection == "q_proj" else 1.0)
            state[name] = padded.flatten(0, 1)
        elif projection == "o_proj" and tensor.dim() == 2:
            heads = tensor.unflatten(1, (-1, old))  # (D, heads, d)
            padded = heads.new_zeros(*heads.shape[:2], width)
            padded[..., places] = heads
            state[name] = padded.flatten(1, 2)
    wide.load_state_dict(state)
    return wide


def prepare(source, target) -> Path:
    """A folder with the model that vLLM can serve: `source` itself, or a widened copy in `target`."""
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "head_dim", None) is None or config.head_dim >= WIDTH:
        return Path(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    widen(model).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return Path(target)


class RealServer:
    """A vLLM server in processes of its own, as a context; `kill` and `start` end it and start it again.

    Args:
        vllm: the command.
        folder: the model, as `prepare` gives it.
        port: a free one of this machine.
        log: a file for the server's output.
        options: further options, which win over those here.
    """

    def __init__(self, vllm, folder, port: int, log, *options: str):
        self.url = f"http://127.0.0.1:{port}/v1"
        positions = AutoConfig.from_pretrained(folder).max_position_embeddings
        self.command = [str(vllm), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        self.command += ["--served-model-name", "t", "--dtype", "float32", "--max-model-len", str(min(positions, 512))]
        self.command += ["--max-num-seqs", "8", "--max-logprobs", "-1", "--enforce-eager", "--no-enable-prefix-caching"]
        self.command += options
        self.log = Path(log)

    def start(self, seconds: float = 600.0):
        """Returns when the server is healthy."""
        known = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        known |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
        known |= {"HF_HUB_OFFLINE": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=known, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url.removesuffix("/v1") + "/health", timeout=5)
                return
            time.sleep(1)
        self.kill()
        lines = self.log.read_text(errors="replace").splitlines()[-30:]
        raise RuntimeError("\n".join(["vLLM did not start:", *lines]))

    def kill(self):
        """Ends the server and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.kill()


def main():
    parser = argparse.ArgumentParser(description="Runs tests/remote against a real vLLM on the CPU.")
    parser.add_argument("--vllm", required=True, help="the command of an environment with vLLM")
    parser.add_argument("--model", required=True, help="a folder with a model; a Llama if its heads are below 32")
    parser.add_argument("--port", type=int, default=0)
    given, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as room:
        folder = prepare(given.model, Path(room, "wide"))
        with RealServer(given.vllm, folder, given.port or free_port(), Path(room, "vllm.log")) as server:
            known = {"HF_DISTILL_TEACHER_URL": server.url, "HF_DISTILL_TEACHER_MODEL": str(folder)}
            command = [sys.executable, "-m", "pytest", "-m", "not gpu", "tests/remote", *arguments]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | known)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
