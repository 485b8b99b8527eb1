"""Settings that cannot be meant: a table of (settings, words of the error), none of which reads a weight."""

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_distill import (
    HardLabelConfig,
    HardLabelTrainer,
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, make_model, make_tokenizer

NAN, INF = math.nan, math.inf
HARD, KD, KV, SKD = HardLabelConfig, KDConfig, KVProjectionConfig, SpeculativeKDConfig

ROWS = [
    # Numbers that are none.
    (KD, {"kd_weight": True}, "kd_weight has to be a number, got True"),
    (KD, {"kd_weight": None}, "kd_weight has to be a number, got None"),
    (KD, {"kd_weight": "half"}, "kd_weight has to be a number, got 'half'"),
    (KD, {"kd_weight": [0.5]}, "kd_weight has to be a number, got [0.5]"),
    (KD, {"kd_weight": NAN}, "kd_weight has to lie in [0, 1], got nan"),
    (KD, {"kd_weight": "1.5"}, "kd_weight has to lie in [0, 1], got 1.5"),
    (KD, {"temperature": True}, "temperature has to be a number, got True"),
    (KD, {"temperature": "warm"}, "temperature has to be a number, got 'warm'"),
    (KD, {"temperature": NAN}, "temperature has to be above 0 and finite, got nan"),
    (KD, {"temperature": [2, 1]}, "temperature has to be a number, got [2, 1]"),
    (KD, {"hidden_weight": False}, "hidden_weight has to be a number, got False"),
    (KD, {"hidden_weight": -1}, "hidden_weight has to be at least 0 and finite, got -1"),
    (KD, {"hidden_weight": INF}, "hidden_weight has to be at least 0 and finite, got inf"),
    (KD, {"projector_learning_rate": 0}, "projector_learning_rate has to be above 0 and finite, got 0"),
    (KD, {"projector_learning_rate": {}}, "projector_learning_rate has to be a number, got {}"),
    (HARD, {"learning_rate": "fast"}, "learning_rate has to be a number, got 'fast'"),
    (HARD, {"learning_rate": None}, "learning_rate has to be a number, got None"),
    (HARD, {"learning_rate": -1e-4}, "learning_rate has to be at least 0 and finite, got -0.0001"),
    (HARD, {"learning_rate": NAN}, "learning_rate has to be at least 0 and finite, got nan"),
    (HARD, {"weight_decay": -0.1}, "weight_decay has to be at least 0 and finite, got -0.1"),
    (HARD, {"max_grad_norm": -1}, "max_grad_norm has to be at least 0 and finite, got -1"),
    (HARD, {"adam_beta1": 1.0}, "adam_beta1 has to lie in [0, 1), got 1.0"),
    (HARD, {"adam_beta2": -0.5}, "adam_beta2 has to lie in [0, 1), got -0.5"),
    (HARD, {"adam_epsilon": -1e-8}, "adam_epsilon has to be at least 0 and finite, got -1e-08"),
    (HARD, {"warmup_steps": -3}, "warmup_steps has to be at least 0 and finite, got -3"),
    (HARD, {"num_train_epochs": 0}, "num_train_epochs has to be above 0 and finite, got 0"),
    (HARD, {"num_train_epochs": -1.0}, "num_train_epochs has to be above 0 and finite, got -1.0"),
    (HARD, {"num_train_epochs": INF}, "num_train_epochs has to be above 0 and finite, got inf"),
    (HARD, {"logging_steps": -1}, "logging_steps has to be at least 0 and finite, got -1"),
    (HARD, {"save_steps": "often"}, "save_steps has to be a number, got 'often'"),
    (HARD, {"eval_steps": -5}, "eval_steps has to be at least 0 and finite, got -5"),
    (HARD, {"neftune_noise_alpha": -1}, "neftune_noise_alpha has to be at least 0 and finite, got -1"),
    (HARD, {"router_aux_loss_coef": NAN}, "router_aux_loss_coef has to be at least 0 and finite, got nan"),
    # Whole numbers that are none, or too small.
    (HARD, {"loss_chunk_size": 1.5}, "loss_chunk_size has to be a whole number, got 1.5"),
    (HARD, {"loss_chunk_size": True}, "loss_chunk_size has to be a whole number, got True"),
    (HARD, {"loss_chunk_size": "many"}, "loss_chunk_size has to be a whole number, got 'many'"),
    (HARD, {"loss_chunk_size": -1}, "loss_chunk_size has to be at least 1, got -1"),
    (HARD, {"loss_chunk_size": [512]}, "loss_chunk_size has to be a whole number, got [512]"),
    (HARD, {"max_length": -5}, "max_length has to be at least 2, got -5"),
    (HARD, {"max_length": 0}, "max_length has to be at least 2, got 0"),
    (HARD, {"max_length": 1}, "max_length has to be at least 2, got 1"),
    (HARD, {"max_length": 512.5}, "max_length has to be a whole number, got 512.5"),
    (HARD, {"max_length": NAN}, "max_length has to be a whole number, got nan"),
    (HARD, {"max_length": INF}, "max_length has to be a whole number, got inf"),
    (HARD, {"max_steps": 1.5}, "max_steps has to be a whole number, got 1.5"),
    (HARD, {"max_steps": -2}, "max_steps has to be at least -1, got -2"),
    (HARD, {"max_steps": None}, "max_steps has to be a whole number, got None"),
    (HARD, {"seed": -1}, "seed has to be at least 0, got -1"),
    (HARD, {"seed": "lucky"}, "seed has to be a whole number, got 'lucky'"),
    (HARD, {"per_device_train_batch_size": 0}, "per_device_train_batch_size has to be at least 1, got 0"),
    (HARD, {"per_device_train_batch_size": 2.5}, "per_device_train_batch_size has to be a whole number, got 2.5"),
    (HARD, {"per_device_eval_batch_size": -8}, "per_device_eval_batch_size has to be at least 1, got -8"),
    (HARD, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps has to be at least 1, got 0"),
    (HARD, {"gradient_accumulation_steps": False}, "gradient_accumulation_steps has to be a whole number, got False"),
    (HARD, {"dataset_num_proc": 0}, "dataset_num_proc has to be at least 1, got 0"),
    (HARD, {"dataloader_num_workers": -1}, "dataloader_num_workers has to be at least 0, got -1"),
    # Switches.
    (HARD, {"packing": "false"}, "packing has to be True or False, got 'false'"),
    (HARD, {"bf16": "yes"}, "bf16 has to be True or False, got 'yes'"),
    (HARD, {"gradient_checkpointing": 2}, "gradient_checkpointing has to be True or False, got 2"),
    (HARD, {"completion_only_loss": "prompt"}, "completion_only_loss has to be True or False, got 'prompt'"),
    (SKD, {"adaptive": "no"}, "adaptive has to be True or False, got 'no'"),
    (SKD, {"rollout_debug": None}, "rollout_debug has to be True or False, got None"),
    # Choices.
    (KD, {"divergence": None}, "divergence has to be one of adaptive_kl, alpha_beta"),
    (KD, {"divergence": ["forward_kl"]}, "divergence has to be one of adaptive_kl, alpha_beta"),
    (KD, {"divergence": "kl"}, "divergence='kl' does not exist; choose one of"),
    (KD, {"teacher_combination": None}, "teacher_combination has to be one of mixture, sum, route, got None"),
    (KD, {"teacher_combination": "mean"}, "teacher_combination has to be one of mixture, sum, route, got 'mean'"),
    (KD, {"cross_tokenizer": False}, "cross_tokenizer has to be one of auto, aligned, uld, error, got False"),
    (KD, {"cross_tokenizer": "yes"}, "cross_tokenizer has to be auto, aligned, uld or error, got 'yes'"),
    (KD, {"hidden_loss": None}, "hidden_loss has to be one of cosine"),
    (KD, {"hidden_loss": "l2"}, "hidden_loss has to be one of"),
    (KV, {"kv_loss": 1}, "kv_loss has to be one of"),
    (KV, {"kv_loss": "l2"}, "kv_loss has to be one of"),
    (KV, {"kv_positions": "both"}, "kv_positions has to be one of pre, post, got 'both'"),
    (KV, {"kv_positions": 0}, "kv_positions has to be one of pre, post, got 0"),
    (KV, {"projector": None}, "projector has to be one of mlp, pca, got None"),
    (KV, {"projector": "linear"}, "projector has to be one of"),
    (HARD, {"dataset_text_field": None}, "dataset_text_field has to be the name of a column, such as 'text', got None"),
    (HARD, {"dataset_text_field": ["text"]}, "dataset_text_field has to be the name of a column"),
    (HARD, {"packing_strategy": "best"}, "packing_strategy has to be one of bfd, bfd_split, wrapped, got 'best'"),
    (HARD, {"truncation_mode": "middle"}, "truncation_mode has to be keep_start or keep_end, got 'middle'"),
    # Layers.
    (KD, {"hidden_layers": None}, "hidden_layers has to be one of uniform, last, cka or pairs such as [[0, 1]"),
    (KD, {"hidden_layers": []}, "layers have to be one pair [student layer, teacher layer] or more, got []"),
    (KD, {"hidden_layers": [[0]]}, "hidden_layers: layers have to be pairs [student layer, teacher layer] of whole"),
    (KD, {"hidden_layers": [[0, 1.5]]}, "of whole numbers, got [[0, 1.5]]"),
    (KD, {"hidden_layers": [0, 1]}, "hidden_layers: layers have to be pairs [student layer, teacher layer] of whole"),
    (KD, {"hidden_layers": {"0": 1}}, "or pairs such as [[0, 1], [-1, -1]], got {'0': 1}"),
    (KD, {"hidden_layers": 3}, "hidden_layers has to be one of uniform, last, cka or pairs"),
    (KD, {"hidden_layers": "[[0, 1]"}, "hidden_layers has to be JSON such as '[[0, 1]]'"),
    (KD, {"hidden_layers": "all"}, "hidden_layers has to be one of uniform, last, cka or pairs"),
    (KV, {"kv_layers": None}, "kv_layers has to be one of uniform, last, cka or pairs"),
    (KV, {"kv_layers": [[True, 1]]}, "kv_layers: layers have to be pairs [student layer, teacher layer]"),
    # Dicts.
    (KD, {"divergence_params": [1]}, "divergence_params has to be JSON such as '{\"beta\": 0.5}', got [1]"),
    (KD, {"divergence_params": 0.5}, "divergence_params has to be JSON such as '{\"beta\": 0.5}', got 0.5"),
    (KD, {"divergence_params": '{"beta": '}, "divergence_params has to be JSON, got '{\"beta\": '"),
    (KD, {"divergence": "jensen_shannon", "divergence_params": {"beta": True}}, "has to be a number, got True"),
    (KD, {"divergence": "jensen_shannon", "divergence_params": {"beta": NAN}}, "beta in (0, 1), got nan"),
    (KD, {"divergence": "jensen_shannon", "divergence_params": {0: 0.5}}, "divergence_params has 0, but"),
    (KD, {"teacher_model_init_kwargs": ["bf16"]}, "teacher_model_init_kwargs has to be JSON such as"),
    (HARD, {"model_init_kwargs": '{"dtype": '}, "model_init_kwargs has to be JSON, got '{\"dtype\": '"),
    (HARD, {"model_init_kwargs": "bfloat16"}, "model_init_kwargs has to be JSON such as"),
    (HARD, {"dataset_kwargs": [1]}, "dataset_kwargs has to be JSON such as"),
    (HARD, {"gradient_checkpointing_kwargs": True}, "gradient_checkpointing_kwargs has to be JSON such as"),
    # Schedules.
    (KD, {"schedule": {"kd_weight": [True, False]}}, "schedule['kd_weight'] has to be a list of numbers"),
    (KD, {"schedule": {"kd_weight": []}}, "schedule['kd_weight'] has to be a list of numbers"),
    (KD, {"schedule": {"kd_weight": 0.5}}, "schedule['kd_weight'] has to be a list of numbers"),
    (KD, {"schedule": {"kd_weight": ["1", "0"]}}, "schedule['kd_weight'] has to be a list of numbers"),
    (KD, {"schedule": {"kd_weight": [1, 2]}}, "schedule['kd_weight'] has 2, which is out of the range of kd_weight"),
    (KD, {"schedule": {"temperature": [1, NAN]}}, "schedule['temperature'] has nan"),
    (KD, {"schedule": {"hidden_weight": [-1, 0]}}, "schedule['hidden_weight'] has -1"),
    (KD, {"schedule": {"learning_rate": [1, 0]}}, "schedule has 'learning_rate'"),
    (KD, {"schedule": {"kv_weight": [1, 0]}}, "schedule has 'kv_weight'"),
    (KD, {"schedule": [1, 0]}, "schedule has to be JSON such as"),
    (KD, {"schedule": "cosine"}, "schedule has to be JSON such as"),
    (
        KD,
        {"divergence": "taid", "divergence_params": {"t": 0.5}, "schedule": {"t": [0, 1]}},
        "schedule and divergence_params both have 't': remove one of them",
    ),
    # Where teachers are, how they are loaded, what they weigh.
    (KD, {"teacher_device": 0}, "teacher_device has to be text such as 'cuda:0', got 0"),
    (KD, {"teacher_device": True}, "teacher_device has to be text such as 'cuda:1'"),
    (KD, {"teacher_device": ["cuda:0", "cuda:1"]}, "of several teachers 'cuda:1,cuda:2', got ['cuda:0', 'cuda:1']"),
    (KD, {"teacher_device": "gpu"}, "teacher_device='gpu' is no device such as 'cuda:1' or 'cpu', nor one of auto"),
    (KD, {"teacher_device": "cpu,second"}, "teacher_device='cpu,second' is no device"),
    (KD, {"teacher_device": "meta"}, "teacher_device='meta': the meta device holds no weights"),
    (KD, {"teacher_quantization": True}, "teacher_quantization has to be one of 4bit, 8bit, got True"),
    (KD, {"teacher_quantization": 4}, "teacher_quantization has to be one of 4bit, 8bit, got 4"),
    (KD, {"teacher_quantization": "nf4"}, "teacher_quantization has to be one of 4bit, 8bit, got 'nf4'"),
    (
        KD,
        {"teacher_quantization": "4bit", "teacher_device": "offload"},
        "teacher_quantization='4bit' and teacher_device='offload' exclude each other",
    ),
    (
        KD,
        {"teacher_quantization": "8bit", "teacher_device": "cpu,sharded"},
        "teacher_quantization='8bit' and teacher_device='cpu,sharded' exclude each other",
    ),
    (
        KD,
        {"teacher_model_init_kwargs": {"load_in_4bit": True}},
        "teacher_model_init_kwargs has 'load_in_4bit', which from_pretrained does not take: set "
        "teacher_quantization='4bit' in its place",
    ),
    (
        KD,
        {"teacher_model_init_kwargs": '{"load_in_8bit": true}', "teacher_quantization": "4bit"},
        "set teacher_quantization='8bit' in its place",
    ),
    (
        KD,
        {"teacher_model_init_kwargs": {"quantization_config": {}}, "teacher_quantization": "4bit"},
        "teacher_model_init_kwargs has 'quantization_config', and teacher_quantization='4bit' says another",
    ),
    (
        KD,
        {"teacher_model_init_kwargs": {"device_map": "auto"}, "teacher_device": "cpu"},
        "teacher_model_init_kwargs has 'device_map', and teacher_device='cpu' says another",
    ),
    (KD, {"teacher_model_init_kwargs": {"torch_dtype": "bfloat16"}}, "'torch_dtype', which is not read: call it"),
    (
        HARD,
        {"model_init_kwargs": {"load_in_4bit": True}},
        "pass quantization_config=BitsAndBytesConfig(load_in_4bit=True) to the trainer (--load_in_4bit)",
    ),
    (KD, {"teacher_weights": 3}, "teacher_weights has to be a list with a number for each teacher, got 3"),
    (KD, {"teacher_weights": "3,1"}, "teacher_weights has to be a list with a number for each teacher, got '3,1'"),
    (KD, {"teacher_weights": {"a": 3}}, "teacher_weights has to be a list with a number for each teacher"),
    (KD, {"teacher_weights": [True, 1]}, "teacher_weights has to be a number, got True"),
    (KD, {"teacher_weights": [None, 1]}, "teacher_weights has to be a number, got None"),
    (KD, {"teacher_weights": [0, 0]}, "teacher_weights have to be at least 0, not all of them 0"),
    (KD, {"teacher_weights": [-1, 2]}, "teacher_weights have to be at least 0, not all of them 0"),
    (KD, {"teacher_weights": [NAN, 1]}, "teacher_weights have to be at least 0, not all of them 0"),
    (KD, {"teacher_weights": []}, "teacher_weights have to be at least 0, not all of them 0"),
    # Keys and values.
    (KV, {"direction_weight": 0, "magnitude_weight": 0.0}, "both 0, which leaves nothing of the Mercator loss"),
    (KV, {"kv_weight": -1}, "kv_weight has to be at least 0 and finite, got -1"),
    (KV, {"kv_weight": True}, "kv_weight has to be a number, got True"),
    (KV, {"magnitude_weight": NAN}, "magnitude_weight has to be at least 0 and finite, got nan"),
    (KV, {"projector_freeze_after": 1.5}, "projector_freeze_after has to be a whole number, got 1.5"),
    (KV, {"projector_freeze_after": -1}, "projector_freeze_after has to be at least 0, got -1"),
    (KV, {"projector_freeze_after": True}, "projector_freeze_after has to be a whole number, got True"),
    (KV, {"projector_mlp_ratio": 0}, "projector_mlp_ratio has to be above 0"),
    (KV, {"projector_dropout": 1.0}, "projector_dropout in [0, 1)"),
    (KV, {"schedule": {"kv_weight": [1, -1]}}, "schedule['kv_weight'] has -1"),
    # Rollouts.
    (SKD, {"max_new_tokens": 0}, "max_new_tokens has to be at least 1, got 0"),
    (SKD, {"max_new_tokens": 10.5}, "max_new_tokens has to be a whole number, got 10.5"),
    (SKD, {"draft_length": 0}, "draft_length has to be at least 1, got 0"),
    (SKD, {"top_k": 0}, "top_k has to be at least 1, got 0"),
    (SKD, {"top_k": "all"}, "top_k has to be a whole number, got 'all'"),
    (SKD, {"min_prob": 2}, "min_prob has to lie in [0, 1], got 2"),
    (SKD, {"student_temperature": -1}, "student_temperature has to be at least 0 (greedy) and finite, got -1"),
    (SKD, {"teacher_top_p": 0}, "teacher_top_p has to lie in (0, 1], got 0"),
    (SKD, {"rollout_batch_size": 0}, "rollout_batch_size has to be at least 1, got 0"),
    (SKD, {"rollout_batch_size": 1.5}, "rollout_batch_size has to be a whole number, got 1.5"),
    (SKD, {"rollout_mix": "student"}, "rollout_mix has to give the sources speculative, student, teacher, dataset"),
    (SKD, {"rollout_mix": {"student": True}}, "shares of at least 0, not all of them 0"),
    (SKD, {"rollout_mix": {"student": "1"}}, "shares of at least 0, not all of them 0"),
    (SKD, {"rollout_mix": {"student": 0}}, "shares of at least 0, not all of them 0"),
    (SKD, {"rollout_mix": {1: 0.5, "on_policy": 0.5}}, "with the unknown 'on_policy', 1"),
    (SKD, {"rollout_mix": '{"student": '}, "rollout_mix has to be JSON, got '{\"student\": '"),
    (SKD, {"max_length": 512}, "max_length=512 is not used"),
    (SKD, {"packing": True}, "packing and padding_free are not possible with rollouts"),
    (SKD, {"hidden_weight": 1.0}, "hidden_weight is not possible with rollouts"),
    (SKD, {"kd_weight": 0.5}, "kd_weight=0.5 leaves 0.5 for hard labels"),
    # What TRL and transformers would say after the models are loaded, or never.
    (HARD, {"packing": True, "max_length": None}, "packing joins rows up to max_length, which is None"),
    (HARD, {"padding_free": True}, "padding_free=True without packing does not cut rows at max_length=1024"),
    (HARD, {"fp16": True}, "fp16=True needs a GPU"),
    (HARD, {"loss_type": "dft"}, "loss_type='dft' is a loss of SFTTrainer's own"),
    (HARD, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
    (HARD, {"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True saves in the middle of an update"),
    (HARD, {"bf16_full_eval": True}, "bf16_full_eval=True would round the student's weights at an evaluation"),
    (HARD, {"fp16_full_eval": True}, "remove it, and set fp16=True to compute in this precision over float32 weights"),
]  # fmt: skip


def make(config, settings):
    return config(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": [], **settings})


@pytest.mark.parametrize(("config", "settings", "words"), ROWS, ids=[f"{c.__name__} {s}" for c, s, _ in ROWS])
def test_settings_that_cannot_be_meant_are_refused_in_words(config, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make(config, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "settings", "found"),
    [
        (KD, {"kd_weight": "0.25", "temperature": np.float32(2)}, {"kd_weight": 0.25, "temperature": 2.0}),
        (HARD, {"learning_rate": "2e-4", "seed": "7"}, {"learning_rate": 2e-4, "seed": 7}),
        (HARD, {"loss_chunk_size": 512.0, "max_length": np.int64(64)}, {"loss_chunk_size": 512, "max_length": 64}),
        (HARD, {"packing": 1, "padding_free": np.bool_(False)}, {"packing": True, "padding_free": False}),
        (HARD, {"max_grad_norm": None, "max_length": None}, {"max_grad_norm": None, "max_length": None}),
        (HARD, {"num_train_epochs": 0, "max_steps": 3}, {"num_train_epochs": 0, "max_steps": 3}),
        (KD, {"teacher_device": torch.device("cpu")}, {"teacher_device": "cpu"}),
        (KD, {"teacher_device": "cuda:1, offload"}, {"teacher_device": "cuda:1, offload"}),
        (KD, {"hidden_layers": "[[0, 1]]", "hidden_weight": 1}, {"hidden_layers": [[0, 1]]}),
        (KD, {"teacher_model_init_kwargs": {"device_map": "auto", "dtype": "bfloat16"}}, {}),
        (KV, {"direction_weight": 0}, {"direction_weight": 0}),
        (KV, {"kv_loss": "mse", "direction_weight": 0, "magnitude_weight": 0}, {}),
        (SKD, {"rollout_mix": {"student": 1, "dataset": 0}}, {"rollout_mix": {"student": 1, "dataset": 0}}),
    ],
)  # fmt: skip
def test_settings_that_mean_the_same_are_taken(config, settings, found):
    args = make(config, settings)
    for name, value in found.items():
        assert getattr(args, name) == value
        assert type(getattr(args, name)) is type(value)


TEXTS = Dataset.from_dict({"text": SENTENCES})
PROMPTS = Dataset.from_dict({"prompt": SENTENCES, "completion": SENTENCES})
TRAINERS = {HARD: HardLabelTrainer, KD: KDTrainer, KV: KVProjectionTrainer, SKD: SpeculativeKDTrainer}
# Arguments that are no settings: the teachers by the names of their folders, and keyword arguments of the trainer.
TEACHER, TWO = {"teacher_model": "teacher"}, {"teacher_model": ["teacher", "other"]}
ALONE = "teacher_combination and teacher_weights need several teachers"
CONSTRUCTIONS = [
    (KD, {}, {}, "teacher_model is missing"),
    (KD, {}, {"teacher_model": []}, "teacher_model is missing"),
    (KD, {}, {"teacher_model": 3}, "teacher_model has to be a hub id, a path, a model"),
    (KD, {"teacher_weights": [1, 2]}, TEACHER, "there are 1 teachers (teacher) and args.teacher_weights=[1, 2]"),
    (KD, {"teacher_weights": [1]}, TEACHER, ALONE),
    (KD, {"teacher_combination": "sum"}, TEACHER, ALONE),
    (KD, {"teacher_weights": [1, 2, 3]}, TWO, "there are 2 teachers"),
    (KD, {"teacher_device": "cpu,cpu,cpu"}, TWO, "name one device, or one for each"),
    (KD, {"teacher_combination": "route"}, TWO, "teacher_combination='route' needs a column 'teacher'"),
    (KD, {"hidden_weight": 1.0}, TWO, "hidden_weight needs one teacher"),
    (KD, {"hidden_weight": 1.0, "hidden_layers": [[9, 0]]}, TEACHER, "the student has 2 layers, there is no layer 9"),
    (KD, {"teacher_device": "sharded"}, TEACHER, "teacher_device='sharded' needs FSDP2 or ZeRO-3"),
    (KD, {}, {"teacher_model": "base"}, "teacher_model='base' needs a student with adapters"),
    (KD, {"metric_for_best_model": "kdd", "eval_strategy": "steps"}, TEACHER, "metric_for_best_model='kdd' is in no"),
    (KV, {"kv_layers": [[0, 7]]}, TEACHER, "the teacher has 2 layers, there is no layer 7"),
    (KV, {"teacher_combination": "route"}, TWO, "teacher_combination='route' gives each row one teacher"),
    (KV, {}, {**TEACHER, "optimizers": (object(), None)}, "optimizers are not taken"),
    (SKD, {}, TWO, "text is written with one teacher"),
    (SKD, {"teacher_device": "offload"}, TEACHER, "the teacher has to be whole on its devices"),
    (SKD, {}, {**TEACHER, "formatting_func": str}, "formatting_func is not used"),
    (SKD, {}, {**TEACHER, "data_collator": list}, "data_collator has to make prompts"),
    (HARD, {}, {"optimizers": (object(), None), "optimizer_cls_and_kwargs": (object, {})}, "are both given"),
    (HARD, {"completion_only_loss": True}, {"formatting_func": str}, "formatting_func makes texts without"),
    (HARD, {"padding_free": True, "max_length": None}, {"data_collator": list}, "data_collator is not used"),
    (HARD, {"assistant_only_loss": True}, {}, "assistant_only_loss=True needs conversations"),
    (HARD, {"eos_token": "<none>"}, {}, "eos_token='<none>' is no token of the student's tokenizer"),
]  # fmt: skip


@pytest.fixture(scope="module")
def two_teachers(folder, tmp_path_factory):
    """The folder of models with a second teacher."""
    make_model(seed=3).save_pretrained(folder / "other")
    make_tokenizer().save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize(
    ("config", "settings", "given", "words"),
    CONSTRUCTIONS,
    ids=[f"{c.__name__} {s} {list(given)}" for c, s, given, _ in CONSTRUCTIONS],
)
def test_what_contradicts_models_rows_or_arguments_is_refused_before_a_weight_is_read(
    two_teachers, tmp_path, monkeypatch, config, settings, given, words
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a weight is read"))
    monkeypatch.chdir(two_teachers)
    args = make(config, {"output_dir": str(tmp_path), "eval_steps": 1, **settings})
    rows = PROMPTS if config is SKD else TEXTS
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        TRAINERS[config](model="student", args=args, train_dataset=rows, eval_dataset=rows, **given)
    assert "\n" not in str(error.value)
