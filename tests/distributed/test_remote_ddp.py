"""A server that one of two processes loses stops both, with a checkpoint to go on from."""

import json
import os
import subprocess
from pathlib import Path

from tests.distributed.test_kill import CPUS_RESUME, LAUNCH


@CPUS_RESUME
def test_both_processes_stop_whole_and_go_on_to_the_same_weights(tmp_path):
    script = Path(__file__).with_name("remote_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*LAUNCH, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert "the teacher of another process is away" in one["reason"]
    assert "has not answered for" in two["reason"]
    for found in (one, two):
        assert "is finished and saved" in found["reason"]
        assert (len(found["checkpoints"]), found["again"], found["same"]) == (1, None, True)
