"""The help of a command: the options that people set, in groups, from the table of options alone."""

from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterable, Mapping

from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.options import Option, described_options, installed_options

# Groups of options, in the order in which they are shown. All options of our own are here, and of the inherited ones
# those in INHERITED.
GROUPS = {
    "models": (
        "model teacher_model base adapter stage bundle_dir dtype attn_implementation load_in_4bit freeze_vision_tower"
    ),
    "data": (
        "dataset dataset_config train_split eval_dataset eval_split max_eval_rows prompt_template completion_template "
        "max_length packing drop_long_rows"
    ),
    "prompts": (
        "prompt_column completion_column as_chat knowledge_column query_column system_prompt few_shot "
        "knowledge_template allow_missing_knowledge max_prompt_length samples_steps"
    ),
    "distillation": (
        "baseline kd_weight temperature divergence divergence_params schedule hidden_weight hidden_layers hidden_loss "
        "projector_learning_rate"
    ),
    "keys and values": (
        "kv_weight kv_loss kv_layers kv_positions direction_weight magnitude_weight projector projector_mlp_ratio "
        "projector_dropout projector_freeze_after cosine_steps"
    ),
    "rollouts": (
        "max_new_tokens draft_length adaptive top_k min_prob student_temperature student_top_p teacher_temperature "
        "teacher_top_p rollout_mix rollout_batch_size rollout_compile value_of_privilege rollout_debug"
    ),
    "teacher": (
        "teacher_quantization teacher_device teacher_model_init_kwargs teacher_weights teacher_combination "
        "cross_tokenizer teacher_served_name teacher_logprobs teacher_timeout teacher_key_variable "
        "dataloader_num_workers"
    ),
    "store": "store store_dtype entries sampler store_seed write_batch_size dry_run",
    "loss": "loss_chunk_size logging_nan_inf_filter",
    "LoRA": "use_peft lora_r lora_alpha lora_dropout lora_target_modules",
    "plan and doctor": (
        "gpu gpus engine reserve row_tokens prompt_tokens label_share picture_tokens teacher_picture_tokens rows json"
    ),
    "training": (
        "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
        "eval_steps save_steps logging_steps report_to seed resume_from_checkpoint use_cpu bf16"
    ),
}  # fmt: skip

# The same for a command that does not train, whose options are all its own.
GROUPS_OF = {
    "evaluate": {
        "models": "model teacher_model base teacher_quantization teacher_device device trust_remote_code",
        "rows": "dataset dataset_config split max_rows prompt_template completion_template batch_size max_length",
        "generated answers": (
            "generate metrics answer_column answer_pattern stop max_new_tokens prompt_column completion_column as_chat"
        ),
        "knowledge for the teacher alone": (
            "knowledge_column query_column system_prompt few_shot knowledge_template allow_missing_knowledge "
            "max_prompt_length"
        ),
        "tasks of lm-evaluation-harness": "tasks include_path num_fewshot limit apply_chat_template",
        "results": "output_dir json",
    },
    "prune": {
        "model": "model output_dir",
        "layers": "num_layers layers groups",
        "rows": "dataset dataset_config split max_rows prompt_template completion_template max_length batch_size",
    },
}

# The help of inherited options, a line each.
INHERITED = {
    "dtype": "Of the student's weights; `auto` is that of its files.",
    "dataloader_num_workers": "Processes that make batches.",
    "attn_implementation": "Of the student, such as sdpa or flash_attention_2.",
    "load_in_4bit": "Whether the student is quantised to 4 bits, under adapters (QLoRA).",
    "max_length": "Tokens at which rows are cut.",
    "packing": "Whether several rows share a sequence; they do not see each other.",
    "use_peft": "Whether adapters (LoRA) are trained in place of all weights.",
    "lora_r": "Rank of the adapters.",
    "lora_alpha": "Scale of the adapters; it is divided by the rank.",
    "lora_dropout": "Dropout in front of the adapters.",
    "lora_target_modules": "Modules that get adapters: names, or all-linear.",
    "output_dir": "Where the student goes, with its report.",
    "learning_rate": "The highest learning rate, of AdamW.",
    "num_train_epochs": "Passes over the rows.",
    "max_steps": "Updates, in place of num_train_epochs.",
    "per_device_train_batch_size": "Rows of a micro-batch on each device.",
    "gradient_accumulation_steps": "Micro-batches of an update.",
    "eval_steps": "Evaluate every this many updates, with --eval_strategy steps.",
    "save_steps": "Write a checkpoint every this many updates.",
    "logging_steps": "Log every this many updates.",
    "report_to": "Trackers: wandb, trackio, tensorboard, none.",
    "seed": "Of the order of rows, dropout and new weights.",
    "resume_from_checkpoint": "A checkpoint, or true for the last one in output_dir.",
    "use_cpu": "Whether to train on the CPU although there is a GPU.",
    "bf16": "Whether to compute in bfloat16; on by default, so false without a GPU.",
}

# Options that are refused, or of no use, whatever their value: they are not listed.
_REFUSED = "model_name_or_path loss_type label_smoothing_factor enable_jit_checkpoint bf16_full_eval fp16_full_eval"
_REFUSED_IN_ROLLOUTS = (
    "max_length packing eval_packing padding_free assistant_only_loss completion_only_loss hidden_weight hidden_layers "
    "hidden_loss projector_learning_rate"
)
REFUSED = {
    **dict.fromkeys(("kd", "kv", "sft", "plan kd", "plan kv", "doctor kd", "doctor kv"), _REFUSED),
    **dict.fromkeys(("skd", "plan skd", "doctor skd"), f"{_REFUSED} {_REFUSED_IN_ROLLOUTS}"),
    "cache write": f"{_REFUSED} resume_from_checkpoint baseline",
}

METAVARS = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "bool": "YES|NO", "object": "MAPPING"}


def help_text(name: str) -> str:
    """The help of a command with the options that people set, or all of them if it inherits none."""
    command = COMMANDS[name]
    options = described_options(command.options)
    has_groups = command.inherits or name in GROUPS_OF
    return _text(name, _groups(name, options) if has_groups else {"options": [*options.values()]})


def whole_help_text(name: str) -> str:
    """The help of a command with all options that it takes, as the installed libraries have them."""
    options = installed_options(COMMANDS[name].options)
    groups = _groups(name, options)
    listed = {option.name for group in groups.values() for option in group} | set(REFUSED[name].split())
    rest = [option for option in options.values() if option.name not in listed]
    return _text(name, {**groups, "all others, of transformers and TRL": rest}, is_whole=True)


def _groups(name: str, options: Mapping[str, Option]) -> dict[str, list[Option]]:
    refused = REFUSED.get(name, "").split()
    found = {
        title: [options[each] for each in names.split() if each in options and each not in refused]
        for title, names in GROUPS_OF.get(name, GROUPS).items()
    }
    return {title: group for title, group in found.items() if group}


def _text(name: str, groups: Mapping[str, Iterable[Option]], *, is_whole: bool = False) -> str:
    command = COMMANDS[name]
    required = [option.name for group in groups.values() for option in group if option.is_required]
    words = [f"{word} [{word} ...]" for word in command.words]
    usage = " ".join(["%(prog)s", *words, *(f"--{each} ..." for each in required), "[options]"])
    parser = ArgumentParser(
        prog=f"hf-distill {name}", usage=usage, description=f"{command.help[0].upper()}{command.help[1:]}.",
        add_help=False, formatter_class=_Formatter,
    )  # fmt: skip
    for word, help in command.words.items():
        parser.add_argument(word, help=help, nargs="+")
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(f"--{option.name}", metavar=_metavar(option), help=_help(option))
    others = parser.add_argument_group("help and recipes")
    others.add_argument("--config", metavar="FILE", help="A YAML file with options as `name: value`; those here win.")
    if command.inherits and not is_whole:
        others.add_argument("--help-all", action="store_true", help="Also all settings of transformers and TRL.")
    return parser.format_help()


def _metavar(option: Option) -> str:
    return f"{METAVARS[option.kind]}{' ...' if option.nargs == '+' else ''}"


def _help(option: Option) -> str:
    text = INHERITED.get(option.name, "") if not option.help else option.help
    if option.choices and option.help:
        text += f" One of {', '.join(map(str, option.choices))}."
    if option.is_required:
        return f"{text} Required."
    if option.default in (None, "", False):
        return text
    values = option.default if isinstance(option.default, list) else [option.default]
    default = " ".join(f"{value:g}" if option.kind == "float" else str(value) for value in values)
    return f"{text} [{default.replace('%', '%%')}]"


class _Formatter(HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=None)
