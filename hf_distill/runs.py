"""Finished runs of the command line: the files of their folders, and the settings in which they differ."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

# Files of a finished run: its options, its logs, its results; and, of held-out rows, what both sides say of each token.
RUN_FILES = ("settings.json", "trainer_state.json", "report.json")
TOKENS_FILE = "tokens.json"
EVALUATION_FILE = "evaluation.json"  # of `hf-distill evaluate`, which may come later
ANSWERS_FILE = "answers.jsonl"  # of the same: a generated answer of each model to each question
BASELINE = "baseline"  # the folder of a run's baseline, a run of its own
# What a run records of itself beside its options.
RECORDED = ("run_files", "command", "held_out", "versions", "warnings", "num_rows")
# Settings that do not change what is learned; those that end with `_` are the beginnings of names.
WITHOUT_EFFECT = (
    "output_dir", "run_name", "hub_", "push_to_hub", "save_", "logging_", "log_", "report_to", "disable_tqdm",
    "dataloader_", "dataset_num_proc", "eval_", "max_eval_rows", "per_device_eval_batch_size", "do_", "resume_",
    "restore_callback_states_from_checkpoint", "overwrite_", "ddp_", "local_rank", "project", "trackio_",
    "samples_steps", "cosine_steps", "rollout_debug", "remove_unused_columns", "skip_memory_metrics", "include_",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip", "debug",
    "full_determinism", "enable_jit_checkpoint", "teacher_device", "baseline", "batch_eval_metrics",
    "prediction_loss_only",
)  # fmt: skip
# Settings that count only where another one is set, by the beginnings of their names.
DEPENDENT: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("divergence", "temperature"): lambda run: run.get("kd_weight") != 0 or run.get("schedule"),
    ("lora_", "use_dora", "use_rslora"): lambda run: run.get("use_peft"),
    ("bnb_4bit", "use_bnb"): lambda run: run.get("load_in_4bit"),
    ("hidden_layers", "hidden_loss"): lambda run: run.get("hidden_weight"),
    ("kv_", "direction_weight", "magnitude_weight"): lambda run: run.get("kv_weight"),
    ("projector",): lambda run: run.get("kv_weight") or run.get("hidden_weight"),
    ("num_train_epochs",): lambda run: (run.get("max_steps") or -1) < 0,
    ("teacher_weights", "teacher_combination"): lambda run: len(as_list(run.get("teacher_model"))) > 1,
    ("bundle_dir",): lambda run: run.get("stage"),
    ("warmup_ratio",): lambda run: not run.get("warmup_steps"),
}


def may_matter(name: str) -> bool:
    """True for a setting that may change what is learned."""
    beginnings = tuple(each for each in WITHOUT_EFFECT if each.endswith("_"))
    return name not in WITHOUT_EFFECT and not name.startswith(beginnings)


class Run(NamedTuple):
    """A run of the command line, read from the folder that it wrote."""

    settings: dict[str, Any]
    history: list[dict[str, float]]  # `trainer.state.log_history`
    results: dict[str, dict[str, float]]  # measures by name: "before", "after", "baseline"
    recorded: dict[str, Any]  # RECORDED: what the run says of itself
    tokens: dict[str, Any] | None = None  # of `hf_distill.token_comparison.comparison_data`
    evaluation: dict[str, Any] | None = None  # of `hf-distill evaluate`
    answers: list[dict[str, Any]] | None = None  # of the same: questions, right answers, and those of the models
    baseline: dict[str, float] | None = None  # measures of the baseline that stands beside it as a run of its own

    @property
    def measures(self) -> dict[str, float]:
        """Those of the student at the end; empty if nothing was measured."""
        return self.results.get("after") or next(reversed(self.results.values()), {})

    def logged(self, name: str) -> float | None:
        """The last value that was logged under this name."""
        return next((entry[name] for entry in reversed(self.history) if name in entry), None)

    def effective(self) -> dict[str, Any]:
        """The settings that had an effect on what was learned."""
        return {
            name: value
            for name, value in self.settings.items()
            if may_matter(name)
            and all(is_read(self.settings) for names, is_read in DEPENDENT.items() if name.startswith(names))
        }


def load_run(folder: str | PathLike[str]) -> Run:
    """Reads the folder of a finished run that measured its student.

    Raises:
        `ValueError`: there is no such folder; a file is missing, because there was no run, it has not ended or it
            measured nothing; or a file belongs to another run.
    """
    _refuse_missing(folder)
    if missing := [name for name in RUN_FILES if not (Path(folder) / name).is_file()]:
        raise ValueError(
            f"run folder {str(folder)!r} has no {' and no '.join(missing)}: it needs a finished run of hf-distill kd, "
            "kv or skd with held-out rows (--eval_dataset)"
        )
    return read_run(folder)


def read_run(folder: str | PathLike[str]) -> Run:
    """Reads what the folder of a run has: of one without held-out rows, no results.

    Raises:
        `ValueError`: there is no such folder, no run has ended there, or a file belongs to another run.
    """
    _refuse_missing(folder)

    def read(name: str, default: Any) -> Any:
        path = Path(folder, name)
        return json.loads(path.read_text("utf-8")) if path.is_file() else default

    settings = read("settings.json", None)
    if settings is None:
        raise ValueError(
            f"run folder {str(folder)!r} has no settings.json: it needs a finished run of hf-distill kd, kv or skd"
        )
    written = settings.get("run_files", {})  # older versions wrote none
    if other := [name for name, digest in _digests(folder).items() if written.get(name, digest) != digest]:
        raise ValueError(
            f"run folder {str(folder)!r} holds files of different runs: {' and '.join(other)} changed after "
            "settings.json was written. Compare runs that have a folder of their own"
        )
    recorded = {name: settings.pop(name) for name in RECORDED if name in settings}
    # A run without held-out rows may have the results of another one beside it.
    results = read("report.json", {}) if not written or "report.json" in written else {}
    tokens = read(TOKENS_FILE, None) if TOKENS_FILE in written else None
    answers = Path(folder, ANSWERS_FILE)
    generated = [*map(json.loads, answers.read_text("utf-8").strip().split("\n"))] if answers.is_file() else None
    return Run(settings, read_history(folder), results, recorded, tokens, read(EVALUATION_FILE, None), generated)


def _refuse_missing(folder: str | PathLike[str]) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"run folder {str(folder)!r} does not exist: it has to be the output_dir of a finished run")


def read_history(folder: str | PathLike[str]) -> list[dict[str, float]]:
    """The log of a run; empty if it has not ended."""
    path = Path(folder, "trainer_state.json")
    return json.loads(path.read_text("utf-8"))["log_history"] if path.is_file() else []


def named_runs(
    folders: Sequence[str | PathLike[str]], read: Callable[[str | PathLike[str]], Run] = load_run
) -> dict[str, Run]:
    """Runs by the last part of their path, or by the whole path if last parts are equal."""
    paths = [Path(folder) for folder in folders]
    is_unique = len({path.resolve().name for path in paths}) == len(paths)
    return {path.resolve().name if is_unique else str(path): read(path) for path in paths}


def with_baselines(runs: Mapping[str, Run], folders: Sequence[str | PathLike[str]]) -> dict[str, Run]:
    """The runs, each followed by its baseline as a run of its own, if it has one. `folders` are those of the runs."""
    found: dict[str, Run] = {}
    for (name, run), folder in zip(runs.items(), folders, strict=True):
        if not has_baseline(folder):
            found[name] = run
            continue
        results = {kind: values for kind, values in run.results.items() if kind != BASELINE}
        found[name] = run._replace(results=results, baseline=run.results.get(BASELINE))
        found[BASELINE if len(runs) == 1 else f"{BASELINE} of {name}"] = read_run(Path(folder, BASELINE))
    return found


def has_baseline(folder: str | PathLike[str]) -> bool:
    """True if the run in a folder has its baseline there; without the setting, a folder of this name is another's."""
    settings = Path(folder, "settings.json")
    if not (settings.is_file() and Path(folder, BASELINE, "settings.json").is_file()):
        return False
    return bool(json.loads(settings.read_text("utf-8")).get(BASELINE, True))


def has_begun_baseline(folder: str | PathLike[str]) -> bool:
    """True if the run in a folder was stopped before its baseline had ended: neither of them has settings yet."""
    names = [Path(folder, *part, "settings.json") for part in ((), (BASELINE,))]
    return not any(name.exists() for name in names) and any(Path(folder, BASELINE).glob("checkpoint-*"))


def save_settings(folder: str | PathLike[str], settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`, for people and for `load_run`; values that JSON does not know become text.

    Call it last: it also records which other files belong to the run.
    """
    settings = {**settings, "run_files": _digests(folder)}
    Path(folder, "settings.json").write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """A hash of the token ids and labels of prepared rows, in their order; those of the teachers play no part.

    Of rows that have none, such as those with pictures, it is one of what they have.
    """
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        kept = {name: list(map(int, row[name])) for name in sorted(row) if name in _HASHED and row[name] is not None}
        digest.update(repr(kept or {name: _hashable(row[name]) for name in sorted(row)}).encode())
    return digest.hexdigest()


def _hashable(cell: Any) -> Any:
    """A cell with the bytes of its pictures in their place."""
    if isinstance(cell, list | tuple):
        return [_hashable(each) for each in cell]
    pixels = getattr(cell, "tobytes", None)
    return cell if pixels is None else (cell.size, hashlib.sha256(pixels()).hexdigest())


_HASHED = ("input_ids", "labels", "completion_mask", "student_prompt_ids", "completion_ids")


def differing_settings(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """For each setting that matters and is not the same in all runs, its value in each; None where it has no effect."""
    effective = {name: run.effective() for name, run in runs.items()}
    names = {setting: None for settings in effective.values() for setting in settings}  # a set that keeps the order
    values = {setting: {name: effective[name].get(setting) for name in runs} for setting in names}
    return {
        setting: found for setting, found in values.items() if len({json.dumps(each) for each in found.values()}) > 1
    }


def with_ends(run: Run) -> list[dict[str, float]]:
    """The history with the results before and after as points of the held-out curves, where it has none there.

    They are `eval_ce`, the logarithm of the perplexity, `eval_agreement`, and `eval_kl`, which is `eval_kd` where the
    divergence of the run is the forward KL at temperature 1.
    """
    last = max((entry.get("step", 0) for entry in run.history), default=0)
    is_kl = run.settings.get("divergence", "forward_kl") == "forward_kl" and run.settings.get("temperature", 1) == 1
    names = {"student_perplexity": "eval_ce", "agreement": "eval_agreement", "kl": "eval_kd" if is_kl else "eval_kl"}
    points: list[dict[str, float]] = []
    for step, results in ((0, run.results.get("before", {})), (last, run.measures)):
        found = {name: value for name, value in results.items() if name.startswith("eval_")}
        found |= {
            names[name]: math.log(value) if name == "student_perplexity" else value
            for name, value in results.items()
            if name in names
        }
        there = {name for entry in run.history if entry.get("step") == step for name in entry}
        if found := {name: value for name, value in found.items() if name not in there}:
            points.append({"step": step, **found})
    before, after = ([point for point in points if (point["step"] > 0) == is_late] for is_late in (False, True))
    return [*before, *run.history, *after]


def as_list(value: Any) -> list[Any]:
    """The value, if it is a list, or a list of it."""
    return value if isinstance(value, list) else [value]


def _digests(folder: str | PathLike[str]) -> dict[str, str]:
    """SHA-256 of the files of a run beside its settings."""
    paths = [Path(folder, name) for name in (*RUN_FILES, TOKENS_FILE) if name != "settings.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}
