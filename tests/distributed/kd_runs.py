"""The runs that test_kd_ddp.py compares: in its own process, and as a script under torchrun with two of them.

Usage: torchrun --standalone --nproc_per_node 2 kd_runs.py FOLDER
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from hf_distill import (
    KDConfig,
    KDTrainer,
    KVProjectionConfig,
    KVProjectionTrainer,
    SpeculativeKDConfig,
    SpeculativeKDTrainer,
)
from tests.conftest import SENTENCES, leave_imports_to_themselves, make_model, make_tokenizer
from tests.remote.served_model import ServedModel
from tests.remote.stub import Stub

# One update of eight rows, however many processes there are.
NUM_ROWS = 8


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_rows(tokenizer) -> Dataset:
    """Ragged rows, so that processes never have the same number of label-bearing tokens."""
    ids = [tokenizer(text)["input_ids"][: 5 + 4 * i] for i, text in enumerate(SENTENCES[:NUM_ROWS])]
    labels = [[-100] * (1 + i % 4) + row[1 + i % 4 :] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def make_settings(folder, num_processes: int) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 2,
        "gradient_accumulation_steps": NUM_ROWS // 2 // num_processes, "logging_steps": 1, "save_strategy": "no",
        "temperature": 2.0, "kd_weight": 0.7,
    }  # fmt: skip


def make_trainer(folder, num_processes: int, student, teacher, tokenizers=None, **changes) -> KDTrainer:
    """`teacher` and `tokenizers` may be dicts; each second row has another teacher, if rows have teachers."""
    tokenizer = make_tokenizer()
    rows = make_rows(tokenizer)
    train_rows = rows.to_iterable_dataset() if changes.pop("stream", False) else rows
    if changes.get("teacher_combination") == "route":
        train_rows = rows = rows.add_column("teacher", [[*teacher][i % len(teacher)] for i in range(len(rows))])
    return KDTrainer(
        student, teacher, KDConfig(**make_settings(folder, num_processes) | changes), train_rows,
        # Seven rows: the last batches of two processes are filled up with rows that were there before.
        rows.select(range(1, NUM_ROWS)), tokenizer, teacher_processing_class=tokenizers or tokenizer,
        callbacks=[Gradients()],
    )  # fmt: skip


def make_speculative(folder, num_processes: int, student, teacher, **changes) -> SpeculativeKDTrainer:
    """The same for text that is written greedily, so that it does not depend on which process writes which row."""
    tokenizer = make_tokenizer()
    prompts = [{"student_prompt_ids": ids[: 2 + i % 3]} for i, ids in enumerate(make_rows(tokenizer)["input_ids"])]
    rows = Dataset.from_list([{**row, "teacher_prompt_ids": [7, *row["student_prompt_ids"]]} for row in prompts])
    settings = make_settings(folder, num_processes) | {
        "kd_weight": 1.0, "max_new_tokens": 8, "top_k": 50, "adaptive": True, "student_temperature": 0.0,
        "teacher_temperature": 0.0,
    }  # fmt: skip
    return SpeculativeKDTrainer(
        student, teacher, SpeculativeKDConfig(**settings | changes), rows,
        rows.select(range(1, NUM_ROWS)), tokenizer, teacher_processing_class=tokenizer, callbacks=[Gradients()],
    )  # fmt: skip


def make_kv(folder, num_processes: int, student, teacher, **changes) -> KVProjectionTrainer:
    """The same with keys and values, and a projector that is trained with the student."""
    tokenizer = make_tokenizer()
    rows = make_rows(tokenizer)
    settings = make_settings(folder, num_processes) | {
        "projector": "mlp", "projector_dropout": 0.0, "projector_learning_rate": 0.1, "kv_layers": [[0, 1], [1, 1]],
    }  # fmt: skip
    torch.manual_seed(11)  # for the projector
    return KVProjectionTrainer(
        student, teacher, KVProjectionConfig(**settings | changes), rows,
        rows.select(range(1, NUM_ROWS)), tokenizer, teacher_processing_class=tokenizer, callbacks=[Gradients()],
    )  # fmt: skip


def run_speculative(folder, num_processes: int) -> dict:
    trainer = make_speculative(folder, num_processes, make_model(seed=2), make_model(seed=1, hidden_size=48))
    trainer.evaluate()  # before the training, which has to wrap the model all the same
    trainer.train()
    return results_of(trainer)


def run_kv(folder, num_processes: int) -> dict:
    trainer = make_kv(folder, num_processes, make_model(seed=2), make_model(seed=1, hidden_size=48))
    trainer.train()
    results = results_of(trainer)
    results["weights"] |= {
        f"projector.{name}": p.clone() for name, p in trainer.projectors["projector"].state_dict().items()
    }
    return results


def run_stored(folder, num_processes: int, **changes) -> dict:
    """The same from a store that these processes have written, a text at a time so that its numbers are the same."""
    writer = make_trainer(folder, num_processes, make_model(seed=2), make_model(seed=1, hidden_size=48))
    writer.write_cache(folder / "store", batch_size=1)
    trainer = make_trainer(folder, num_processes, make_model(seed=2), f"cache:{folder / 'store'}", **changes)
    trainer.train()
    return results_of(trainer)


def run_remote(folder, num_processes: int) -> dict:
    """The same with a teacher at an address; each process has a server of its own, which does not change anything."""
    served = ServedModel(make_model(seed=1, hidden_size=48), make_tokenizer(), name="t")
    with Stub(served, max_logprobs=-1) as stub:
        trainer = make_trainer(folder, num_processes, make_model(seed=2), stub.url, tokenizers={}, teacher_logprobs=-1)
        trainer.train()
        return results_of(trainer)


def students() -> dict[str, nn.Module]:
    adapted = get_peft_model(make_model(seed=2), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return {"full": make_model(seed=2), "lora": adapted, "tied": make_model("qwen2", seed=2)}


def run(folder, num_processes: int) -> dict:
    """What two updates leave behind: gradients of the last, weights, logs, the evaluation after it."""
    results = {}
    for name, student in students().items():
        trainer = make_trainer(Path(folder, name), num_processes, student, make_model(seed=1, hidden_size=48))
        trainer.train()
        results[name] = results_of(trainer)
        results[name]["packed_eval"] = evaluate_packed(trainer)
    results["speculative"] = run_speculative(Path(folder, "speculative"), num_processes)
    results["kv"] = run_kv(Path(folder, "kv"), num_processes)
    results["stored"] = run_stored(Path(folder, "stored"), num_processes)
    results["remote"] = run_remote(Path(folder, "remote"), num_processes)
    results["streamed"] = run_stored(Path(folder, "streamed"), num_processes, stream=True)
    return results


def results_of(trainer: KDTrainer) -> dict:
    capture = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients))
    return {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "gradients": capture.found,
        "weights": copy.deepcopy(trainer.model.state_dict()),
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "eval": trainer.evaluate(),
    }


def evaluate_packed(trainer: KDTrainer) -> dict[str, float]:
    """The same rows in a dataset of three packs, which do not divide among two processes either."""
    trainer.args.padding_free = trainer.padding_free = trainer.data_collator.padding_free = True
    rows = trainer.eval_dataset.to_list()
    packed = [
        {
            "input_ids": [token for row in pack for token in row["input_ids"]],
            "labels": [label for row in pack for label in (-100, *row["labels"][1:])],
            "seq_lengths": [len(row["input_ids"]) for row in pack],
        }
        for pack in (rows[:3], rows[3:5], rows[5:])
    ]
    return trainer.evaluate(Dataset.from_list(packed))


def run_into_a_nan(folder, num_processes: int, rank: int) -> str:
    """What the only process with a broken teacher, and those without, end with."""
    teacher = make_model(seed=1)
    trainer = make_trainer(folder, num_processes, make_model(seed=2), teacher)
    if rank == num_processes - 1:
        teacher.model.norm.weight.data[:] = float("nan")
    try:
        trainer.train()
    except FloatingPointError as error:
        return str(error)
    return "trained on"


if __name__ == "__main__":
    leave_imports_to_themselves()
    folder = Path(sys.argv[1])
    results = run(folder, num_processes=2)
    rank = torch.distributed.get_rank()
    results["nan"] = run_into_a_nan(folder / "nan", 2, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
