"""An SFTTrainer whose runs survive: whole checkpoints, SIGTERM, resuming exactly, stops that lose nothing.

It knows no teacher and no loss. What a trainer above it adds to a checkpoint goes through two methods,
`save_extra_state` and `load_extra_state`.
"""

import logging
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_in_notebook
from trl import SFTTrainer

from hf_distill.cards import CardFacts, complete_card
from hf_distill.kv_projector import Projectors
from hf_distill.metrics import TokenMeans, as_json, sum_dtype
from hf_distill.modeling import causal_lm, drop_unreadable_padding, public_name, tokenizer_of, weights_kind
from hf_distill.saved_weights import load_weights
from hf_distill.saving import (
    AsItCame,
    keep_paths_off_the_card,
    mend_generation_config,
    name_bases_absolutely,
    portable,
    set_aside,
)
from hf_distill.trainers.checkpoints import (
    CheckpointTiming,
    checkpoints,
    drop_loaders,
    end_workers,
    find_checkpoint,
    leave_sigterm_to_the_trainer,
    naming,
    noticing_sigterm,
    problem_of,
    replacing,
    rotate,
    settle_leftovers,
    try_saving_run,
)
from hf_distill.trainers.hard_label_config import HardLabelConfig
from hf_distill.trainers.resuming import other_run, save_run, tell_differing_settings

logger = logging.getLogger(__name__)

# So many halvings take the loss scaler's first scale, 2^16, below 1: what is not finite then never will be.
MAX_SKIPPED_UPDATES = 20


class SurvivingTrainer(SFTTrainer):
    """`trl.SFTTrainer` with checkpoints that are there whole or not at all, and runs that stop without a loss.

    Attributes:
        student (`PreTrainedModel`): the causal language model inside `model`, which adapters and engines are around.
        projectors ([`~hf_distill.kv_projector.Projectors`]):
            Modules that train beside the student and are saved beside it; empty here.
        means (`dict`): what has been summed up for "train" and "eval" since the last log, by what is counted.

    Args:
        model, args, and everything else: as in `trl.SFTTrainer`.
        as_it_came ([`~hf_distill.saving.AsItCame`]): the student's own settings, with which it is saved.
    """

    args: HardLabelConfig
    model: PreTrainedModel
    processing_class: Any  # a tokenizer, whose special tokens type checkers do not know

    _card_title = "Training"
    # What the model card tells beside the trainer's own settings.
    card_facts = CardFacts()
    _staging = ""  # the folder below the output directory in which a checkpoint is being written

    def __init__(self, model: Any, args: HardLabelConfig, *, as_it_came: AsItCame, **kwargs: Any):
        super().__init__(model=model, args=args, **kwargs)
        self.student = causal_lm(self.model)
        self.projectors = Projectors()
        self._as_it_came = as_it_came
        self._own_folders: set[Path] = set()
        self._sigterm: list[int] = []
        self._update_loss: Tensor | float = 0.0  # the sum of this update's losses, finite as long as they are
        self._skipped_updates = 0
        self._first_update = 0  # of this call of train(), which counts tokens from there
        self._eval_dataloaders: dict[str, Any] = {}  # with workers that persist; transformers keeps them, we for a run
        self._saved_update = -1  # by `save_finished_update`
        self._has_told_tokens = False
        self.means: dict[str, dict[str, TokenMeans]] = {"train": {}, "eval": {}}
        name_bases_absolutely(self.model)
        if is_in_notebook():
            self._show_metrics()

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, which may be a part of its processor."""
        return tokenizer_of(self.processing_class)

    # ------------------------------------------------------------------------------- for the trainers above this one

    def save_extra_state(self, checkpoint: Path) -> None:
        """Adds files to a checkpoint that is being written; called by the process that writes."""

    def load_extra_state(self, checkpoint: Path) -> None:
        """Goes on with the files of `save_extra_state`, if they are there; `ValueError` where they do not fit."""

    def describe(self) -> dict[str, str]:
        """The settings of the training, for the model card."""
        return {}

    def run_settings(self) -> dict[str, Any]:
        """Facts about the run that a checkpoint keeps beside its arguments, to warn of differences on resume."""
        return {}

    # ---------------------------------------------------------------------------------------------------- the run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `trl.SFTTrainer`; whatever stops it, the student is saved to `emergency/` in the output directory.

        Raises:
            `SystemExit`: with code 0, for SIGTERM: the update has been finished and a checkpoint saved.
            `ValueError`: there is no whole checkpoint to resume from.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        if not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):  # which one process cannot look into, once split
            # Again, for what has been changed since the construction.
            self._try_saving(with_card=self.args.save_strategy != "no")
        self._tell(", ".join(f"{name}: {value}" for name, value in self.describe_run().items()))
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model:
            # An evaluation before the training has marked the model as prepared without wrapping it: every process
            # would train a student of its own.
            self.model._is_accelerate_prepared = False  # pyright: ignore[reportArgumentType]
            self.accelerator._models.clear()
        self.remove_callback(CheckpointTiming)
        # After those that may want a checkpoint.
        make_room = partial(self.make_own, str(self.args.output_dir))
        self.add_callback(CheckpointTiming(self._is_told_to_stop, make_room, self._own_folders))
        with self.projectors.attached(self.student), noticing_sigterm() as self._sigterm:
            try:
                return super().train(checkpoint, *args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                self._save_emergency(error)
                if self.accelerator.num_processes > 1:
                    error.add_note(
                        f"process {self.args.process_index} of {self.accelerator.num_processes}; if it has lost a "
                        "connection, another process has failed first, and its message is the one to read (a killed "
                        "one has none)"
                    )
                raise
            finally:
                self.is_in_train = False  # transformers leaves it after an error
                # The active loader is another one in the first pass of a resumed run.
                end_workers(self.callback_handler.train_dataloader, self.accelerator.gradient_state.active_dataloader)
                drop_loaders(self._eval_dataloaders)
                self._as_it_came.restore(self.model)

    def _inner_training_loop(self, *args, **kwargs):
        end_workers(self.callback_handler.train_dataloader)  # that of a batch that did not fit
        self.begin()
        return super()._inner_training_loop(*args, **kwargs)

    def begin(self) -> None:
        """Forgets earlier runs, and what a larger batch has left behind that did not fit (`auto_find_batch_size`)."""
        self._update_loss, self._skipped_updates, self._has_agreed_to_stop = 0.0, 0, False
        self._total_train_tokens = 0
        self.means["train"] = {}
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy if self.is_fsdp_enabled else None
        if policy is not None:
            # FSDP would round the loss, and the sums that are logged, to the dtype of the weights.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The checkpoint to resume from, compared with this run; None for a new run."""
        folder = str(self.args.output_dir)
        if self.args.should_save:
            settle_leftovers(folder)
        self.accelerator.wait_for_everyone()
        checkpoint = find_checkpoint(asked, folder, self._checkpoint_problem)
        (checkpoint,) = broadcast_object_list([checkpoint])  # a network's folders do not look the same everywhere
        self._first_update = 0
        if checkpoint is None and self.args.should_save and (others := checkpoints(Path(folder))):
            logger.warning(
                "%s holds checkpoints of another run, up to %s: after the first update all of its files are moved "
                "aside. To go on with it, pass resume_from_checkpoint=True", self.args.output_dir, others[-1].name,
            )  # fmt: skip
        if checkpoint is not None:
            self._first_update = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            self._own_folders.add(Path(checkpoint).absolute().parent.resolve())
            self.load_extra_state(Path(checkpoint))
            if self.is_world_process_zero():
                tell_differing_settings(Path(checkpoint), self)
        return checkpoint

    def _checkpoint_problem(self, checkpoint: Path) -> str | None:
        return problem_of(checkpoint) or self.projectors.misfit(checkpoint) or other_run(checkpoint, self)

    def describe_run(self) -> dict[str, str]:
        """The run as it really is, which is not always what was asked for."""
        processes, micro_batches = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        rows = self.args.per_device_train_batch_size * micro_batches * processes
        precision = self.accelerator.mixed_precision
        return {
            "processes": str(processes),
            "engine": self.engine,
            "student": f"{weights_kind(self.student)}, mixed precision {precision}, {self.args.device}",
            "rows per update": f"{rows} ({micro_batches} micro-batch{'es' * (micro_batches > 1)})",
        }

    @property
    def engine(self) -> str:
        """The engine that spreads the training over processes."""
        if self.is_deepspeed_enabled:
            return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP2" if self.is_fsdp_enabled else "DDP" if self.accelerator.num_processes > 1 else "none"

    def _tell(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.info(message)
            if not logger.isEnabledFor(logging.INFO):
                Console(stderr=True).print(message, highlight=False)

    def _is_told_to_stop(self) -> bool:
        return self._has_agreed_to_stop if self.accelerator.num_processes > 1 else bool(self._sigterm)

    def _run_epoch(self, *args, **kwargs):
        # A run that was killed after its last checkpoint has nothing left to do; transformers would make an update.
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True  # it would go on to the next pass over a stream

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's are wrapped around the one that works
        inner.worker_init_fn = partial(leave_sigterm_to_the_trainer, then=inner.worker_init_fn)
        return loader

    def _sum_over_processes(self, totals: Tensor) -> Tensor:
        reduced: Any = self.accelerator.reduce(totals, reduction="sum")
        return reduced

    # ------------------------------------------------------------------------------------------- non-finite updates

    def watch_loss(self, loss: Tensor) -> None:
        """Called with the loss of each micro-batch of the training; `FloatingPointError` if the update is not finite.

        All processes raise in the same update, before the optimizer steps.
        """
        self._update_loss += loss.detach()
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._stop_unless_finite()  # DeepSpeed's backward steps the optimizer

    def _get_grad_norm(self, model, grad_norm=None):
        # transformers calls this once per update, right before the optimizer's step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()  # older versions of accelerate leave it split: item() would be a part
        scaler = self.accelerator.scaler
        # With float16's loss scaling a non-finite gradient is everyday: the scaler skips that step and halves its
        # scale. DeepSpeed has stepped by now, and has a limit of its own; watch_loss has checked its loss.
        ignored = self.is_deepspeed_enabled
        if scaler is not None and scaler.is_enabled():
            self._skipped_updates = 0 if torch.as_tensor(grad_norm).isfinite() else self._skipped_updates + 1
            ignored = ignored or self._skipped_updates < MAX_SKIPPED_UPDATES
        self._stop_unless_finite(0.0 if ignored else grad_norm)
        return grad_norm

    def _stop_unless_finite(self, grad_norm: Any = 0.0) -> None:
        # One reduction: in the same update all processes learn that a loss is not finite, and that one is to stop.
        sums = (self._update_loss, len(self._sigterm))
        totals = self._sum_over_processes(
            torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in sums])
        )
        # And one look at the device.
        loss, signals, norm = torch.cat([totals, torch.as_tensor(grad_norm).to(totals).view(1)]).tolist()
        self._update_loss, self._has_agreed_to_stop = 0.0, signals > 0
        if not math.isfinite(loss + norm):
            in_a_row = self._skipped_updates >= MAX_SKIPPED_UPDATES
            skipped = f", in {MAX_SKIPPED_UPDATES} updates in a row" if in_a_row else ""
            raise FloatingPointError(
                f"non-finite training at step {self.state.global_step + 1}: loss {loss}, gradient norm "
                f"{norm}{skipped}. The optimizer has not stepped; checkpoints up to this "
                "step are intact. Try a lower learning rate or temperature, or bf16 instead of fp16, and look at the "
                "rows of this step"
            )

    def save_finished_update(self) -> str:
        """Saves a checkpoint of the last finished update, before a stop; all processes come here between two updates.

        Returns:
            What a message says of it.
        """
        self._saved_update = step = self.state.global_step
        folder = str(self.args.output_dir)
        if step > self._first_update:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        elif step == 0:
            return "no update has been finished, so there is nothing to go on from"
        else:
            return "no update has been finished since the checkpoint that this run has resumed from"
        return (
            f"update {step} is finished and saved in {folder}: go on with resume_from_checkpoint=True, on the command "
            "line --resume_from_checkpoint true"
        )

    # ------------------------------------------------------------------------------------------- means over tokens

    def add_means(self, mode: str, over: str, count: Tensor | int, **sums: Tensor) -> None:
        """Adds detached sums to what will be logged of "train" or "eval": a mean over all that is counted as `over`."""
        self.means[mode].setdefault(over, TokenMeans()).add(count, **sums)

    def pop_means(self, mode: str) -> dict[str, float]:
        """The means of "train" or "eval" since the last call, for the log. All processes call it."""
        means, self.means[mode] = self.means[mode], {}
        # Without any hard label there is no "ce", without any token that is paired with one no "agreement".
        return {name: value for part in means.values() for name, value in part.pop(self._sum_over_processes).items()}

    def is_logging(self, mode: str) -> bool:
        """True if this update is logged, so that expensive diagnostics are worth computing."""
        step = self.state.global_step + 1
        if mode == "eval" or (step == 1 and self.args.logging_first_step):
            return True
        return self.args.logging_strategy != "no" and step % max(self.state.logging_steps, 1) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update({name: as_json(value) for name, value in logs.items()})
        # "loss" is in the record of a logging step, which every process makes at the same step.
        if "loss" in logs:
            logs.update(self.pop_means("train"))
            device = self.accelerator.device
            tokens = torch.as_tensor(self._total_train_tokens, device=device).to(sum_dtype(device))
            logs["num_tokens"] = self._sum_over_processes(tokens.unsqueeze(0)).item()
            if not self._has_told_tokens:
                self._has_told_tokens = True
                updates = max(self.state.global_step - self._first_update, 1)
                self._tell(f"about {logs['num_tokens'] / updates:,.0f} tokens per update")
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        splits = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if splits and self.model_wrapped is self.model and not isinstance(self.model, FSDPModule):
            raise ValueError(
                "FSDP and DeepSpeed prepare a model together with its optimizer, so nothing can be evaluated before "
                "the training: set eval_on_start=True, or evaluate without them"
            )
        self.means["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = {f"{metric_key_prefix}_{name}": value for name, value in self.pop_means("eval").items()}
        return output._replace(metrics={**(output.metrics or {}), **means})

    def _show_metrics(self) -> None:
        from transformers.utils.notebook import NotebookProgressCallback

        from hf_distill.notebook_progress import MetricTable

        if self.pop_callback(NotebookProgressCallback) is not None:  # there is none with `disable_tqdm`
            self.add_callback(MetricTable)

    # ------------------------------------------------------------------------------------------ checkpoints, saving

    def _get_output_dir(self, trial):
        return str(Path(super()._get_output_dir(trial), self._staging))

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        with replacing(checkpoint, self.args.should_save, self.accelerator.wait_for_everyone) as staged:
            self._staging = staged.parent.name
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = ""
            if self.args.should_save:
                save_run(staged, self)
                self.save_extra_state(staged)
            # transformers has looked for the best checkpoint where this one is written.
            best = folder / f"checkpoint-{self.state.best_global_step}"
            if best == checkpoint or best.exists():
                self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, {checkpoint, Path(self.state.best_model_checkpoint or "")})
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # when it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_emergency(self, error: BaseException) -> None:
        folder = Path(str(self.args.output_dir), "emergency")
        if self.state.global_step == self._saved_update or (self.state.global_step == 0 and folder.exists()):
            return  # A run that failed to start has nothing to save over the student of an earlier one.
        # Only a non-finite loss stops all processes at the same place. From anywhere else a student that is spread
        # over them cannot be collected: the others may wait for something else, or be gone.
        sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if not (isinstance(error, FloatingPointError) if sharded else self.args.should_save):
            return
        try:
            with replacing(folder, self.args.should_save) as staged:
                self.save_model(str(staged), _internal_call=True)  # without it, it would be pushed to the hub
            logger.error("training stopped at step %d; the student is saved in %s", self.state.global_step, folder)
        except Exception as second:  # noqa: BLE001 - what has stopped the training is raised
            logger.error(
                "training stopped at step %d, and the student is not saved: %r", self.state.global_step, second
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or str(self.args.output_dir)
        # Checkpoints name themselves.
        with nullcontext() if _internal_call else naming(Path(folder)):
            self.make_own(folder)
            # Here, and not in _save: all processes have to gather what an engine has split, and older versions of
            # transformers call _save in the process alone that writes.
            self.projectors.save(folder, is_writer=self.args.should_save)
            super().save_model(output_dir, _internal_call)

    def _try_saving(self, with_card: bool = False) -> None:
        # Not what a subclass adds: it may copy the model, upload it, or need what is not there yet.
        card = partial(SurvivingTrainer.create_model_card, self) if with_card else None
        try_saving_run(self, partial(SurvivingTrainer._save, self), card)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        self.make_own(folder)
        with (
            self.projectors.detached(self.student),
            self._as_it_came.restored(self.model, self.processing_class),
            portable(self.processing_class),
        ):
            drop_unreadable_padding(self.student)
            mend_generation_config(self.student)
            super()._save(folder, state_dict and self.projectors.without(state_dict))
        if self.args.should_save:
            keep_paths_off_the_card(folder)

    def make_own(self, folder: str) -> None:
        """Moves aside what another run has left in a folder, before this one writes to it."""
        place, source = Path(folder).resolve(), self.student.config.name_or_path
        if self.args.should_save and place not in self._own_folders and place != Path(source or os.devnull).resolve():
            set_aside(place)
        self._own_folders.add(place)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:  # Its checkpoints, as DeepSpeed's, hold the student and what is attached to it.
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_student(resume_from_checkpoint)

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        # Callbacks add theirs as they come; the best one is a part of every checkpoint's state.
        is_best = super()._determine_best_metric({name: as_json(value) for name, value in metrics.items()}, trial)
        return is_best or self._is_told_to_stop()  # with save_strategy="best", a checkpoint is saved if this is true

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        if not os.path.isdir(str(self.state.best_model_checkpoint)):
            return logger.warning("%s is gone: the last weights stay", self.state.best_model_checkpoint)
        self._load_student(str(self.state.best_model_checkpoint))

    def _load_student(self, checkpoint: str) -> None:
        with self.projectors.detached(self.student):
            load_weights(self.model, checkpoint)
        self.projectors.load(checkpoint)

    # ------------------------------------------------------------------------------------------------ model card

    def create_model_card(self, model_name: str | None = None, *args, **kwargs) -> None:
        self.make_own(str(self.args.output_dir))
        folder = Path(str(self.args.output_dir))
        name = model_name or folder.resolve().name
        super().create_model_card(name, *args, **kwargs)
        path = folder / "README.md"
        if self.is_world_process_zero() and path.exists():
            card = ModelCard.load(path)
            complete_card(
                card,
                name=name,
                base=public_name(self.student),
                hub_id=self.hub_model_id,
                title=self._card_title,
                settings=self.describe(),
                has_chat_template=bool(self.processing_class.chat_template),
                facts=self.card_facts,
            )
            card.save(path)
