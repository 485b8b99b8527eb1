"""A vLLM on the CPU that is started here: restarts in a run, rollouts, and TRL's trainer for teachers on a server.

    OMP_NUM_THREADS=1 python -m benchmarks.served --vllm .venv-vllm/bin/vllm --teacher stories260K --data tinystories

- Restarts: the server is killed before two updates of a run and started again; weights, against an undisturbed run.
- Rollouts: the same prompts and student with the server and with the teacher in this process, without updates. The
  student has first learned from the teacher for `--steps` updates.
- Temperature: the loss of TRL's ServerDistillationTrainer, with the whole vocabulary, and of KDTrainer, against a
  formula in float64; for a student, and for the teacher itself in the student's place, where every divergence is 0.
"""

import argparse
import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback

from benchmarks.measure import machine, print_table
from benchmarks.stories import add_budget, budget, load_rows, load_teacher, make_parser, make_trainer, some_layers
from hf_distill import KDConfig, KDTrainer, SpeculativeKDConfig, SpeculativeKDTrainer
from tests.remote.real_server import RealServer, free_port, prepare

PARTS = ("restarts", "rollouts", "temperature")
LENGTHS = (16, 64)  # tokens of a completion, at most
PROMPT = 16  # tokens
ROLLOUTS = 2  # batches


@contextlib.contextmanager
def serving(vllm: str, teacher: str, log: str | Path | None = None) -> Iterator[RealServer]:
    """A server that has the teacher, with wider heads where vLLM needs them."""
    with tempfile.TemporaryDirectory() as room:
        folder = prepare(teacher, Path(room, "wide"))
        with RealServer(vllm, folder, free_port(), log or Path(room, "vllm.log")) as server:
            yield server


class Restarting(TrainerCallback):
    """Kills the server before some updates, and starts it again while the run waits."""

    def __init__(self, server: RealServer, steps: tuple[int, ...]) -> None:
        self.server, self.steps = server, steps
        self.away: list[float] = []  # seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.server.kill()
            threading.Thread(target=self._start, args=(time.perf_counter(),)).start()

    def _start(self, since: float) -> None:
        self.server.start()
        self.away.append(time.perf_counter() - since)


def restarts(
    options: argparse.Namespace, server: RealServer, teacher: Any, rows: Dataset, tokenizer: Any
) -> list[dict[str, str]]:
    """Weights after a run with two restarts, and after another undisturbed one, against an undisturbed one."""
    steps, restarting = options.steps, Restarting(server, (options.steps // 3, 2 * options.steps // 3))
    trained, table = {}, []
    for name, callbacks in (("first", []), ("undisturbed", []), ("two restarts", [restarting])):
        settings = {
            **budget(options, 0), "teacher_logprobs": options.size, "logging_strategy": "steps", "logging_steps": steps
        }  # fmt: skip
        student = some_layers(teacher, options.layers)
        trainer = make_trainer(KDTrainer, KDConfig, student, server.url, rows, tokenizer, settings, callbacks=callbacks)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        trained[name] = torch.cat([parameter.detach().flatten() for parameter in trainer.student.parameters()])
        far = (trained[name] - trained["first"]).abs().max() / trained["first"].abs().max()
        log = next(entry for entry in trainer.state.log_history if "teacher/retries" in entry)
        table.append({
            "run": name, "updates": str(steps), "requests": f"{log['teacher/requests']:.0f}",
            "tried again": f"{log['teacher/retries']:.0f}", "run, s": f"{seconds:.0f}",
            "server away, s": ", ".join(f"{away:.0f}" for away in (restarting.away if callbacks else [])),
            "largest difference of a weight": f"{far:.1e}",
        })  # fmt: skip
    return table


def rollouts(
    options: argparse.Namespace, server: RealServer, teacher: Any, rows: Dataset, tokenizer: Any
) -> list[dict[str, str]]:
    """Positions that the teacher reads for a token, bytes and seconds, of texts of several lengths."""
    student = some_layers(teacher, options.layers)
    make_trainer(KDTrainer, KDConfig, student, teacher, rows, tokenizer, budget(options, 0)).train()
    prompts = [
        {"student_prompt_ids": ids[:PROMPT], "teacher_prompt_ids": ids[:PROMPT]} for ids in rows["input_ids"][:1000]
    ]
    table = []
    for top_k, length in itertools.product(options.top_k, LENGTHS):
        for source, draft in ((teacher, 5), (server.url, None), (server.url, 16)):
            if draft == length:
                continue  # as to the end
            settings = {
                "max_steps": ROLLOUTS, "per_device_train_batch_size": options.batch_size, "learning_rate": 0.0,
                "max_new_tokens": length, "top_k": top_k, "draft_length": draft, "seed": 0,
                "logging_strategy": "steps", "logging_steps": ROLLOUTS,
                "teacher_logprobs": top_k if source is not teacher else None,
            }  # fmt: skip
            trainer = make_trainer(
                SpeculativeKDTrainer, SpeculativeKDConfig, student, source, Dataset.from_list(prompts), tokenizer,
                settings,
            )  # fmt: skip
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            where = "in this process" if source is teacher else "server"
            row = {"top_k": str(top_k), "at most": str(length), "teacher": where, "draft": str(draft or "to the end")}
            table.append({**row, **_costs(trainer, seconds)})
            print(table[-1], flush=True)
    return table


def _costs(trainer: Any, seconds: float) -> dict[str, str]:
    log = next(entry for entry in trainer.state.log_history if "rollout/positions_per_token" in entry)
    tokens = log["rollout/tokens_accepted"] + log["rollout/tokens_corrected"]
    return {
        "of the draft accepted": f"{log['rollout/acceptance_rate']:.2f}",
        "of the text drafted": f"{log['rollout/tokens_accepted'] / tokens:.2f}",
        "positions a token": f"{log['rollout/positions_per_token']:.1f}",
        "requests": f"{log.get('teacher/requests', 0):.0f}",
        "kB a token": f"{log.get('teacher/megabytes', 0) * 1024 / tokens:.1f}",
        "waiting, s": f"{log.get('teacher/seconds', 0):.1f}",
        "run, s": f"{seconds:.1f}",
        "tokens": f"{tokens:.0f}",
    }


def temperature(
    options: argparse.Namespace, server: RealServer, teacher: Any, rows: Dataset, tokenizer: Any
) -> list[dict[str, str]]:
    """Mean divergences at two temperatures, without the factor T² that KDTrainer's loss has."""
    ids = torch.tensor(rows["input_ids"][:8])
    students = {
        f"its layers {', '.join(map(str, layers))}": some_layers(teacher, layers)
        for layers in (options.layers, [*range(len(teacher.model.layers))])
    }
    table = []
    for name, student in students.items():
        for value in (1.0, 2.0):
            with torch.no_grad():
                sides = [model(ids).logits[:, PROMPT - 1 : -1].double() / value for model in (teacher, student)]
            told, own = (side.log_softmax(-1) for side in sides)
            truth = (told.exp() * (told - own)).sum(-1).mean()
            table.append({
                "student": name, "temperature": f"{value:g}", "formula": f"{truth:.5f}",
                "KDTrainer": f"{_ours(server, student, ids, tokenizer, value):.5f}",
                "TRL": f"{_trl(server, student, ids, tokenizer, value):.5f}",
            })  # fmt: skip
    return table


def _ours(server: RealServer, student: Any, ids: torch.Tensor, tokenizer: Any, temperature: float) -> float:
    rows = Dataset.from_dict({
        "input_ids": ids.tolist(), "labels": [[-100] * PROMPT + row[PROMPT:] for row in ids.tolist()]
    })  # fmt: skip
    settings = {
        "per_device_eval_batch_size": len(ids), "teacher_logprobs": -1, "temperature": temperature, "kd_weight": 1.0,
        "max_length": ids.shape[1], "per_device_train_batch_size": 2,
    }  # fmt: skip
    trainer = make_trainer(KDTrainer, KDConfig, student, server.url, rows, tokenizer, settings)
    return trainer.evaluate(rows)["eval_loss"] / temperature**2


def _trl(server: RealServer, student: Any, ids: torch.Tensor, tokenizer: Any, temperature: float) -> float:
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    args = ServerDistillationConfig(
        output_dir="out/benchmarks", teacher_model_server_url=server.url.removesuffix("/v1"), beta=0.0,
        loss_top_k=len(tokenizer), loss_add_tail=False, temperature=temperature, use_cpu=True, bf16=False,
        report_to="none", max_completion_length=ids.shape[1] - PROMPT,
    )  # fmt: skip
    # Its client speaks HTTP alone, but asks for an installed vLLM.
    with mock.patch("trl.generation.vllm_client.is_vllm_available", return_value=True):
        trainer = ServerDistillationTrainer(
            student, args, Dataset.from_dict({"prompt": ["Once"]}), processing_class=tokenizer
        )
    prompts, completions = ids[:, :PROMPT], ids[:, PROMPT:]
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions, "completion_mask": torch.ones_like(completions),
    }  # fmt: skip
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, inputs))


def main() -> None:
    parser = make_parser(__doc__)
    add_budget(parser, steps=60, learning_rate=3e-3)
    parser.add_argument("--vllm", required=True, help="the command of an environment with vLLM")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4], help="the teacher's, for the student")
    parser.add_argument("--size", type=int, default=20, help="K")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[15, 40], help="drafted tokens are accepted among so many"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    options = parser.parse_args()
    disable_progress_bars()
    teacher, tokenizer = load_teacher(options.teacher)
    rows, held_out = load_rows(options, tokenizer)
    print(machine("cpu"))
    with serving(options.vllm, options.teacher) as server:
        tables = {
            "restarts": partial(restarts, options, server, teacher, rows, tokenizer),
            "rollouts": partial(rollouts, options, server, teacher, rows, tokenizer),
            "temperature": partial(temperature, options, server, teacher, held_out, tokenizer),
        }
        for part in options.parts:
            print_table(part, tables[part](), options.markdown)


if __name__ == "__main__":
    main()
