"""Runs that are killed go on bit for bit; of two processes that one fails or dies, both stop, and in words."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from hf_distill.trainers.checkpoints import find_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=1500, env=ENVIRONMENT, cwd=folder
    )


SLOW = pytest.mark.slow
CPUS_RESUME = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="transformers 5.17 cannot load the optimizer of two processes on CPUs",
)


@pytest.mark.parametrize(
    ("engines", "options", "num_kills"),
    [
        ("none fsdp2", ["--no_lora"], 4),  # a run of each trainer alone, and one on two processes
        pytest.param("none", [], 24, marks=SLOW),
        *(pytest.param(engine, [], 12, marks=SLOW) for engine in ("ddp", "fsdp2", "zero2", "zero3")),
        *(pytest.param(engine, ["--signal", "TERM"], 6, marks=SLOW) for engine in ("ddp", "fsdp2", "zero2", "zero3")),
    ],
)
def test_runs_stopped_at_random_moments_end_with_the_weights_of_those_that_were_not(
    tmp_path, engines, options, num_kills
):
    if "zero" in engines:
        pytest.importorskip("deepspeed", reason="pip install 'hf_distill[deepspeed]'")
    options = ["--engine", *engines.split(), "--kills", num_kills, *options]
    done = run([sys.executable, Path(__file__).with_name("kill_runs.py"), tmp_path, *options], tmp_path)
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(kills) == num_kills
    assert {kill["engine"] for kill in kills} == {*engines.split()}
    assert len({kill["trainer"] for kill in kills}) == 3
    assert any(kill["resumed_from"] != "the start" for kill in kills)
    assert all(kill["is_identical"] for kill in kills)
    if "TERM" in options:
        # One that comes while the last checkpoint is written is too late, and ends the process as it does without us.
        assert not any(any(kill["statuses"]) for kill in kills if kill["resumed_from"] != "checkpoint-5")


def two_processes(folder: Path, action: str, rank: int) -> tuple[subprocess.CompletedProcess, float]:
    """What became of two processes, and the seconds from what happened in one of them until both were gone."""
    done = run([*LAUNCH, Path(__file__).with_name("stop_runs.py"), folder, action, rank], folder)
    return done, time.time() - float((folder / "time.txt").read_text())


@CPUS_RESUME
def test_a_sigterm_to_one_process_stops_both_at_the_same_update_and_the_run_goes_on_bit_for_bit(tmp_path):
    done, _ = two_processes(tmp_path, "sigterm", rank=1)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result == {"step": 3, "code": 0, "identical": True}
    assert done.stderr.count("SIGTERM: the run stops after update 3") == 1


@pytest.mark.parametrize(
    ("action", "rank"),
    [
        ("error", 1),
        pytest.param("error", 0, marks=pytest.mark.slow),
        pytest.param("error_while_stuck", 1, marks=pytest.mark.slow),
        pytest.param("death", 0, marks=pytest.mark.slow),
        pytest.param("death", 1, marks=pytest.mark.slow),
        pytest.param("disk", 0, marks=pytest.mark.slow),
    ],
)
def test_when_one_process_fails_both_stop_within_a_minute_and_the_checkpoint_stays(tmp_path, action, rank):
    done, seconds = two_processes(tmp_path, action, rank)
    assert done.returncode != 0
    assert seconds < 60
    stopped = tmp_path / "stopped"
    assert find_checkpoint(True, stopped) == str(stopped / "checkpoint-2")
    if action == "death":
        cause = done.stderr.rpartition("Root Cause")[2]  # what torchrun says last
        assert f"rank      : {rank}" in cause
        assert "(SIGKILL)" in cause
    else:
        full = f"OSError: {stopped}/checkpoint-4 could not be saved: [Errno 28] No space left on device"
        reason = full if action == "disk" else "RuntimeError: this process has failed"
        assert done.stderr.count(f"[rank{rank}]: {reason}") == 1
        assert f"[rank{rank}]: process {rank} of 2; if it has lost a connection, another process" in done.stderr
    # The process that writes saves the student unless it is dead itself, has no room, or is stuck.
    saves = (action, rank) in [("error", 0), ("error", 1), ("death", 1)]
    assert (stopped / "emergency" / "model.safetensors").exists() == saves


@pytest.mark.parametrize("num_kills", [8, pytest.param(200, marks=SLOW)])
def test_stores_whose_writing_is_killed_at_random_moments_end_in_the_bytes_of_those_that_were_not(tmp_path, num_kills):
    script = Path(__file__).with_name("write_runs.py")
    done = run([sys.executable, script, tmp_path, "--kills", num_kills, "--seed", num_kills], tmp_path)
    stores = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert sum(store["kills"] for store in stores) >= num_kills
    assert not any(store["differs"] for store in stores)
    if num_kills > 100:
        assert {(store["method"], store["processes"]) for store in stores if store["kills"]} == {
            (method, number) for method in ("hidden", "sampled", "topk") for number in (1, 2)
        }
        assert len({state for store in stores for state in store["left"]}) == 7
