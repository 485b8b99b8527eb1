"""The peaks that `hf-distill plan` predicts for a process of an engine, against those of two real ones on the CPU.

    python -m benchmarks.engine_peaks predict benchmarks/engine_peaks.json    # from configurations alone
    python -m benchmarks.engine_peaks measure out/measured.json               # two processes with gloo for every case
    python -m benchmarks.engine_peaks compare benchmarks/engine_peaks.json out/measured.json

A measured peak is that of the first process in its second update. The profiler begins before the training, with copies
of all weights, so that it sees what engines make for good, and what they release: shards, buckets. Models and rows are
those of `plan_peaks.py`. Predictions are committed before the runs that they are compared with.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed import engines

# Family, engine, settings; all with a teacher that is whole in each process.
CASES: dict[str, dict[str, Any]] = {
    "Llama, DDP": {"family": "llama", "engine": "ddp"},
    "Llama, LoRA, DDP": {
        "family": "llama", "engine": "ddp", "lora": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
    },
    "Llama, 2 micro-batches, DDP": {"family": "llama", "engine": "ddp", "gradient_accumulation_steps": 2},
    "Llama, FSDP2": {"family": "llama", "engine": "fsdp2"},
    "Qwen2, 2 micro-batches, FSDP2": {"family": "qwen2", "engine": "fsdp2", "gradient_accumulation_steps": 2},
    "Llama, ZeRO-2": {"family": "llama", "engine": "zero2"},
    "Llama, ZeRO-3": {"family": "llama", "engine": "zero3"},
}  # fmt: skip
BEGUN = "the second update begins"


def predict(case: dict[str, Any]) -> dict[str, int]:
    """The bytes that are alive in a process by component, and the peak of an update."""
    from benchmarks import plan_peaks
    from hf_distill.planning import Machine

    settings = {name: value for name, value in case.items() if name != "engine"}
    found = plan_peaks.predict(settings, Machine(num=2, engine=case["engine"], kind="cpu"))
    kept = {name: found.get(name, 0) for name in ("student's weights", "optimizer's states", "teacher's weights")}
    return {**kept, "beside": found["peak"] - sum(kept.values()), "peak": found["peak"]}


def launch(name: str) -> dict[str, int]:
    """The same numbers of the first of two real processes."""
    import torch

    from benchmarks.plan_peaks import make_folders

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make_folders(CASES[name], Path(folder), weights=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command += ["-m", "benchmarks.engine_peaks", "run", f"{folder}/found.json", "--only", name]
        subprocess.run(command, check=True, env=environment)
        return json.loads(Path(folder, "found.json").read_text())


def run(name: str, result: Path) -> None:
    """Trains for two updates in this process, which has another one beside it; the first writes its numbers.

    The models are beside the file.
    """
    case = dict(CASES[name])
    engine = case.pop("engine")
    engines.use(engine)

    import torch
    from datasets import disable_progress_bars

    from benchmarks import plan_peaks

    disable_progress_bars()
    settings = engines.settings(engine)
    for limit in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):  # the defaults are planned
        settings.get("deepspeed", {}).get("zero_optimization", {}).pop(limit, None)
    trainer_class, args, more = plan_peaks.arguments_of({**case, **settings}, result.parent)
    student, teacher = (str(result.parent / side) for side in ("student", "teacher"))
    rows = plan_peaks.rows_of(case)
    watched = _watched(trainer_class(student, teacher_model=teacher, args=args, train_dataset=rows, **more))
    if torch.distributed.get_rank() == 0:
        result.write_text(json.dumps(watched))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _watched(trainer: Any) -> dict[str, int]:
    """Trains; what was alive after the first update, and the peak of the second one."""
    from torch.profiler import ProfilerActivity, profile, record_function
    from transformers import TrainerCallback

    from tests.distributed.engine_runs import kept_bytes

    teacher = trainer.teacher.model
    tensors = [t for model in (trainer.model, teacher) for t in (*model.parameters(), *model.buffers())]
    kept: dict[str, int] = {}

    class Mark(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kept.update(kept_bytes(trainer))
                with record_function(BEGUN):
                    pass

    trainer.add_callback(Mark())
    _copy(tensors)  # files in memory, whose release would be counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        _copy(tensors)
        trainer.train()
    results: Any = found.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    begun = next(event.start_ns() for event in events if event.name() == BEGUN)
    total = peak = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total) if event.start_ns() >= begun else 0
    alive = {
        "student's weights": kept["weights"], "optimizer's states": kept["optimizer"],
        "teacher's weights": sum(t.nbytes for t in (*teacher.parameters(), *teacher.buffers())),
    }  # fmt: skip
    return {**alive, "beside": peak - sum(alive.values()), "peak": peak}


def _copy(tensors: list[Any]) -> None:
    from tests.distributed.engine_runs import own_part

    for tensor in map(own_part, tensors):
        tensor.data = tensor.data.clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "measure", "run", "compare"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", nargs="+", choices=CASES, help="names of cases")
    options = parser.parse_args()
    path = Path(options.files[0])
    if options.what == "run":  # in each process of a case
        run(options.only[0], path)
        return
    if options.what == "compare":
        from benchmarks.plan_peaks import compare
        from hf_distill.report import markdown

        print(markdown(compare(*(json.loads(Path(file).read_text()) for file in options.files))))
        return
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only or CASES:
        found[name] = predict(CASES[name]) if options.what == "predict" else launch(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
