"""Two processes under DDP, FSDP2, ZeRO-2 and ZeRO-3 do with pictures what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.engines import FOUND, environments
from tests.distributed.vision_runs import RUNS, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero2", "zero3"])
def two(request, tmp_path_factory):
    """The engine, and the results of both processes."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'hf_distill[deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, str(Path(__file__).with_name("vision_runs.py")), request.param, str(folder)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(command, env=common | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for own in environments(request.param)
    ]
    errors = [process.communicate(timeout=400)[1] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(error[-3000:] for error in errors)
    return request.param, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), num_processes=1)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(one, two, name):
    engine, ranks = two
    expected = one[name]
    whole = torch.cat(
        [(value - expected["before"][key]).flatten() for key, value in expected["weights"].items()]
    ).norm()
    assert whole > 1e-4
    for rank in ranks:
        found = rank[name]
        assert (found["num_processes"], found["engine"]) == (2, FOUND[engine])
        assert found["weights"].keys() == expected["weights"].keys()
        for key, value in expected["weights"].items():
            assert (found["weights"][key] - value).norm() <= 1e-4 * whole, key
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-4)
    for mine, theirs in zip(ranks[0][name]["logs"], expected["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
