"""The methods of transformers, TRL and accelerate that the trainers override or use are still there, and are called.

A method that is renamed underneath leaves an override that is never called, and nothing fails. These tables are the
whole list. They name the parameters that our code relies on, in their order.
"""

import ast
import inspect
from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import accelerate
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import EarlyStoppingCallback, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTTrainer

import hf_distill
from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig
from hf_distill.trainers.preparing import PreparingTrainer
from hf_distill.trainers.surviving import SurvivingTrainer
from tests.conftest import SENTENCES, make_model

TRAINERS = (SurvivingTrainer, PreparingTrainer, HardLabelTrainer, KDTrainer, KVProjectionTrainer, SpeculativeKDTrainer)

OVERRIDDEN = {
    "_clip_grad_norm": "model",
    "_determine_best_metric": "metrics trial",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_eval_sampler": "eval_dataset",
    "_get_grad_norm": "model grad_norm",
    "_get_num_items_in_batch": "batch_samples device",
    "_get_output_dir": "trial",
    "_inner_training_loop": "batch_size args resume_from_checkpoint trial ignore_keys_for_eval",
    "_get_train_sampler": "train_dataset",
    "_init_training_state": "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_prepare_inputs": "inputs",
    "_prepare_dataset": "dataset processing_class args packing formatting_func dataset_name",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_set_signature_columns_if_needed": "",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_model_card": "model_name dataset_name tags",
    "create_optimizer": "model",
    "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
    "get_eval_dataloader": "eval_dataset",
    "get_batch_samples": "epoch_iterator num_batches device",
    "log": "logs start_time",
    "predict": "test_dataset ignore_keys metric_key_prefix",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "save_model": "output_dir _internal_call",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
}
SETTINGS = {"_name", "_paper", "_tag_names"}  # class attributes that TRL reads

# Private names that are used and not overridden.
USED = {
    "_C": (torch, None),
    "_attn_implementation": (PreTrainedConfig, None),
    "_cdata": (torch.empty(0).untyped_storage(), None),
    "_current_autograd_node": (torch._C, None),
    "_current_graph_task_id": (torch._C, None),
    "_dynamo": (torch, None),
    "_overloadpacket": (torch.ops.aten.add.Tensor, None),
    "_scaled_dot_product_flash_attention": (torch.ops.aten, None),
    "_from_config": (PreTrainedModel, "config"),
    "_hf_deepspeed_config_weak_ref": (deepspeed_integration, None),
    "_no_split_modules": (PreTrainedModel, None),
    "_shutdown_workers": (_MultiProcessingDataLoaderIter, None),
    "_storage_Use_Count": (torch._C, None),
    "_use_count": (torch.Tensor, None),
}
# Private attributes of objects, which `test_a_run_has_the_attributes` looks for.
ATTRIBUTES = {
    "_formatting_func",
    "_hf_hook",
    "_is_accelerate_prepared",
    "_models",
    "_signature_columns",
    "_total_train_tokens",
}
PYTHON_AND_TORCH = {
    "_actions",
    "_asdict",
    "_buffers",
    "_exit",
    "_fields",
    "_option_string_actions",
    "_parameters",
    "_replace",
}


def parameters(function) -> str:
    names = inspect.signature(function).parameters
    return " ".join(name for name in names if name not in ("self", "kwargs"))


def defined(trainer: type) -> dict[str, object]:
    return {name: value for name, value in vars(trainer).items() if not name.startswith("__")}


def test_the_table_of_overrides_is_complete():
    overridden = {name for trainer in TRAINERS for name in defined(trainer) if hasattr(SFTTrainer, name)}
    assert overridden == set(OVERRIDDEN) | SETTINGS


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_overridden_method_is_there_with_its_parameters(name):
    assert parameters(getattr(SFTTrainer, name)) == OVERRIDDEN[name]


@pytest.mark.parametrize("name", USED)
def test_a_used_name_is_there_with_its_parameters(name):
    owner, expected = USED[name]
    assert hasattr(owner, name)
    assert expected is None or parameters(getattr(owner, name)) == expected


def test_the_table_of_used_names_is_complete():
    ours, used = set(), set()
    for path in Path(hf_distill.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                used.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "patch.object":
                used |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("hf_distill"):
                used |= {name.name for name in node.names if name.name.startswith("_")}
    known = set(USED) | ATTRIBUTES
    used = {name for name in used if name.startswith("_")}
    assert used - ours - PYTHON_AND_TORCH == known - ours
    assert used | ours >= known  # Some are also assigned to.


@pytest.fixture(scope="module")
def rows():
    words = [sentence.split(" ", 4) for sentence in SENTENCES]
    return Dataset.from_dict({"prompt": [" ".join(w[:4]) for w in words], "completion": [" " + w[4] for w in words]})


def settings(folder) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "save_steps": 1,
        "eval_steps": 1, "save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(rows, tokenizer, tmp_path_factory):
    """Per trainer and method of ours how often it was called: in training, evaluation, saving, resuming, pushing."""
    calls: Counter[tuple[str, str]] = Counter()
    loaders: Counter[bool] = Counter()
    finished = {}
    made = {
        HardLabelTrainer: (HardLabelConfig, {}),
        KDTrainer: (KDConfig, {}),
        KVProjectionTrainer: (KVProjectionConfig, {}),
        SpeculativeKDTrainer: (SpeculativeKDConfig, {"max_new_tokens": 4}),
    }
    with pytest.MonkeyPatch.context() as patch:

        def watch(trainer: type, name: str) -> None:
            method = vars(trainer)[name]

            def watched(self, *args, **kwargs):
                calls[trainer.__name__, name] += 1
                if (trainer, name) == (PreparingTrainer, "_get_dataloader"):
                    loaders[kwargs.get("is_training", False)] += 1
                return method(self, *args, **kwargs)

            patch.setattr(trainer, name, watched)

        for trainer in TRAINERS:
            for name in OVERRIDDEN.keys() & defined(trainer).keys():
                watch(trainer, name)
        for trainer, (config, more) in made.items():
            folder = tmp_path_factory.mktemp(trainer.__name__)
            teachers, own = [make_model(seed=2)], {"teacher_processing_class": tokenizer}
            if trainer is HardLabelTrainer:
                teachers, own = [], {}
            run = trainer(
                make_model(seed=1), *teachers, config(**settings(folder), **more), rows, rows, tokenizer, **own,
                callbacks=[EarlyStoppingCallback(5)],
            )  # fmt: skip
            run.train()
            run.save_model()
            run.predict(rows)
            run.args.push_to_hub, run.hub_model_id, run.push_in_progress = True, "nobody/nothing", None
            patch.setattr(transformers.trainer, "hf_api", MagicMock())
            run.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
            finished[trainer] = run
    return calls, loaders, finished


def test_every_override_is_called(runs):
    ours = {(trainer.__name__, name) for trainer in TRAINERS for name in OVERRIDDEN.keys() & defined(trainer).keys()}
    assert ours - runs[0].keys() == set()


def test_data_loaders_say_whether_they_are_for_training(runs):
    runs_and_resumed = 2 * 4
    assert runs[1][True] == runs_and_resumed
    assert runs[1][False] >= runs_and_resumed


def test_a_run_has_the_attributes(runs):
    trainer = runs[2][KDTrainer]
    assert trainer._total_train_tokens > 0
    assert trainer._signature_columns
    assert trainer._formatting_func is None
    assert isinstance(trainer.accelerator._models, list)
    assert trainer.model._is_accelerate_prepared
    assert trainer.model_accepts_loss_kwargs
    assert trainer.current_gradient_accumulation_steps == 1
    assert trainer.aux_loss_enabled is False
    offloaded = accelerate.cpu_offload(make_model(seed=3), execution_device="cpu")
    assert offloaded.get_input_embeddings()._hf_hook.execution_device == "cpu"


def test_attention_functions_are_looked_up_where_keys_and_values_are_captured():
    assert parameters(ALL_ATTENTION_FUNCTIONS.get_interface) == "attn_implementation default"


def test_functions_beside_the_trainer_have_their_parameters():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from trl.models import prepare_deepspeed

    assert parameters(load_balancing_loss_func) == "gate_logits num_experts top_k attention_mask"
    assert parameters(prepare_deepspeed) == "model accelerator"
    assert parameters(accelerate.utils.fsdp2_prepare_model) == "accelerator model"
    assert parameters(trl.data_utils.is_conversational_from_value) == "example"
