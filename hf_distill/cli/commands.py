"""The commands of `hf-distill`: a row of `COMMANDS` for each. Nothing that they need is imported before they run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_ARGUMENTS = "hf_distill.cli.arguments"
_KD = "hf_distill.trainers.config:KDConfig"
_KV = "hf_distill.trainers.kv_projection_config:KVProjectionConfig"
_SKD = "hf_distill.trainers.speculative_kd_config:SpeculativeKDConfig"
_HARD_LABEL = "hf_distill.trainers.hard_label_config:HardLabelConfig"
_MODEL = "trl:ModelConfig"


@dataclass(frozen=True)
class Command:
    """A command of `hf-distill`.

    Args:
        help: its line in `hf-distill --help`.
        start: the name of a function, as module:function. It is called with an instance of each dataclass of
            `options`; `ValueError` becomes one line on the screen. It may return a run: an error there keeps its
            traceback.
        options: names of dataclasses; each of their fields is an option.
        words: names and help of words without an option. `start` is called with a namespace of them, too.
        parsing: the name of a context in which these instances are made.
    """

    help: str
    start: str
    options: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    parsing: str | None = None

    @property
    def inherits(self) -> bool:
        """True if it has options of transformers and TRL, which only `--help-all` lists."""
        return any(not name.startswith(f"{_ARGUMENTS}:") for name in self.options)


def _plan(help: str, start: str, *options: str) -> Command:
    planned = (*options, _MODEL, f"{_ARGUMENTS}:PlanArguments")
    return Command(help, f"hf_distill.cli.planning:{start}", planned, parsing="hf_distill.planning:without_gpu")


def _doctor(help: str, start: str, *options: str) -> Command:
    return Command(help, f"hf_distill.cli.diagnosing:{start}", (*options, _MODEL, f"{_ARGUMENTS}:DoctorArguments"))


_STORES = {"stores": "folders, or datasets on the hub as user/name"}
_RUNS = {"runs": "output directories of kd, kv or skd"}

COMMANDS = {
    "demo": Command(
        "distil the packaged teacher, offline, on a CPU, in a minute or two",
        "hf_distill.cli.demo:demo", (f"{_ARGUMENTS}:DemoArguments",),
    ),
    "kd": Command(
        "distil a student on the teacher's next-token distributions",
        "hf_distill.cli.training:start_kd", (f"{_ARGUMENTS}:StagedArguments", _KD, _MODEL),
    ),
    "kv": Command(
        "distil a student, on the teacher's keys and values, too",
        "hf_distill.cli.training:start_kv", (f"{_ARGUMENTS}:KVArguments", _KV, _MODEL),
    ),
    "skd": Command(
        "distil a student on text that student and teacher write together",
        "hf_distill.cli.training:start_skd", (f"{_ARGUMENTS}:SKDArguments", _SKD, _MODEL),
    ),
    "sft": Command(
        "train a student on hard labels alone, without a teacher: the baseline",
        "hf_distill.cli.training:start_sft", (f"{_ARGUMENTS}:SFTArguments", _HARD_LABEL, _MODEL),
    ),
    "plan kd": _plan(
        "say what memory a run of kd takes, whether it fits, and what would make it fit; from configurations alone",
        "plan_kd", f"{_ARGUMENTS}:PlannedKD", _KD,
    ),
    "plan kv": _plan("the same for a run of kv", "plan_kv", f"{_ARGUMENTS}:PlannedKV", _KV),
    "plan skd": _plan("the same for a run of skd", "plan_skd", f"{_ARGUMENTS}:PlannedSKD", _SKD),
    "doctor kd": _doctor(
        "say what would go wrong or waste a run of kd, with these models on this data; some rows are tried",
        "doctor_kd", f"{_ARGUMENTS}:StagedArguments", _KD,
    ),
    "doctor kv": _doctor("the same for a run of kv", "doctor_kv", f"{_ARGUMENTS}:KVArguments", _KV),
    "doctor skd": _doctor("the same for a run of skd", "doctor_skd", f"{_ARGUMENTS}:SKDArguments", _SKD),
    "prune": Command(
        "drop the layers that change least, keep them as bundles",
        "hf_distill.cli.pruning:prune", (f"{_ARGUMENTS}:PruneArguments",),
    ),
    "merge": Command(
        "merge an adapter into its base model",
        "hf_distill.cli.pruning:merge", (f"{_ARGUMENTS}:MergeArguments",),
    ),
    "cache write": Command(
        "write a teacher's outputs into a folder, to train any number of students from",
        "hf_distill.cli.cache:write", (f"{_ARGUMENTS}:CacheArguments", _KD, _MODEL),
    ),
    "cache info": Command(
        "show what is in folders that cache write has made", "hf_distill.cli.stores:info", words=_STORES
    ),
    "cache verify": Command(
        "check every byte of folders that cache write has made", "hf_distill.cli.cache:verify", words=_STORES
    ),
    "evaluate": Command(
        "measure base, student and teacher: perplexity, distance, generated answers, the gap that was closed",
        "hf_distill.cli.evaluating:evaluate", (f"{_ARGUMENTS}:EvaluateArguments",),
    ),
    "compare": Command(
        "put finished runs side by side: settings, fidelity, tokens, time",
        "hf_distill.cli.comparing:compare", (f"{_ARGUMENTS}:CompareArguments",), words=_RUNS,
    ),
    "report": Command(
        "write the page of finished runs: results, curves, held-out rows token by token",
        "hf_distill.cli.comparing:report", (f"{_ARGUMENTS}:ReportArguments",), words=_RUNS,
    ),
}  # fmt: skip
