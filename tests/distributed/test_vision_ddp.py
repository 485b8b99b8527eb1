"""Two processes (DDP, gloo) do with pictures what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.vision_runs import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("vision_runs.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script), str(folder)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), num_processes=1)


@pytest.mark.parametrize("name", ["full", "lora", "own view"])
def test_two_processes_are_one(one, two, name):
    expected = one[name]
    assert expected["num_processes"] == 1
    for results in two:
        found = results[name]
        assert found["num_processes"] == 2
        for what in ("gradients", "weights"):
            assert found[what].keys() == expected[what].keys()
            for key, value in expected[what].items():
                assert (found[what][key] - value).norm() <= 1e-5 * value.norm() + 1e-8, key
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-5)
    for mine, theirs in zip(two[0][name]["logs"], expected["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
