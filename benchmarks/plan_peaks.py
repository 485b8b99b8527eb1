"""The peaks that `hf-distill plan` predicts, against those of real runs on the CPU.

    python -m benchmarks.plan_peaks predict out/peaks.json            # from configurations alone
    python -m benchmarks.plan_peaks measure out/measured.json         # trains every case for two updates
    python -m benchmarks.plan_peaks compare benchmarks/plan_peaks.json out/measured.json

A measured peak is the largest running sum of the allocations and releases that torch's profiler reports during the
second update, on top of the bytes that are alive before: parameters, buffers, states of the optimizer, the teacher. It
is not the memory of the process, in which allocators keep what has been freed. Models are random, of 100 MB and more;
every row has the same length, as the longest rows of a plan.

Predictions are committed (plan_peaks.json) before the runs that they are compared with.
"""

import argparse
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from hf_distill.planning import Machine, plan_run
from hf_distill.report import markdown
from hf_distill.trainers.hard_label import HardLabelTrainer
from hf_distill.trainers.hard_label_config import HardLabelConfig

VOCAB, LENGTH, PROMPT = 8192, 128, 48
SPECIAL = "<pad>", "<eos>", "<unk>"  # parts of no other word: a tokenizer looks for them within words, too
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
LARGER = {"hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10, "intermediate_size": 1792}
STUDENTS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "tie_word_embeddings": True
    },
    "gemma2": {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "head_dim": 64, "sliding_window": 128,
        "tie_word_embeddings": True, "query_pre_attn_scalar": 64,
    },
    "phi": {
        "model_type": "phi", "architectures": ["PhiForCausalLM"], "num_key_value_heads": 8, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attention_dropout": 0.0, "tie_word_embeddings": False,
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 512, "n_layer": 8, "n_head": 8,
        "n_positions": 2048, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip
# Students that see, and their larger teachers. A picture of 224 x 224 takes 64 tokens of both.
IMAGE, SEEN = 3, 64
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text": {"rope_parameters": ROPE, "tie_word_embeddings": True},
        "vision": {"hidden_size": 384, "intermediate_size": 1024, "depth": 8, "num_heads": 6, "window_size": 112,
                   "fullatt_block_indexes": [3, 7]},
    },
    "idefics3": {
        "text": {"model_type": "llama"}, "scale_factor": 2,
        "vision": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
                   "image_size": 224, "patch_size": 14},
    },
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
# Trainer, family of the student, settings. The teacher is a larger Llama, saved in bfloat16 where the case says so.
CASES: dict[str, dict[str, Any]] = {
    "kd, Llama": {"family": "llama"},
    "kd, Llama, checkpointing": {"family": "llama", "gradient_checkpointing": True},
    "kd, Qwen2 in bf16, checkpointing": {"family": "qwen2", "dtype": "bfloat16", "gradient_checkpointing": True},
    "kd, Qwen2, mixed bf16": {"family": "qwen2", "bf16": True},
    "kd, Qwen2, LoRA": {"family": "qwen2", "lora": LORA},
    "kd, Phi, 2 micro-batches, SGD": {"family": "phi", "gradient_accumulation_steps": 2, "optim": "sgd"},
    "kd, Qwen3, packed, chunk 64": {"family": "qwen3", "packing": True, "loss_chunk_size": 64},
    "hard labels, Gemma 2": {"family": "gemma2", "trainer": "hard"},
    "kd, GPT-2, Adafactor, hidden layers": {"family": "gpt2", "optim": "adafactor", "hidden_weight": 1.0},
    "kv, Llama": {"family": "llama", "trainer": "kv"},
    "skd, Llama": {"family": "llama", "trainer": "skd"},
    "kd, a teacher in bf16": {"family": "qwen2", "teacher_dtype": "bfloat16"},
    "kd, Qwen3, LoRA, mixed bf16, checkpointing": {
        "family": "qwen3", "lora": LORA, "bf16": True, "gradient_checkpointing": True
    },
    "kv, Qwen2, mlp projector, checkpointing": {
        "family": "qwen2", "trainer": "kv", "projector": "mlp", "gradient_checkpointing": True
    },
    "skd, Qwen2, 2 micro-batches": {
        "family": "qwen2", "trainer": "skd", "gradient_accumulation_steps": 2
    },
    "hard labels, Llama in bf16, 2 micro-batches": {
        "family": "llama", "trainer": "hard", "dtype": "bfloat16", "gradient_accumulation_steps": 2
    },
    "pictures, Qwen2.5-VL": {"family": "qwen2_5_vl"},
    "pictures, Qwen2.5-VL, tower trained, checkpointing": {
        "family": "qwen2_5_vl", "freeze_vision_tower": False, "gradient_checkpointing": True
    },
    "pictures, Idefics3, LoRA, mixed bf16, checkpointing": {
        "family": "idefics3", "lora": LORA, "bf16": True, "gradient_checkpointing": True
    },
    "pictures, Idefics3, 8 rows": {"family": "idefics3", "per_device_train_batch_size": 8},
}  # fmt: skip
TRAINERS: dict[str, tuple[Any, Any]] = {
    "hard": (HardLabelTrainer, HardLabelConfig), "kd": (KDTrainer, KDConfig),
    "kv": (KVProjectionTrainer, KVProjectionConfig), "skd": (SpeculativeKDTrainer, SpeculativeKDConfig),
}  # fmt: skip
DEFAULTS = {
    "per_device_train_batch_size": 2, "max_length": LENGTH, "bf16": False, "gradient_checkpointing": False,
    "optim": "adamw_torch",
}  # fmt: skip


def make_folders(case: dict[str, Any], folder: Path, *, weights: bool) -> dict[str, str]:
    """Configurations of student and teacher, with random weights and a tokenizer if asked."""
    if case["family"] in SEEING:
        settings = {"student": seeing(case["family"], SIZES), "teacher": seeing(case["family"], SIZES | LARGER)}
    else:
        settings = {
            "student": {**SIZES, **STUDENTS[case["family"]]},
            "teacher": {**SIZES, **LARGER, **STUDENTS["llama"], "dtype": case.get("teacher_dtype", "float32")},
        }
    paths = {}
    for name, values in settings.items():
        place = folder / name
        paths[name] = str(place)
        config = AutoConfig.for_model(**values)
        if not weights:
            config.save_pretrained(place)
            continue
        dtype = getattr(torch, values.get("dtype", "float32"))
        cls = AutoModelForImageTextToText if case["family"] in SEEING else AutoModelForCausalLM
        cls.from_config(config, dtype=dtype).save_pretrained(place)
        words = {name: i for i, name in enumerate(SPECIAL + tuple(f"w{i}" for i in range(len(SPECIAL), VOCAB)))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[2]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1])
        made.save_pretrained(place)
    return paths


def seeing(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model that sees."""
    settings = dict(SEEING[family])
    text, vision = sizes | settings.pop("text"), dict(settings.pop("vision"))
    if family == "qwen2_5_vl":
        vision["out_hidden_size"] = text["hidden_size"]
    return {
        "model_type": family, "text_config": text, "vision_config": vision, "image_token_id": IMAGE,
        "tie_word_embeddings": text.get("tie_word_embeddings", False), "pad_token_id": 0, **settings,
    }  # fmt: skip


class Pictures:
    """A collator of token ids, with random pixels in the form that the processor of a family gives them."""

    def __init__(self, family: str) -> None:
        self.family = family

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
        if self.family == "idefics3":
            return {**batch, "pixel_values": torch.randn(len(rows), 1, 3, 224, 224)}
        patches = torch.randn(len(rows) * 16 * 16, 3 * 2 * 14 * 14)
        grid = torch.tensor([[1, 16, 16]] * len(rows))
        return {**batch, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).long()}


def arguments_of(case: dict[str, Any], folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer, its settings, and keyword arguments that `plan_run` takes as well."""
    trainer, config = TRAINERS[case.get("trainer", "kd")]
    known = {
        name: value for name, value in (DEFAULTS | case).items()
        if name not in ("family", "trainer", "lora", "dtype", "teacher_dtype")
    }  # fmt: skip
    if case["family"] in SEEING:
        known |= {"remove_unused_columns": False}
    if config is SpeculativeKDConfig:
        known |= {"max_length": None, "max_new_tokens": LENGTH - PROMPT, "draft_length": 5, "top_k": VOCAB}
    settings = {
        "output_dir": str(folder / "out"), "use_cpu": True, "max_steps": 2, "report_to": "none", "disable_tqdm": True,
        "seed": 0, "save_strategy": "no", "logging_steps": 100,
        "model_init_kwargs": {"dtype": case.get("dtype", "float32")},
    }  # fmt: skip
    args = config(**{**settings, **known})
    lora = LoraConfig(**case["lora"], task_type="CAUSAL_LM") if "lora" in case else None
    return trainer, args, {"peft_config": lora}


def predict(case: dict[str, Any], machine: Machine | None = None) -> dict[str, int]:
    """The components and the peak of a case, from its configurations; by default on one CPU."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_folders(case, folder, weights=False)
        _, args, more = arguments_of(case, folder)
        teacher = None if case.get("trainer") == "hard" else paths["teacher"]
        plan = plan_run(
            paths["student"], teacher, args, machine=machine or Machine(kind="cpu"), prompt_tokens=PROMPT,
            picture_tokens=SEEN if case["family"] in SEEING else None, **more,
        )  # fmt: skip
    always = dict(plan.always)
    return {**always, "beside": plan.peak - sum(always.values()), "peak": plan.peak}


def rows_of(case: dict[str, Any]) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    length = PROMPT if case.get("trainer") == "skd" else LENGTH
    ids = torch.randint(4, VOCAB, (32, length), generator=generator)
    if case["family"] in SEEING:
        ids[:, :SEEN] = IMAGE
    ids = ids.tolist()
    if case.get("trainer") == "skd":
        return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids]})
    return Dataset.from_dict({"input_ids": ids})


class Watch(TrainerCallback):
    """Profiles the second update, from the end of the first one on."""

    def __init__(self) -> None:
        self.profile, self.alive = profile(activities=[ProfilerActivity.CPU], profile_memory=True), {}
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.alive = alive_in(self.trainer)
            self.profile.start()
        elif state.global_step == 2:
            self.profile.stop()

    def peak(self) -> int:
        """The highest running sum of allocations, in bytes."""
        found: Any = self.profile.profiler
        events = [
            (event.start_ns(), event.nbytes())
            for event in found.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
        ]
        total = highest = 0
        for _, size in sorted(events, key=lambda event: event[0]):
            total += size
            highest = max(highest, total)
        return highest


def alive_in(trainer: Any) -> dict[str, int]:
    """The bytes of parameters, buffers and states, tied ones once."""
    teachers = [teacher.model for teacher in getattr(trainer, "teachers", {}).values()]
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    student = [*trainer.model.parameters(), *trainer.model.buffers()]
    return {
        "student's weights": _bytes(iter(student)),
        "optimizer's states": _bytes(v for state in optimizer.state.values() for v in state.values()),
        "teacher's weights": _bytes(t for model in teachers for t in (*model.parameters(), *model.buffers())),
    }


def _bytes(tensors: Iterator[Any]) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)}
    return sum(storage.nbytes() for storage in found.values())


def measure(case: dict[str, Any]) -> dict[str, int]:
    """The same numbers of a real run."""
    disable_progress_bars()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_folders(case, folder, weights=True)
        trainer_class, args, more = arguments_of(case, folder)
        teacher = {} if case.get("trainer") == "hard" else {"teacher_model": paths["teacher"]}
        if case["family"] in SEEING:
            more["data_collator"] = Pictures(case["family"])
        if case.get("trainer") == "skd":  # "auto" would take the family's own class, which knows no words
            more["processing_class"] = PreTrainedTokenizerFast.from_pretrained(paths["student"])
        watch = Watch()
        trainer = trainer_class(
            paths["student"], args=args, train_dataset=rows_of(case), callbacks=[watch], **teacher, **more
        )
        watch.trainer = trainer
        trainer.train()
    alive = {name: size for name, size in watch.alive.items() if size}
    beside = watch.peak()
    return {**alive, "beside": beside, "peak": sum(alive.values()) + beside}


def compare(predicted: dict[str, Any], measured: dict[str, Any]) -> list[dict[str, str]]:
    """A table of both."""
    mib = 2**20
    rows = []
    for name, found in measured.items():
        said = predicted[name]
        equal = all(said.get(part, 0) == size for part, size in found.items() if part not in ("beside", "peak"))
        rows.append(
            {
                "run": name,
                "weights and states": "equal" if equal else "differ",
                "beside them, predicted": f"{said['beside'] / mib:,.1f}",
                "measured": f"{found['beside'] / mib:,.1f}",
                "error beside them": f"{said['beside'] / found['beside'] - 1:+.1%}",
                "peak, predicted": f"{said['peak'] / mib:,.1f}",
                "peak, measured": f"{found['peak'] / mib:,.1f}",
                "error": f"{said['peak'] / found['peak'] - 1:+.1%}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "measure", "compare"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("--only", nargs="+", help="cases whose names contain one of these")
    options = parser.parse_args()
    if options.what == "compare":
        print(markdown(compare(*(json.loads(Path(file).read_text()) for file in options.files))))
        return
    path = Path(options.files[0])
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, case in CASES.items():
        if not options.only or any(part in name for part in options.only):
            gc.collect()
            found[name] = {"predict": predict, "measure": measure}[options.what](case)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2) + "\n")
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
