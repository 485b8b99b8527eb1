"""Saving a model: tried before the work, with its base model's settings, in a folder without an earlier run's files."""

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

from hf_distill.modeling import causal_lm

logger = logging.getLogger(__name__)

# Where what an earlier run left is moved to. The underscore keeps it out of what transformers pushes to the hub.
ASIDE = "_earlier-"
TRIAL = "_tmp-trial-"
ADAPTER_CONFIG = "adapter_config.json"

# Files that a run, `prune` or `merge` leaves in its folder, and that loading would take for a part of the next model.
LEFT_BY_A_RUN = (
    "config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*",
    ADAPTER_CONFIG, "adapter_model.*", "projectors", "*projector*.safetensors", "*projector*.json", "training_args.bin",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*tekken.json", "spiece.model", "sentencepiece*.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates", "README.md", "trainer_state.json",
    "settings.json", "report.md", "report.json", "report.png", "comparison.md", "comparison.json", "comparison.png",
    "cosine.png", "pruning.md", "complete.json", "all_results.json", "train_results.json", "eval_results.json",
    "checkpoint-*", "emergency",
)  # fmt: skip

# Settings of a configuration that a training changes for itself.
CHANGED_BY_TRAINING = ("use_cache", "pad_token_id", "output_router_logits", "router_aux_loss_coef")
# How a tokenizer was found on this machine, which transformers writes to its file.
FOUND_BY = ("is_local", "local_files_only")


# ---------------------------------------------------------------------------------------------- folders and their paths


def set_aside(folder: str | os.PathLike[str]) -> None:
    """Moves the files of an earlier run to a new folder `_earlier-<number>` beside them, and logs where.

    Everything else stays: rows, bundles, the restored model that a stage's adapters belong to.
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
    logger.warning("%s holds files of an earlier run (%s): they are moved to %s", folder, names, aside)


def _left_in(folder: Path) -> list[Path]:
    return sorted({path for pattern in LEFT_BY_A_RUN for path in folder.glob(pattern)})


def refuse_moving(folder: str | os.PathLike[str], needed: Mapping[str, str | os.PathLike[str]]) -> None:
    """Raises `ValueError` for a model, by its role, that [`set_aside`] would move and that is `needed` in its place."""
    moved = [path.resolve() for path in _left_in(Path(folder))]
    for role, name in needed.items():
        if os.path.isdir(name) and any(Path(name).resolve().is_relative_to(path) for path in moved):
            raise ValueError(
                f"{role} {os.fspath(name)!r} lies in what an earlier run left in {os.fspath(folder)!r}, which is moved "
                "aside: choose another folder for what is made"
            )


def refuse_folder(folder: str | os.PathLike[str], in_use: Mapping[str, Any] | None = None) -> None:
    """Raises `ValueError` for a folder that nothing can be written to, or that holds a model `in_use`, by its role."""
    path, there = Path(folder).absolute(), _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"nothing can be saved in {os.fspath(folder)!r}: {there} {reason}. Choose another folder")
    for role, name in (in_use or {}).items():
        if name and os.path.isdir(name) and os.path.samefile(name, there) and there == path:
            raise ValueError(
                f"{os.fspath(folder)!r} is the folder of {role}, which would be written over: choose another one for "
                "what is made"
            )


def _existing(folder: str | os.PathLike[str]) -> Path:
    """A folder, or the one above it that is there already."""
    path = Path(folder).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def absolute(name: str | None) -> str | None:
    """A name of a model that means the same in every working directory."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def name_bases_absolutely(model: nn.Module) -> None:
    """Lets adapters name their base model so that it is found from every working directory."""
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = absolute(config.base_model_name_or_path)


def base_of(adapter_folder: str | os.PathLike[str], name: str) -> str:
    """The place of an adapter's base model, for the `name` that the adapter has for it.

    Earlier versions saved paths relative to the training's working directory, which mostly is above the adapter. Of an
    absolute path, the end is looked for above the adapter, because both may have been moved together.
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
    """The model to load and the adapter to put on it, if the name is that of a folder with an adapter alone."""
    path = Path(name, ADAPTER_CONFIG)
    if not path.is_file() or Path(name, "config.json").is_file():
        return name, None
    return base_of(name, json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or name), name


def adapters_on(base: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in `folder` with adapters that belong to a base model in it."""
    found = []
    for path in sorted(Path(folder).rglob(ADAPTER_CONFIG)):
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
        if Path(base_of(path.parent, name)).absolute() == Path(base).absolute():
            found.append(path.parent)
    return found


# ------------------------------------------------------------------------------------------------------ before the work


def try_saving(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    save: Callable[[str, dict[str, Tensor]], Any] | None = None,
    others: Mapping[str, Callable[[str], Any]] | None = None,
) -> None:
    """Saves everything but the weights to a folder beside the others in `folder`, and removes it again.

    What fails only when it is saved would fail after the work. The model is left as it is.

    Args:
        model: with what it is saved from, except for weights.
        tokenizer: saved beside it.
        folder: where the model is to go.
        save (*optional*):
            Saves model and tokenizer, given a folder and a state; by default their `save_pretrained`, for which a
            generation configuration that cannot be saved is replaced by one that can.
        others (*optional*): what else is saved there, by what it is called.

    Raises:
        `ValueError`: something cannot be saved: what, and why.
    """
    refuse_folder(folder)
    student = causal_lm(model)
    if save is None:
        mend_generation_config(student)
    refuse_undeclared_ties(model)
    # PEFT looks up names while it saves; a plain model is saved from any state.
    names = model.state_dict() if isinstance(model, PeftModel) else {}
    state = {name: tensor.flatten()[:1] for name, tensor in names.items()}
    parts: dict[str, Callable[[str], Any]] = {
        "the model's configuration": student.config.save_pretrained,
        "the tokenizer": tokenizer.save_pretrained,
        **(others or {}),
    }
    for config in getattr(model, "peft_config", {}).values():
        parts["the adapter's configuration"] = config.save_pretrained
    before = dict(vars(student.config))  # saving notes dtype and class in it
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
                    f"{what} cannot be saved, so that the work would be lost: {reason}" + _no_json(student.config, what)
                ) from error
    finally:
        vars(student.config).clear()
        vars(student.config).update(before)


def _failures(parts: Mapping[str, Callable[[str], Any]], folder: str) -> Iterator[tuple[str, Exception]]:
    for what, write in parts.items():
        try:
            write(folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised
            yield what, error


def _no_json(config: PreTrainedConfig, what: str) -> str:
    """Names the settings that JSON does not know, where it is the model's configuration that fails."""
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
    """Raises `ValueError` for weights that share memory, unless loading ties them again: only one of them is saved."""
    if isinstance(model, PeftModel):  # its adapters are saved each by itself
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
                f"{name} and {other} share their memory, but nothing in the configuration says so: only one of them "
                "would be saved. Tie them by the configuration (tie_word_embeddings), or copy one (clone)"
            )


def mend_generation_config(model: PreTrainedModel) -> None:
    """Replaces a generation configuration that transformers refuses to save by one without what is at fault."""
    config = getattr(model, "generation_config", None)
    if config is None or _fits(config):
        return
    fitting, left = GenerationConfig(), dict(config.to_diff_dict())
    left.pop("transformers_version", None)
    while True:  # what needs another setting fits after that one
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
        "the generation_config of %s cannot be saved as it is: it goes on without %s",
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


# ------------------------------------------------------------------------------------------------- as the base model is


_MISSING = object()


class AsItCame:
    """Settings of a student and its tokenizer that a training changes for itself, as they were before.

    Args:
        config (`PreTrainedConfig`), generation_config (`GenerationConfig`, *optional*): the student's.
        tokenizer: the student's.
        keep (sequence of names): of settings that are changed because somebody asked for it.
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
        pad = getattr(generation_config or config.get_text_config(), "pad_token_id", None)
        self._generation_pad = _MISSING if "pad_token_id" in keep else pad
        self._pad_token = _MISSING if "pad_token_id" in keep else tokenizer.pad_token

    def restore(self, model: nn.Module) -> None:
        """Gives a student's configuration its own settings back."""
        student = causal_lm(model)
        for config in (student.config, student.config.get_text_config()):
            for name, value in self._settings.items():
                if value is not _MISSING:
                    setattr(config, name, value)
                elif hasattr(config, name):
                    delattr(config, name)
        generation_config = getattr(student, "generation_config", None)
        if generation_config is not None and self._generation_pad is not _MISSING:
            generation_config.pad_token_id = self._generation_pad

    @contextmanager
    def restored(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
        """Within it student and tokenizer are as they came, to be saved so."""
        student = causal_lm(model)
        configs = {id(config): config for config in (student.config, student.config.get_text_config())}.values()
        before = [(config, {name: getattr(config, name, _MISSING) for name in self._settings}) for config in configs]
        pad_token = tokenizer.pad_token
        generation_pad = getattr(getattr(student, "generation_config", None), "pad_token_id", None)
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
                student.generation_config.pad_token_id = generation_pad  # pyright: ignore
            tokenizer.pad_token = pad_token


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Saves a tokenizer without how it was found on this machine."""
    with portable(tokenizer):
        tokenizer.save_pretrained(folder)


@contextmanager
def portable(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within it a tokenizer does not know how it was found on this machine."""
    found_by = {name: tokenizer.init_kwargs.pop(name) for name in FOUND_BY if name in tokenizer.init_kwargs}
    try:
        yield
    finally:
        tokenizer.init_kwargs.update(found_by)


def keep_paths_off_the_card(folder: str | os.PathLike[str]) -> None:
    """Takes a base model that is a local path off the model card in a folder: nobody else could follow it."""
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
