"""Findings of `hf-distill doctor` about runs in which a fault was planted, and about runs without one.

    python -m benchmarks.doctor tuning                              # ten faults that thresholds may be set on
    python -m benchmarks.doctor held-out clean --smollm2 FOLDER     # once, when all thresholds are set

What is planted was listed before the checks were written: `planted_faults.py`. A fault counts as found if one of the
checks in `FOUND_BY` warns or fails; every other warning or failure is a false alarm.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback

from benchmarks.planted_faults import CLEAN, HELD_OUT, TUNING
from benchmarks.stories import some_layers
from hf_distill import KDConfig, KDTrainer
from hf_distill.demo import TEACHER, make_student, make_trainer
from hf_distill.demo.text import stories
from hf_distill.diagnosis import diagnose
from hf_distill.diagnosis.findings import FAILURE, WARNING
from hf_distill.report import markdown

# The checks that speak about a fault.
FOUND_BY = {
    "doubled BOS": ["BOS"],
    "leaked rows": ["held-out rows"],
    "renamed vocabulary": ["teacher's perplexity"],
    "shifted labels": ["labels"],
    "broken 4-bit teacher": ["cost of bits"],
    "mislabelled padding": ["padding"],
    "lost system prompt": ["lost messages"],
    "copied rows": ["copies"],
    "mixing student": ["split batches"],
    "high learning rate": ["learning rate"],
    "other template": ["chat templates"],
    "masked end": ["EOS"],
    "endless teacher": ["teacher's EOS"],
    "swapped models": ["teacher's perplexity"],
    "wrong rotation": ["teacher's perplexity"],
    "cut rows": ["cut rows"],
    "leaked rows, retyped": ["held-out rows"],
    "low learning rate": ["learning rate"],
    "misspelt LoRA target": ["LoRA"],
    "half a store": ["construction"],
}
NUM_TRAIN, NUM_HELD_OUT, UPDATES, RATE = 400, 100, 400, 1e-3
# A user's text and the assistant's after it, without marks: text that the packaged teacher can read.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{{ ' ' }}{% endif %}{% endfor %}"
)
Arguments = dict[str, Any]


class Workshop:
    """Models and rows for set-ups, in a folder.

    Args:
        folder (`Path`): an empty one.
        smollm2 (`str`, *optional*): the folder of SmolLM2-135M-Instruct.
    """

    def __init__(self, folder: Path, smollm2: str | None) -> None:
        self.folder, self.smollm2 = folder, smollm2
        self.tokenizer = AutoTokenizer.from_pretrained(TEACHER)
        self.random = self.saved("random", make_student(self.tokenizer, seed=0))
        self.trained = self.saved("trained", self._trained())
        self.texts = stories(NUM_TRAIN, seed=1000), stories(NUM_HELD_OUT, seed=2000)

    def _trained(self) -> nn.Module:
        teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
        trainer = make_trainer("distilled", str(self.folder / "run"), 0, teacher, self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.args.max_steps = UPDATES
        trainer.train()
        return trainer.model

    def saved(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The folder of a model with its tokenizer."""
        model.save_pretrained(self.folder / name)
        (tokenizer or self.tokenizer).save_pretrained(self.folder / name)
        return str(self.folder / name)

    def teacher(self, name: str, change: Callable[[Any], None], tokenizer: Any = None) -> str:
        """The folder of a changed copy of the packaged teacher."""
        model = AutoModelForCausalLM.from_pretrained(TEACHER)
        with torch.no_grad():
            change(model)
        return self.saved(name, model, tokenizer)

    def with_tokenizer(self, change: Callable[[Any], None]) -> PreTrainedTokenizerBase:
        """A changed copy of the tokenizer."""
        tokenizer = copy.deepcopy(self.tokenizer)
        change(tokenizer)
        return tokenizer

    def args(self, **changes: Any) -> KDConfig:
        """The settings of the demo."""
        settings: Arguments = {
            "output_dir": str(self.folder / "out"), "max_steps": UPDATES, "per_device_train_batch_size": 8,
            "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 10, "report_to": "none",
            "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "kd_weight": 0.9, "save_strategy": "no",
        }  # fmt: skip
        return KDConfig(**{**settings, **changes})

    # ------------------------------------------------------------------------------------------ set-ups without a fault

    def of_texts(self, **changes: Any) -> Arguments:
        """A trained student, and texts."""
        train, held_out = (Dataset.from_dict({"text": texts}) for texts in self.texts)
        arguments = {"model": self.trained, "teacher_model": TEACHER, "train_dataset": train, "eval_dataset": held_out}
        return {**arguments, "args": self.args(), **changes}

    def of_tokens(self, change: Callable[[list[int]], Mapping[str, list[int]]], **changes: Any) -> Arguments:
        """The same as token ids; `change` makes a row of them."""
        ends = [self.tokenizer.eos_token_id]
        sides = [[change([*ids, *ends]) for ids in self.tokenizer(texts)["input_ids"]] for texts in self.texts]
        train, held_out = map(Dataset.from_list, sides)
        return self.of_texts(train_dataset=train, eval_dataset=held_out, **changes)

    def of_pairs(self) -> Arguments:
        """Prompts and completions, packed."""
        rows = [
            [dict(zip(("prompt", "completion"), _halves(text), strict=True)) for text in texts] for texts in self.texts
        ]
        train, held_out = map(Dataset.from_list, rows)
        args = self.args(packing=True, max_length=512, per_device_train_batch_size=2)
        return self.of_texts(train_dataset=train, eval_dataset=held_out, args=args)

    def of_chats(self, system: str = "", template: str = TEMPLATE, theirs: str = TEMPLATE, **changes: Any) -> Arguments:
        """Conversations, with a system message if there is one; the templates of student and teacher."""
        train, held_out = (Dataset.from_list([_chat(text, system) for text in texts]) for texts in self.texts)
        mine = self.with_tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", template))
        others = self.with_tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", theirs))
        student = self.saved("chatting student", AutoModelForCausalLM.from_pretrained(self.trained), mine)
        teacher = self.teacher("chatting teacher", lambda model: None, others)
        changes = {"args": self.args(assistant_only_loss=True), **changes}
        return self.of_texts(
            model=student, teacher_model=teacher, train_dataset=train, eval_dataset=held_out, **changes
        )

    def of_smollm2(self, *, chats: bool) -> Arguments:
        """SmolLM2: conversations with every second layer of it, or texts with LoRA."""
        assert self.smollm2 is not None
        tokenizer = AutoTokenizer.from_pretrained(self.smollm2)
        settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_length": 512}
        if chats:
            teacher = AutoModelForCausalLM.from_pretrained(self.smollm2, dtype=torch.float32)
            student = some_layers(teacher, list(range(0, teacher.config.num_hidden_layers, 2)))
            model = self.saved("SmolLM2 student", student, tokenizer)
            rows = [[_chat(text, "You tell stories for children.") for text in texts] for texts in self.texts]
            args, more = self.args(learning_rate=1e-4, **settings), {}
        else:
            model, rows = self.smollm2, [[{"text": text} for text in texts] for texts in self.texts]
            args = self.args(learning_rate=2e-4, teacher_quantization="4bit", **settings)
            more = {"peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")}
        train, held_out = map(Dataset.from_list, rows)
        return {
            "model": model, "teacher_model": self.smollm2, "args": args, "train_dataset": train,
            "eval_dataset": held_out, **more,
        }  # fmt: skip

    def clean(self, name: str) -> Arguments | None:
        """A set-up of `CLEAN`; None for one of SmolLM2 without its folder."""
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        set_ups: dict[str, Callable[[], Arguments]] = {
            "stories, texts": lambda: self.of_texts(
                model=self.random, args=self.args(learning_rate=5e-3, kd_weight=1.0)
            ),
            "stories, packed prompts and completions": self.of_pairs,
            "stories, conversations, LoRA": lambda: self.of_chats(
                peft_config=lora, args=self.args(assistant_only_loss=True, teacher_quantization="4bit")
            ),
            "SmolLM2, conversations": partial(self.of_smollm2, chats=True),
            "SmolLM2, texts, LoRA": partial(self.of_smollm2, chats=False),
        }
        return None if name.startswith("SmolLM2") and self.smollm2 is None else set_ups[name]()

    # ------------------------------------------------------------------------------------------------ planted faults

    def planted(self, name: str) -> Arguments:
        """A set-up with a fault of `TUNING` or `HELD_OUT`."""
        return {
            "doubled BOS": self.doubled_bos,
            "leaked rows": partial(self.leaked, str),
            "renamed vocabulary": lambda: self.of_texts(teacher_model=self.teacher("renamed", _renamed)),
            "shifted labels": lambda: self.of_tokens(lambda ids: {"input_ids": ids, "labels": [*ids[1:], -100]}),
            "broken 4-bit teacher": lambda: self.of_texts(
                teacher_model=self.teacher("uneven", _uneven), args=self.args(teacher_quantization="4bit")
            ),
            "mislabelled padding": lambda: self.of_tokens(self._padded),
            "lost system prompt": lambda: self.of_chats(
                "You tell stories.", *(TEMPLATE.replace("messages %}", "messages if m['role'] != 'system' %}", 1),) * 2
            ),
            "copied rows": lambda: self.of_texts(train_dataset=Dataset.from_dict({"text": self._copied()})),
            "mixing student": lambda: self.of_texts(model=_mixing(self.trained), processing_class=self.tokenizer),
            "high learning rate": lambda: self.of_texts(args=self.args(learning_rate=1e3 * RATE)),
            "other template": lambda: self.of_chats(
                theirs=TEMPLATE.replace("{{ m['content'] }}", "{{ m['role'] }}: {{ m['content'] }}")
            ),
            "masked end": self.masked_end,
            "endless teacher": lambda: self.of_texts(teacher_model=self.teacher("endless", _endless)),
            "swapped models": lambda: self.of_texts(model=TEACHER, teacher_model=self.trained),
            "wrong rotation": lambda: self.of_texts(teacher_model=self.teacher("rotated", _rotated)),
            "cut rows": lambda: self.of_texts(args=self.args(max_length=self._median() // 4)),
            "leaked rows, retyped": partial(self.leaked, lambda text: text.upper().replace(" ", "  ")),
            "low learning rate": lambda: self.of_texts(args=self.args(learning_rate=1e-4 * RATE)),
            "misspelt LoRA target": lambda: self.of_texts(
                peft_config=LoraConfig(r=8, target_modules=["qproj", "v_proj"], task_type="CAUSAL_LM")
            ),
            "half a store": self.half_a_store,
        }[name]()

    def doubled_bos(self) -> Arguments:
        def change(tokenizer: Any) -> None:
            bos = tokenizer.bos_token
            tokenizer._tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
            )

        tokenizer = self.with_tokenizer(change)
        student = self.saved("student with BOS", AutoModelForCausalLM.from_pretrained(self.trained), tokenizer)
        teacher = self.teacher("teacher with BOS", lambda model: None, tokenizer)
        rows = [Dataset.from_dict({"text": [tokenizer.bos_token + text for text in texts]}) for texts in self.texts]
        return self.of_texts(model=student, teacher_model=teacher, train_dataset=rows[0], eval_dataset=rows[1])

    def leaked(self, retyped: Callable[[str], str]) -> Arguments:
        leaked = [retyped(text) for text in self.texts[0][: NUM_HELD_OUT // 5]]
        rows = [*leaked, *self.texts[1][len(leaked) :]]
        return self.of_texts(eval_dataset=Dataset.from_dict({"text": rows}))

    def masked_end(self) -> Arguments:
        def row(ids: list[int]) -> Mapping[str, list[int]]:
            return {"input_ids": ids, "labels": [-100 if i == self.tokenizer.eos_token_id else i for i in ids]}

        tokenizer = self.with_tokenizer(lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token))
        student = self.saved("padding with EOS", AutoModelForCausalLM.from_pretrained(self.trained), tokenizer)
        return self.of_tokens(row, model=student)

    def half_a_store(self) -> Arguments:
        arguments = self.of_texts(eval_dataset=None)
        half = arguments["train_dataset"].select(range(NUM_TRAIN // 2))
        KDTrainer(**{**arguments, "train_dataset": half}).write_cache(self.folder / "store")
        return {**arguments, "teacher_model": f"cache:{self.folder / 'store'}"}

    def _padded(self, ids: list[int]) -> Mapping[str, list[int]]:
        padded = ids + [self.tokenizer.pad_token_id] * (256 - len(ids))
        return {"input_ids": padded, "labels": padded}

    def _copied(self) -> list[str]:
        texts = self.texts[0]
        return texts[: NUM_TRAIN // 5] + texts[:10] * (NUM_TRAIN * 4 // 5 // 10)

    def _median(self) -> int:
        lengths = sorted(map(len, self.tokenizer(self.texts[0])["input_ids"]))
        return lengths[len(lengths) // 2]


def _halves(text: str) -> tuple[str, str]:
    """A story's first two sentences, and the rest."""
    place = text.index(". ", text.index(". ") + 1) + 1
    return text[:place], text[place:]


def _chat(text: str, system: str) -> dict[str, Any]:
    first, rest = _halves(text)
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": rest.strip()}]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def _renamed(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    order = torch.randperm(len(weight) - 2, generator=torch.Generator().manual_seed(0)) + 2
    weight[2:] = weight[order]


def _uneven(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        sizes = 10 ** (6 * torch.rand(layer.mlp.up_proj.out_features, generator=generator) - 3)
        layer.mlp.up_proj.weight.mul_(sizes.unsqueeze(1))
        layer.mlp.down_proj.weight.div_(sizes)


def _endless(model: Any) -> None:
    weight = model.get_input_embeddings().weight  # the head, too
    weight[model.config.eos_token_id].normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def _rotated(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500_000.0}


def _mixing(name: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name)
    model.model.norm.register_forward_hook(_normed_over_the_batch)
    return model


def _normed_over_the_batch(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return (output - output.mean((0, 1))) / output.std((0, 1)) * output.detach().std()


# ---------------------------------------------------------------------------------------------------------- the tables


def examine(name: str, arguments: Arguments, num_rows: int) -> dict[str, Any]:
    """A row of a table: what was found in a set-up, and what was a false alarm."""
    found = diagnose(KDTrainer, num_rows=num_rows, **arguments)
    alarms = {each.check: each for each in found.findings if each.status in (WARNING, FAILURE)}
    wanted = [check for check in FOUND_BY.get(name, []) if check in alarms]
    others = [f"{check}: {alarms[check].line}" for check in alarms if check not in wanted]
    row = {"": name}
    if name in FOUND_BY:
        row["found"] = f"{alarms[wanted[0]].status}: {alarms[wanted[0]].line}" if wanted else "**no**"
    left_out = [f"{each.check}: {each.line}" for each in found.findings if "it stopped" in each.line]
    slow = {each.check: round(each.seconds) for each in found.findings if each.seconds >= 5}
    print(f"{name}: seconds of slow checks {slow}", file=sys.stderr)
    return {**row, "other alarms": "; ".join(others) or "none", "s": f"{found.seconds:.0f}", "stopped": left_out}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["tuning", "held-out", "clean"])
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="names of set-ups")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lists = {"tuning": TUNING, "held-out": HELD_OUT, "clean": CLEAN}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), options.smollm2)
        for name in [name for part in options.parts for name in lists[part]]:
            if options.only and name not in options.only:
                continue
            arguments = workshop.clean(name) if name in CLEAN else workshop.planted(name)
            if arguments is not None:
                row = examine(name, arguments, options.rows)
                print(json.dumps(row), flush=True)
                table.append(row)
    print(markdown([{key: value for key, value in row.items() if key != "stopped"} for row in table]))
    return table


if __name__ == "__main__":
    main()
