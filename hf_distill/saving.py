"""Saving a model: tried before training, with the base model's settings, in a folder without an earlier run's files."""

import copy
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hf_distill.model_files import ADAPTER_CONFIG, is_adapter_folder
from hf_distill.modeling import causal_lm, tokenizer_of
from hf_distill.runs import BASELINE, has_baseline, has_begun_baseline

logger = logging.getLogger(__name__)

# Prefix of the folder for the files of an earlier run. transformers does not push names with an underscore to the hub.
ASIDE = "_earlier-"
TRIAL = "_tmp-trial-"

# Files that a run, `prune` or `merge` writes to its folder. Loading would mistake them for a part of the next model.
LEFT_BY_A_RUN = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*",
    ADAPTER_CONFIG, "adapter_model.*", "projectors", "*projector*.safetensors", "*projector*.json", "training_args.bin",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*tekken.json", "spiece.model", "sentencepiece*.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates", "README.md", "trainer_state.json",
    "settings.json", "report.md", "report.json", "report.png", "report.html", "tokens.json", "comparison.md",
    "comparison.json", "comparison.png", "cosine.png", "pruning.md", "complete.json", "all_results.json",
    "train_results.json", "eval_results.json", "evaluation.json", "answers.jsonl", "checkpoint-*", "emergency",
)  # fmt: skip

# Settings of a configuration that training changes temporarily.
CHANGED_BY_TRAINING = ("use_cache", "bos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef")
GENERATION_TOKENS = ("bos_token_id", "pad_token_id")  # the same of a generation configuration
# Settings that say how a tokenizer was found on this machine. transformers writes them to the tokenizer's file.
FOUND_BY = ("is_local", "local_files_only")


# ---------------------------------------------------------------------------------------------- folders and their paths


def set_aside(folder: str | os.PathLike[str]) -> None:
    """Moves the files of an earlier run in `folder` to a new subfolder `_earlier-<number>`, and logs its name.

    All other files stay: rows, bundles, the restored model that the adapters of a stage belong to.
    """
    folder = Path(folder)
    if not (left := _left_in(folder)):
        return
    number = next(i for i in range(1, 10**9) if not (folder / f"{ASIDE}{i}").exists())
    aside = folder / f"{ASIDE}{number}"
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in left[:3]) + (", ..." if len(left) > 3 else "")
    logger.warning("%s has files of an earlier run (%s): they are moved to %s", folder, names, aside)


def _left_in(folder: Path) -> list[Path]:
    found = {path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)}
    if has_baseline(folder) or (found and has_begun_baseline(folder)):
        found.add(folder / BASELINE)
    return sorted(found)


def refuse_moving(folder: str | os.PathLike[str], needed: Mapping[str, str | os.PathLike[str]]) -> None:
    """Raises `ValueError` if [`set_aside`] would move a model that is `needed` (role -> path) where it is."""
    moved = [path.resolve() for path in _left_in(Path(folder))]
    for role, name in needed.items():
        if os.path.isdir(name) and any(Path(name).resolve().is_relative_to(path) for path in moved):
            raise ValueError(
                f"{role} {os.fspath(name)!r} belongs to an earlier run in {os.fspath(folder)!r}, whose files are moved "
                "aside: choose another output folder"
            )


def refuse_folder(folder: str | os.PathLike[str], in_use: Mapping[str, Any] | None = None) -> None:
    """Raises `ValueError` for a folder that cannot be written to, or that holds a model `in_use` (role -> path)."""
    path, there = Path(folder).absolute(), _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"nothing can be saved in {os.fspath(folder)!r}: {there} {reason}. Choose another folder")
    for role, name in (in_use or {}).items():
        if name and os.path.isdir(name) and os.path.samefile(name, there) and there == path:
            raise ValueError(
                f"{os.fspath(folder)!r} is the folder of {role}, which would be overwritten: choose another one for "
                "the output"
            )


def _existing(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the nearest folder above it that exists."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def absolute(name: str | None) -> str | None:
    """The name of a model, made an absolute path if it is a local folder."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def name_bases_absolutely(model: nn.Module) -> None:
    """Makes the paths of base models in adapter configurations absolute, so they work in every working directory."""
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)


def base_of(adapter_folder: str | os.PathLike[str], name: str) -> str:
    """The path of an adapter's base model, or `name` itself if no such folder is found.

    Earlier versions saved paths relative to the training's working directory, which usually is above the adapter. If an
    absolute path does not exist, its end is searched for above the adapter, because both may have been moved together.

    Args:
        adapter_folder: the folder of the adapter.
        name: the base model's name in the adapter's configuration.
    """
    folders = [folder := Path(adapter_folder).absolute(), *folder.parents]
    if not name:
        return name
    if not os.path.isabs(name):
        places = [folder / name for folder in folders]
    else:
        parts = Path(name).parts
        places = [folder.joinpath(*parts[parts.index(folder.name) + 1 :]) for folder in folders if folder.name in parts]
        places.insert(0, Path(name))
    return next((str(place) for place in places if (place / "config.json").is_file()), name)


def base_and_adapter(name: str) -> tuple[str, str | None]:
    """The model to load, and the adapter to put on it if the name is a folder with an adapter only.

    Raises:
        `ValueError`: an adapter that loading would put on other weights ([`refuse_unrepeatable`]).
    """
    if not is_adapter_folder(name):
        return name, None
    settings = json.loads(Path(name, ADAPTER_CONFIG).read_text(encoding="utf-8"))
    refuse_unrepeatable(settings.get("init_lora_weights"), f"the adapter in {name}")
    return base_of(name, settings.get("base_model_name_or_path") or name), name


def refuse_unrepeatable(init_lora_weights: Any, adapter: str) -> None:
    """Raises `ValueError` for an initialisation that changes the base weights, and that PEFT does not repeat.

    PEFT saves an adapter without the base weights that it changed, and initialises the adapter again to load it. An
    exact decomposition (`pissa`, `olora`) then changes them in the same way. A random one changes them in another way;
    one that needs data is left out (`lora_ga`) or fails (`corda`).

    Args:
        init_lora_weights (`bool` or `str`): the setting of the `LoraConfig`.
        adapter (`str`): the adapter's name in the message.
    """
    if str(init_lora_weights).lower().startswith(("pissa_niter_", "corda", "lora_ga")):
        raise ValueError(
            f"{adapter} has init_lora_weights={init_lora_weights!r}, which changes the base weights at random or by "
            "data: loading cannot repeat that, and gives another model. Train with 'pissa' or 'olora', which are exact"
        )


def adapters_on(base: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """The folders inside `folder` with adapters that belong to the model `base`."""
    found = []
    for path in sorted(Path(folder).rglob(ADAPTER_CONFIG)):
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        if Path(base_of(path.parent, name)).absolute() == Path(base).absolute():
            found.append(path.parent)
    return found


# ----------------------------------------------------------------------------------------------------- before training


def try_saving(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    save: Callable[[str, dict[str, Tensor]], Any] | None = None,
    others: Mapping[str, Callable[[str], Any]] | None = None,
) -> None:
    """Saves everything except the weights to a temporary folder inside `folder`, and removes it again.

    Without this trial, an error of saving would appear only after training. The model is not changed, except for a
    generation configuration that cannot be saved.

    Args:
        model: the model, with its configurations.
        tokenizer: saved with the model.
        folder: the folder where the model will be saved.
        save (*optional*):
            Saves model and tokenizer, given a folder and a state. The default is their `save_pretrained`; a generation
            configuration that cannot be saved is then replaced by one that can.
        others (*optional*): further functions that save something to a folder, by the name for error messages.

    Raises:
        `ValueError`: something cannot be saved; the message says what, and why.
    """
    refuse_folder(folder)
    student = causal_lm(model)
    if save is None:
        mend_generation_config(student)
    refuse_undeclared_ties(model)
    # PEFT looks up names while it saves. A plain model can be saved from any state.
    names = model.state_dict() if isinstance(model, PeftModel) else {}
    state = {name: tensor.flatten()[:1] for name, tensor in names.items()}
    parts: dict[str, Callable[[str], Any]] = {
        "the model's configuration": student.config.save_pretrained,
        "the tokenizer": tokenizer.save_pretrained,
        **(others or {}),
    }
    for config in getattr(model, "peft_config", {}).values():
        parts["the adapter's configuration"] = config.save_pretrained
    before = dict(vars(student.config))  # saving writes dtype and class into it
    try:
        with tempfile.TemporaryDirectory(dir=_existing(folder), prefix=TRIAL) as trial, _without_bars():
            try:
                if save is not None:
                    save(trial, state)
                else:
                    model.save_pretrained(trial, state_dict=state)
                    save_tokenizer(tokenizer, trial)
                for write in (others or {}).values():
                    write(trial)
            except Exception as error:
                what, reason = next(_failures(parts, trial), ("the model", error))
                raise ValueError(
                    f"{what} cannot be saved, so the work would be lost: {reason}" + _no_json(student.config, what)
                ) from error
    finally:
        vars(student.config).clear()
        vars(student.config).update(before)


def _failures(parts: Mapping[str, Callable[[str], Any]], folder: str) -> Iterator[tuple[str, Exception]]:
    for what, write in parts.items():
        try:
            write(folder)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            yield what, error


def _no_json(config: PreTrainedConfig, what: str) -> str:
    """The settings that are not JSON, if the model's configuration cannot be saved; else an empty string."""
    if what != "the model's configuration":
        return ""
    names = []
    for name, value in vars(config).items():
        try:
            json.dumps(
                value.to_dict() if hasattr(value, "to_dict") else value, default=str if name == "dtype" else None
            )
        except (TypeError, ValueError):
            names.append(name)
    return f" (config.{', config.'.join(names)})" if names else ""


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def refuse_undeclared_ties(model: nn.Module) -> None:
    """Raises `ValueError` for weights that share memory but are not tied on loading: only one would be saved."""
    if isinstance(model, PeftModel):  # PEFT saves each adapter separately
        return
    tied = getattr(model, "all_tied_weights_keys", {})
    spans = [
        (str(tensor.device), start := tensor.data_ptr(), start + tensor.numel() * tensor.element_size(), name)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel() and name not in tied
    ]
    spans.sort(key=lambda span: span[:2])
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end:
            raise ValueError(
                f"{name} and {other} share their memory, but the configuration does not tie them: only one of them "
                "would be saved. Tie them by the configuration (tie_word_embeddings), or copy one (clone)"
            )


def mend_generation_config(model: PreTrainedModel) -> None:
    """Removes the invalid settings from a generation configuration that transformers refuses to save."""
    config = getattr(model, "generation_config", None)
    if config is None or _fits(config):
        return
    fitting, left = GenerationConfig(), dict(config.to_diff_dict())
    left.pop("transformers_version", None)
    while True:  # a setting that needs another one fits after that one
        fits = {}
        for name, value in left.items():
            trial = copy.deepcopy(fitting)
            setattr(trial, name, value)
            if _fits(trial):
                fitting, fits[name] = trial, value
        left = {name: value for name, value in left.items() if name not in fits}
        if not fits:
            break
    logger.warning(
        "the generation_config of %s cannot be saved as it is: these settings are removed: %s",
        type(model).__name__, ", ".join(f"{name}={value!r}" for name, value in left.items()),
    )  # fmt: skip
    model.generation_config = fitting


def _fits(config: GenerationConfig) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except (ValueError, TypeError, AttributeError):
            return False
    return True


# ---------------------------------------------------------------------------------- with the settings of the base model


_MISSING = object()


class AsItCame:
    """The original values of settings of student and tokenizer that training changes temporarily.

    Args:
        config (`PreTrainedConfig`), generation_config (`GenerationConfig`, *optional*): the student's.
        tokenizer: the student's.
        keep (sequence of names): settings that the user asked to change; they are not restored.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        keep: Iterable[str] = (),
    ) -> None:
        self._settings = {
            name: getattr(config.get_text_config(), name, _MISSING) for name in CHANGED_BY_TRAINING if name not in keep
        }
        generation = generation_config or config.get_text_config()
        self._generation = {name: getattr(generation, name, None) for name in GENERATION_TOKENS if name not in keep}
        self._pad_token = _MISSING if "pad_token_id" in keep else tokenizer_of(tokenizer).pad_token

    def restore(self, model: nn.Module) -> None:
        """Restores the original settings in a student's configuration."""
        student = causal_lm(model)
        for config in (student.config, student.config.get_text_config()):
            for name, value in self._settings.items():
                if value is not _MISSING:
                    setattr(config, name, value)
                elif hasattr(config, name):
                    delattr(config, name)
        if (generation_config := getattr(student, "generation_config", None)) is not None:
            for name, value in self._generation.items():
                setattr(generation_config, name, value)

    @contextmanager
    def restored(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
        """Restores the original settings of student and tokenizer inside the context, for saving."""
        student, tokenizer = causal_lm(model), tokenizer_of(tokenizer)
        configs = {id(config): config for config in (student.config, student.config.get_text_config())}.values()
        before = [(config, {name: getattr(config, name, _MISSING) for name in self._settings}) for config in configs]
        pad_token = tokenizer.pad_token
        own = getattr(student, "generation_config", None)
        generation = {name: getattr(own, name, None) for name in self._generation}
        self.restore(model)
        if self._pad_token is not _MISSING:
            tokenizer.pad_token = self._pad_token
        try:
            yield
        finally:
            for config, values in before:
                for name, value in values.items():
                    if value is not _MISSING:
                        setattr(config, name, value)
            if getattr(student, "generation_config", None) is not None:
                for name, value in generation.items():
                    setattr(student.generation_config, name, value)
            tokenizer.pad_token = pad_token


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Saves a tokenizer without the settings in `FOUND_BY`."""
    with portable(tokenizer):
        tokenizer.save_pretrained(folder)


@contextmanager
def portable(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Removes the settings in `FOUND_BY` from a tokenizer inside the context."""
    tokenizer = tokenizer_of(tokenizer)
    found_by = {name: tokenizer.init_kwargs.pop(name) for name in FOUND_BY if name in tokenizer.init_kwargs}
    try:
        yield
    finally:
        tokenizer.init_kwargs.update(found_by)


def keep_paths_off_the_card(folder: str | os.PathLike[str]) -> None:
    """Removes a base model from the model card in a folder if it is a local path, which is useless to others."""
    path = Path(folder, "README.md")
    if not path.exists():
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    tags, base = list(card.data.get("tags") or []), card.data.get("base_model")
    public = [tag for tag in tags if not (tag.startswith("base_model:") and _is_local(tag.rpartition(":")[2]))]
    if public == tags and not _is_local(base):
        return
    card.data["tags"] = public
    if _is_local(base):
        card.data.pop("base_model")
    card.save(path)


def _is_local(name: Any) -> bool:
    return isinstance(name, str) and (os.path.isabs(name) or os.path.isdir(name))
