"""Every causal family of transformers as student and as teacher, against dense loops over single rows.

Each column of the table is a function of a [`Pair`]: it raises [`Refused`] where the family is refused in words at
construction, an `AssertionError` where a number is wrong, and returns where all is right. `python -m
tests.test_families` writes the table as Markdown.

Shapes: T tokens of a row, N label-bearing positions of all rows, V vocabulary.
"""

import copy
import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from hf_distill import KDConfig, KDTrainer, KVProjectionConfig, KVProjectionTrainer
from hf_distill.speculative import RolloutConfig, rollout
from tests.families import CLASSES, EOS, FAMILIES, NOT_BUILT, PAD, VOCAB, tiny_model

TEMPERATURE, KD_WEIGHT = 2.0, 0.5
PROPERTY = "outcomes of a family"  # of a test's report, from which tests/conftest.py makes the table
PEFT_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# In every run: grouped-query attention, learned positions and Conv1D, ALiBi, sliding windows, experts that are saved
# under other names, a recurrent state.
FEW = ("qwen2", "gpt2", "bloom", "gemma3_text", "mixtral", "mamba")

# Two rows of two tokens, some past a sliding window or a chunk of 8.
LENGTHS = (2, 5, 9, 2, 13, 20, 7, 11)


def make_rows(lengths=LENGTHS, seed=0) -> Dataset:
    """Tokenised rows; the first tokens of each are prompt, without a label, and some have holes."""
    generator = torch.manual_seed(seed)
    ids = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    labels = [[-100] * (i % 3) + row[i % 3 :] if len(row) > 3 else list(row) for i, row in enumerate(ids)]
    for row in labels:
        if len(row) > 8:
            row[6] = -100
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


ROWS = make_rows()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of as many words as the models have token ids."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


TOKENIZER = make_tokenizer()


class Refused(Exception):
    """A family that the library refuses at construction, with a message."""


class NotThere(Exception):
    """A family that has nothing of what a column is about."""


@contextmanager
def constructing() -> Iterator[None]:
    """A `ValueError` of our own, or of TRL, in here is a refusal; one of transformers or torch is an accident."""
    try:
        yield
    except ValueError as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any(f"{os.sep}{package}{os.sep}" in files[-1] for package in ("hf_distill", "trl", "peft")):
            raise
        raise Refused(str(error)) from error


class Pair:
    """A student and a teacher; copies of them, since training changes them."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        self._student, self.teacher = student, teacher

    def student(self) -> PreTrainedModel:
        return copy.deepcopy(self._student)

    @cached_property
    def under_llama(self) -> "Pair":
        """The student with a llama for a teacher."""
        return Pair(self._student, LLAMA.teacher)

    @cached_property
    def over_llama(self) -> "Pair":
        """The teacher with a llama for a student."""
        return Pair(LLAMA._student, self.teacher)

    @cached_property
    def update(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the dense loop."""
        return dense_update(self.student(), self.teacher)

    @cached_property
    def adapted(self) -> nn.Module:
        """The student with an adapter on every linear layer; B is not zero, as it would be untrained."""
        torch.manual_seed(7)
        student = self.student()
        if student.config.model_type == "reformer":  # reversible layers give no gradient where their input wants none
            student.enable_input_require_grads()
        # PEFT refuses these of models that it knows as Mamba's.
        excluded = r".*\.out_proj" if student.config.model_type in PEFT_MAMBAS else None
        config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded, init_lora_weights=False)
        return get_peft_model(student, config)


def settings(folder, **changes) -> dict:
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1,
        "logging_steps": 1, "save_strategy": "no", "temperature": TEMPERATURE, "kd_weight": KD_WEIGHT,
        "dataloader_pin_memory": False, "dataset_kwargs": {"skip_prepare_dataset": True}, **changes,
    }  # fmt: skip


class Watch(TrainerCallback):
    """Gradients before, and weights after every update."""

    def __init__(self):
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {n: t.clone() for n, t in model.state_dict().items()}


def make_trainer(student, teacher, folder, trainer=KDTrainer, config=KDConfig, **changes):
    with constructing():
        made = trainer(
            student, teacher, config(**settings(folder, **changes)), train_dataset=ROWS,
            eval_dataset=ROWS if "eval_strategy" in changes else None, processing_class=TOKENIZER,
            teacher_processing_class=TOKENIZER, callbacks=[Watch()],
        )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def watched(trainer) -> Watch:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Watch))


# ------------------------------------------------------------------------------------------------- the dense loop


def each_row(student, teacher, rows=ROWS, **options):
    """Logits (N, V) of both, next tokens (N,), and hidden states (N, D) if asked: row by row, without padding."""
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        mask = labels[0, 1:] != -100
        mine = student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        with torch.no_grad():
            theirs = teacher(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        if mask.any():
            yield mine, theirs, mask, labels[0, 1:][mask]


def dense_loss(student, teacher, *, hidden_weight=0.0) -> Tensor:
    num_items = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    total: Tensor = torch.zeros((), dtype=torch.float64)
    student.train()
    teacher.eval()
    options = {"output_hidden_states": True} if hidden_weight else {}
    for mine, theirs, mask, labels in each_row(student, teacher, **options):
        student_logits, teacher_logits = (side.logits[0, :-1][mask].double() for side in (mine, theirs))
        target, own = ((logits / TEMPERATURE).log_softmax(-1) for logits in (teacher_logits, student_logits))
        divergence = (target.exp() * (target - own)).sum()
        total = total + KD_WEIGHT * TEMPERATURE**2 * divergence
        total = total + (1 - KD_WEIGHT) * nn.functional.cross_entropy(student_logits, labels, reduction="sum")
        if hidden_weight:
            inner = zip(mine.hidden_states[1:], theirs.hidden_states[1:], strict=True)
            distances = [(s[0, :-1][mask] - t[0, :-1][mask]).square().mean(-1).sum() for s, t in inner]
            total = total + hidden_weight * torch.stack(distances).mean()
    return total / num_items


def dense_update(student, teacher, **options) -> tuple[float, dict[str, Tensor]]:
    student.zero_grad()
    loss = dense_loss(student, teacher, **options)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def assert_same_update(trainer, loss: float, expected: dict[str, Tensor], rtol: float = 5e-4) -> None:
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(loss, rel=1e-4), f"loss {logged:.5f} instead of {loss:.5f}"
    found, zero = watched(trainer).gradients[0], torch.zeros(())
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert norm > 0
    off = {name: (found.get(name, zero) - expected.get(name, zero)).norm() / norm for name in expected.keys() | found}
    worst = max(off, key=lambda name: off[name])
    assert off[worst] <= rtol, f"gradient of {worst} off by {off[worst]:.1e} of the whole"


# ------------------------------------------------------------------------------------------------------- the columns


def construct(pair: Pair, folder: Path) -> None:
    make_trainer(pair.student(), pair.teacher, folder)


def update(pair: Pair, folder: Path) -> None:
    trainer = make_trainer(pair.student(), pair.teacher, folder, eval_strategy="steps")
    trainer.train()
    assert_same_update(trainer, *pair.update)
    after = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    with torch.no_grad():
        expected_after = dense_loss(trainer.model, pair.teacher).item()
    assert after == pytest.approx(expected_after, rel=1e-4), f"eval_loss {after:.5f} instead of {expected_after:.5f}"


def packing(pair: Pair, folder: Path) -> None:
    options = {"packing": True, "max_length": 32, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = make_trainer(pair.student(), pair.teacher, folder, dataset_kwargs=None, **options)
    assert len(trainer.train_dataset) < len(ROWS)
    trainer.train()
    assert_same_update(trainer, *pair.update)


def padding_free(pair: Pair, folder: Path) -> None:
    trainer = make_trainer(pair.student(), pair.teacher, folder, padding_free=True, max_length=None)
    trainer.train()
    assert_same_update(trainer, *pair.update)


def padded_batch(rows=ROWS) -> dict[str, Tensor]:
    """All rows right-padded, made without any collator."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.long) for row in ids]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(ids, padding_value=PAD), "attention_mask": pad(masks, padding_value=0)}


def load_balancing(pair: Pair, folder: Path) -> None:
    """The auxiliary loss of a mixture of experts is the one that the model itself returns for the batch."""
    if not hasattr(pair.teacher.config.get_text_config(), "router_aux_loss_coef"):
        raise NotThere
    options = {"router_aux_loss_coef": 0.5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = make_trainer(pair.student(), pair.teacher, folder, **options)
    trainer.train()
    student = pair.student()
    loss, expected = dense_update(student, pair.teacher)
    if trainer.aux_loss_enabled:
        aux_loss = student(**padded_batch(), output_router_logits=True).aux_loss
        (0.5 * aux_loss).backward()
        loss += 0.5 * aux_loss.item()
        expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_same_update(trainer, loss, expected)


def run_resumed(make: Callable[..., KDTrainer], folder: Path):
    """Two updates, saved after the first, and the second again from there; the first run and its weights."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = make(folder, **options)
    whole.train()
    expected = watched(whole).weights
    # Whichever is the better one: its weights have to be those after its update.
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    resumed = make(folder, **options, **best, metric_for_best_model="eval_loss", greater_is_better=True)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert_equal(watched(resumed).weights[2], expected[2], "resumed")
    resumed.state.best_model_checkpoint = str(folder / "checkpoint-1")
    resumed._load_best_model()
    assert_equal(resumed.model.state_dict(), expected[1], "best model")
    return whole


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs().max().item() if tensor.numel() else 0.0
        assert torch.equal(found[name], tensor), f"{what}: {name} off by {difference:.1e}"


def resume(pair: Pair, folder: Path) -> None:
    whole = run_resumed(lambda *a, **kw: make_trainer(pair.student(), pair.teacher, *a, **kw), folder)
    loaded = type(pair.teacher).from_pretrained(folder / "checkpoint-2").eval()
    model = whole.model.eval()
    ids = torch.tensor([ROWS[5]["input_ids"]])
    with torch.no_grad():
        found, expected = (side(input_ids=ids, use_cache=False).logits for side in (loaded, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def hidden(pair: Pair, folder: Path) -> None:
    trainer = make_trainer(pair.student(), pair.teacher, folder, hidden_weight=0.7)
    trainer.train()
    assert_same_update(trainer, *dense_update(pair.student(), pair.teacher, hidden_weight=0.7))


def kv(pair: Pair, folder: Path) -> None:
    trainer = make_trainer(pair.student(), pair.teacher, folder, KVProjectionTrainer, KVProjectionConfig)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["kv/cosine"] == pytest.approx(log["kv/cosine"])
    assert torch.isfinite(torch.tensor([log["loss"], log["kv/cosine"]])).all()


def written(pair: Pair, folder: Path) -> None:
    """The student's own greedy text, drafted and checked in caches, is that of a loop without any."""
    student = pair.student().eval()
    prompts = [[5, 9, 33], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    ids = torch.tensor([[PAD] * (10 - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (10 - len(row)) + [1] * len(row) for row in prompts])
    config = RolloutConfig(12, draft_length=3, top_k=1, student_temperature=0.0, teacher_temperature=0.0)
    with constructing():
        found = rollout(student, student, ids, mask, ids, mask, config, eos_token_id=EOS, pad_token_id=PAD)
    for prompt, text, is_text in zip(prompts, found.completion_ids, found.completion_mask, strict=True):
        for place, token in enumerate(text[is_text].tolist()):
            with torch.no_grad():
                read = torch.tensor([prompt + text[:place].tolist()])
                logits = student(input_ids=read, use_cache=False).logits[0, -1]
            gap = (logits.max() - logits[token]).item()
            assert gap <= 1e-4 * logits.abs().max(), f"token {place} is not the likeliest, by {gap:.1e}"


def lora(pair: Pair, folder: Path) -> None:
    def make(*args, **options):
        return make_trainer(copy.deepcopy(pair.adapted), pair.teacher, *args, **options)

    trainer = make(folder / "update")
    trainer.train()
    assert_same_update(trainer, *dense_update(copy.deepcopy(pair.adapted), pair.teacher))
    run_resumed(make, folder / "resume")


def pair_of(family: str) -> Pair:
    return Pair(tiny_model(family, seed=1), tiny_model(family, seed=2))


LLAMA = pair_of("llama")
COLUMNS: dict[str, Callable[[Pair, Path], None]] = {
    "construct": construct,
    "update": lambda pair, folder: update(pair.under_llama, folder),
    "update, as teacher": lambda pair, folder: update(pair.over_llama, folder),
    "packing": lambda pair, folder: packing(pair.under_llama, folder),
    "packing, as teacher": lambda pair, folder: packing(pair.over_llama, folder),
    "padding-free": padding_free,
    "load balancing": load_balancing,
    "resume": resume,
    "hidden states": hidden,
    "keys and values": kv,
    "rollout": written,
    "LoRA": lora,
}


def outcome(column: str, pair: Pair, folder: Path) -> str:
    """ "right", "none", "refused: " and the message, or "wrong: " and what is."""
    try:
        COLUMNS[column](pair, folder)
    except NotThere:
        return "none"
    except Refused as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - whatever comes out of a column is a finding
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, AssertionError) else f" ({Path(frame.filename).name}:{frame.lineno})"
        return f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"
    return "right"


def outcomes_of(family: str, folder: Path) -> dict[str, str]:
    """The outcome of each column for a family."""
    pair = pair_of(family)
    return {column: outcome(column, pair, folder / column) for column in COLUMNS}


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    # accelerate collects garbage in every call of train(); with all of torch to look through that is half of its time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def assert_right_or_refused(family: str, found: dict[str, str]) -> None:
    wrong = [f"{family}, {column}: {result}" for column, result in found.items() if result.startswith("wrong")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", FEW)
def test_few_families_are_right_or_refused_in_words(tmp_path, family):
    assert_right_or_refused(family, outcomes_of(family, tmp_path))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="Doge reads ahead in older versions of transformers"
)
def test_coefficient_of_a_model_without_a_load_balancing_loss_is_passed_over_with_a_warning(tmp_path, caplog):
    student, teacher = tiny_model("doge", 1), tiny_model("doge", 2)  # it has no experts
    student.config.router_aux_loss_coef = 0.1
    trainer = make_trainer(student, teacher, tmp_path)
    assert "trained without a load-balancing loss" in caplog.text
    trainer.train()
    assert_same_update(trainer, *dense_update(tiny_model("doge", 1), teacher))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_right_or_refused_in_words(tmp_path, record_property, family):
    found = outcomes_of(family, tmp_path)
    record_property(PROPERTY, (family, found))
    assert_right_or_refused(family, found)


@pytest.mark.slow
def test_each_family_that_is_not_built_needs_more_than_a_configuration():
    for family in NOT_BUILT.keys() & CLASSES.keys():
        with pytest.raises((ImportError, ValueError)):
            tiny_model(family)


# --------------------------------------------------------------------------------------------------------- the table


def counts(outcomes: dict[str, dict[str, str]]) -> str:
    """Per column, how many families are right, refused and wrong, as Markdown."""
    lines = ["| check | right | refused in words | wrong | has none |", "|---|---|---|---|---|"]
    for column in COLUMNS:
        kinds = [found[column].split(":")[0] for found in outcomes.values()]
        numbers = [str(kinds.count(kind)) for kind in ("right", "refused", "wrong", "none")]
        lines.append(f"| {column} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def per_family(outcomes: dict[str, dict[str, str]]) -> str:
    """Every family and column, as Markdown."""
    signs = {"right": "yes", "refused": "no", "wrong": "wrong", "none": "-"}
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in sorted(outcomes):
        cells = [signs[outcomes[family][column].split(":")[0]] for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Writes both tables to standard output, what is wrong or refused to standard error; takes names of families."""
    disable_progress_bars()
    gc.freeze()
    outcomes = {}
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes[family] = outcomes_of(family, Path(folder))
        for column, result in outcomes[family].items():
            if result not in ("right", "none"):
                print(f"{family}, {column}: {result}", file=sys.stderr, flush=True)
    print(f"{counts(outcomes)}\n\n{per_family(outcomes)}")


if __name__ == "__main__":
    main()
