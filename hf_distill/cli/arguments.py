"""Options of the commands, beside those of the trainers (`KDConfig` and its kin) and of TRL's `ModelConfig`."""

from dataclasses import dataclass, field

from hf_distill.traffic import ENGINES


@dataclass
class DemoArguments:
    """The options of `demo`."""

    output_dir: str = field(default="demo_out", metadata={"help": "Where student, table, picture and page go."})
    seeds: int = field(default=1, metadata={"help": "Students of each kind; the results are means."})
    steps: int = field(default=200, metadata={"help": "Updates of a training."})


@dataclass
class SFTArguments:
    """Model and data of `sft`, and of all other trainings."""

    model: str = field(metadata={"help": "The student: hub id or local path."})
    dataset: list[str] = field(
        metadata={
            "help": "Training rows: hub id, local folder, .jsonl, .json, .parquet or .csv file, compressed or not. "
            "Several are mixed by their weights: a:0.7 b:0.3."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    train_split: str = field(
        default="train",
        metadata={"help": "Split of the dataset to train on, or a part of it: `train[:20000]`, `train[:90%%]`."},
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out rows, of one source. Default: the eval split of the dataset itself, if it is one."},
    )
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split of the held-out rows, or a part of it. Default: `test`, if there is one."},
    )
    max_eval_rows: int = field(default=500, metadata={"help": "Held-out rows used before and after the training."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of a row, columns in braces: 'Context: {context}\\nQuestion: {question}\\nAnswer:'; the "
            "two characters \\n are a new line."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={"help": "Completion of a row, with prompt_template and in its form: ' {answers[text][0]}'."},
    )


@dataclass(kw_only=True)
class KDArguments(SFTArguments):
    """Models and data of `kd`, `kv` and `skd`."""

    teacher_model: list[str] = field(
        metadata={"help": "The teacher: hub id, local path, or `base`, the student's own base model; or several."}
    )
    baseline: bool = field(
        default=False,
        metadata={
            "help": "Whether the same student is also trained on hard labels alone, on the same rows for the same "
            "updates: without it nobody knows whether the teacher helped. It goes to `baseline` in output_dir."
        },
    )


@dataclass
class StagedArguments(KDArguments):
    """Models and data of `kd`, and the stage of a pruned student."""

    stage: str | None = field(
        default=None,
        metadata={"help": "Bundle of layers that is restored first; adapters are trained on these layers alone."},
    )
    bundle_dir: str | None = field(
        default=None, metadata={"help": "Folder of the bundles, with stage: `bundles` in the output of `prune`."}
    )


@dataclass
class CacheArguments(KDArguments):
    """Models and data of `cache write`, and what is kept of the teacher; `--output_dir` is the store's folder."""

    store: str = field(
        default="hidden",
        metadata={
            "help": "What is kept: `hidden` (states, which serve every loss), `sampled` (a sample of each "
            "distribution, for forward_kl) or `topk` (the most likely tokens)."
        },
    )
    store_dtype: str = field(default="float16", metadata={"help": "Of hidden states: `float16` or `int8`."})
    entries: float = field(
        default=12.0,
        metadata={
            "help": "Of a position, of probabilities: the mean number (sampler `threshold`), the number of draws "
            "(`multinomial`) or the number (topk)."
        },
    )
    sampler: str = field(default="threshold", metadata={"help": "Of samples: `threshold` or `multinomial`."})
    store_seed: int = field(default=0, metadata={"help": "Of samples and rotations."})
    write_batch_size: int | None = field(
        default=None, metadata={"help": "Texts of a forward. Default: per_device_eval_batch_size."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Show texts, tokens, and bytes and time of every store; nothing is written."}
    )


@dataclass
class KVArguments(KDArguments):
    """Models and data of `kv`."""

    cosine_steps: int = field(
        default=50, metadata={"help": "Show the cosine of keys and values and its phase every this many steps."}
    )


@dataclass(kw_only=True)
class PromptArguments:
    """The columns of prompts, and the text that only the teacher reads."""

    knowledge_column: str | None = field(
        default=None,
        metadata={"help": "Column of what only the teacher reads (LUPI). Default: rows have `prompt` or `messages`."},
    )
    query_column: str = field(default="query", metadata={"help": "Column of the question, with knowledge_column."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompt, without knowledge_column."})
    completion_column: str | None = field(
        default=None, metadata={"help": "Column of reference answers, for the source `dataset`."}
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Whether a prompt that is text is the user's message, and a completion the assistant's."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "First message to the teacher."})
    few_shot: str | None = field(
        default=None, metadata={"help": "JSON file: a list of turns with query, knowledge and answer, for the teacher."}
    )
    knowledge_template: str | None = field(
        default=None, metadata={"help": "The teacher's message, with {knowledge} and {query}."}
    )
    allow_missing_knowledge: bool = field(
        default=False, metadata={"help": "Whether the teacher of a row without knowledge reads the bare query."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of the teacher's prompt at most; knowledge is cut to fit."}
    )


@dataclass(kw_only=True)
class SKDArguments(KDArguments, PromptArguments):
    """Models and prompts of `skd`."""

    samples_steps: int = field(default=0, metadata={"help": "Show generated samples every this many steps; 0: never."})


@dataclass(kw_only=True)
class TemplateArguments:
    """Prompts and completions of the rows that are measured, from other columns."""

    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Prompt of a row, columns in braces, as in `kd`: 'Question: {question}\\nAnswer:'."},
    )
    completion_template: str | None = field(
        default=None, metadata={"help": "Completion of a row, with prompt_template and in its form: ' {answer}'."}
    )


@dataclass(kw_only=True)
class EvaluateArguments(PromptArguments, TemplateArguments):
    """Models, rows and tasks of `evaluate`."""

    model: str = field(metadata={"help": "The student: hub id or local path, such as the output directory of a run."})
    teacher_model: str | None = field(
        default=None, metadata={"help": "The teacher: hub id or local path. Default: the student is measured alone."}
    )
    base: str | None = field(
        default="auto",
        metadata={
            "help": "What the student was before it was trained: hub id or local path. `auto`: what its adapter or its "
            "run names, if anything; None: no base."
        },
    )
    teacher_quantization: str | None = field(default=None, metadata={"help": "`4bit` or `8bit`."})
    teacher_device: str | None = field(default=None, metadata={"help": "As in `kd`. Default: the student's device."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether code that comes with a model is run, of all models."}
    )
    device: str | None = field(default=None, metadata={"help": "Of student and base. Default: a GPU if there is one."})
    dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows: hub id, local folder or file, as in `kd`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the dataset, or a part of it. Default: the first of test, validation, train."},
    )
    max_rows: int = field(default=500, metadata={"help": "Rows that are measured, from the first on."})
    batch_size: int = field(default=8, metadata={"help": "Rows or prompts per forward."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens at which rows are cut; not for prompts."})
    generate: bool = field(
        default=False, metadata={"help": "Whether answers to the prompts are generated, greedily, and scored."}
    )
    metrics: list[str] = field(
        default_factory=lambda: ["exact_match", "f1"],
        metadata={
            "help": "Of generated answers: `exact_match`, `f1` (words; characters in Korean, Chinese and Japanese), "
            "`squad` (the official script) and `number` (GSM8K's)."
        },
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the right answers: a text, a list, or `answers` as in SQuAD. Default: the completion."
        },
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression; its last match in a generated text is the answer (its first group, if it has "
            "one), and nothing where it does not match. Right answers in which it matches are taken in the same way."
        },
    )
    stop: list[str] | None = field(
        default=None, metadata={"help": "Texts that end an answer, as '\\nQuestion:'; \\n is a new line."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of an answer at most."})
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Tasks of lm-evaluation-harness, or task files; several with commas or spaces between them."},
    )
    include_path: list[str] | None = field(default=None, metadata={"help": "Folders with more task files, for tasks."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question of a task. Default: as the task says."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Questions of each task, from the first on. Default: all."}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Whether questions of tasks go through the chat template."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where evaluation.json goes. Default: the student's folder, or `evaluate_out` for a hub id."},
    )
    json: bool = field(default=False, metadata={"help": "Whether the numbers are printed as JSON, without a table."})


@dataclass(kw_only=True)
class PruneArguments(TemplateArguments):
    """The model of `prune`, and the layers to drop."""

    model: str = field(metadata={"help": "The model: hub id or local path."})
    output_dir: str = field(metadata={"help": "Where the student goes; the removed layers go to `bundles` in it."})
    num_layers: int | None = field(
        default=None, metadata={"help": "How many consecutive layers to drop: those that change their input least."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "In place of num_layers: these layers, from 0."})
    groups: str | None = field(
        default=None,
        metadata={"help": 'With layers: the bundles they are kept in, as JSON: \'{"B": [3, 4], "C": [5]}\'.'},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Rows to rank layers on and to measure the student with, as in `kd`."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    split: str = field(default="train", metadata={"help": "Split of the dataset, or a part of it."})
    max_rows: int = field(default=256, metadata={"help": "Rows that are read, from the first on."})
    max_length: int = field(default=512, metadata={"help": "Tokens at which rows are cut."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward."})


@dataclass
class MergeArguments:
    """The adapter of `merge`."""

    adapter: str = field(metadata={"help": "Folder of the adapter: the output directory of a run with use_peft."})
    output_dir: str = field(metadata={"help": "Where the merged model goes."})
    base: str | None = field(
        default=None, metadata={"help": "Hub id or path of the base model. Default: the one it was trained on."}
    )


@dataclass
class CompareArguments:
    """The options of `compare`; its words without an option are the runs."""

    output_dir: str = field(default="compare_out", metadata={"help": "Where table and picture go."})


@dataclass
class ReportArguments:
    """The options of `report`; its words without an option are the runs."""

    output_file: str = field(default="report.html", metadata={"help": "The page to write."})


_NOT_READ = "Not read: a plan needs no rows."


@dataclass
class PlannedKD(StagedArguments):
    """Models of `plan kd`. The other options of `kd` are taken as well, so that its recipes can be planned."""

    dataset: list[str] = field(default_factory=list, metadata={"help": _NOT_READ})


@dataclass
class PlannedKV(KVArguments):
    """Models of `plan kv`."""

    dataset: list[str] = field(default_factory=list, metadata={"help": _NOT_READ})


@dataclass
class PlannedSKD(SKDArguments):
    """Models and prompts of `plan skd`."""

    dataset: list[str] = field(default_factory=list, metadata={"help": _NOT_READ})


@dataclass
class PlanArguments:
    """The devices of `plan`, and the longest rows."""

    gpu: str | None = field(
        default=None, metadata={"help": "Memory of each GPU, such as 24GB. Default: the plan says what is needed."}
    )
    gpus: int = field(default=1, metadata={"help": "Number of GPUs, one for each process."})
    engine: str = field(default="ddp", metadata={"help": "How several GPUs share the work.", "choices": list(ENGINES)})
    reserve: str = field(
        default="1GB", metadata={"help": "Memory that is left to CUDA, its libraries and fragmentation."}
    )
    row_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the longest row. Default: max_length, to which rows are cut."}
    )
    prompt_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of the student's longest prompt, in skd. Default: 512."}
    )
    label_share: float = field(
        default=1.0, metadata={"help": "Share of the tokens that bear a label, in (0, 1]; prompts do not."}
    )
    picture_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the longest row that stand for its pictures, as the language model reads them; they are "
            "tokens of the row. Default: rows of text alone."
        },
    )
    teacher_picture_tokens: int | None = field(
        default=None,
        metadata={"help": "The same, if the teacher's processor makes another number. Default: picture_tokens."},
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the numbers as JSON, in bytes."})


@dataclass
class DoctorArguments:
    """The probe of `doctor`."""

    rows: int = field(
        default=64,
        metadata={
            "help": "Training rows, drawn at random, that are tried. Copies and held-out rows are looked for in all."
        },
    )
    gpu: str | None = field(
        default=None,
        metadata={
            "help": "Memory of the GPU, such as 24GB, or with --use_cpu that of the host. Default: this machine's."
        },
    )
    json: bool = field(default=False, metadata={"help": "Whether to print findings and numbers as JSON."})
