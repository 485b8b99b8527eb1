"""The device, sizes, ceilings and models that the rows of benchmarks/gpu_rows.py measure with."""

import gc
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, Qwen2Config
from trl import SFTConfig, SFTTrainer

from benchmarks.ceilings import Work, backbone_work, compiled_graphs, count_events, measure_ceilings, reading_work
from benchmarks.kv_capture import word_tokenizer
from benchmarks.measure import Measurement, measure
from benchmarks.timed_rows import Budget, NotMeasured
from hf_distill import KDConfig, KDTrainer
from hf_distill.modeling import last_hidden_states
from hf_distill.speculative import RolloutStats, sample
from hf_distill.trainers.hard_label_config import checkpointing

Cells = dict[str, Any]

BFLOAT16 = 2  # bytes
TOP_K = 25
DRAFT = 5
SEARCHED = 256  # positions for the estimate of the acceptance


class Sizes(NamedTuple):
    loss: tuple[int, int, int, int]  # N, V, Ds, Dt
    student: Mapping[str, int]
    teacher: Mapping[str, int]
    vocab: int
    batch: tuple[int, int]  # B, T of a training step
    packed: int  # tokens of a packed row
    prompt: int
    new_tokens: int
    rollout_rows: tuple[int, ...]
    product: int  # width of the product that measures the ceiling
    copied: int  # bytes
    repeats: int
    warmup: int


def shape(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


# Widths and depths of Qwen2.5-0.5B and 7B, both with the vocabulary of the first.
FULL = Sizes(
    loss=(8192, 128_256, 2048, 4096), student=shape(896, 4864, 24, 14, 2), teacher=shape(3584, 18_944, 28, 28, 4),
    vocab=151_936, batch=(4, 1024), packed=8192, prompt=64, new_tokens=128, rollout_rows=(8, 32), product=8192,
    copied=2**31, repeats=20, warmup=3,
)  # fmt: skip
TINY = Sizes(
    loss=(48, 512, 16, 32), student=shape(32, 48, 2, 4, 2), teacher=shape(64, 96, 3, 4, 2), vocab=512, batch=(2, 24),
    packed=64, prompt=8, new_tokens=12, rollout_rows=(2, 3), product=128, copied=2**16, repeats=2, warmup=1,
)  # fmt: skip


class Bench:
    """The device, sizes, ceilings and models of a group of rows. Models are created on first use."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny, self.sizes = device, tiny, TINY if tiny else FULL
        self.is_cuda = device.startswith("cuda")
        self.folder = tempfile.TemporaryDirectory()  # nothing is saved, but trainers need a folder

    @cached_property
    def ceilings(self):
        sizes = self.sizes
        repeats = 2 if self.tiny else 10
        return measure_ceilings(self.device, torch.bfloat16, size=sizes.product, copied=sizes.copied, repeats=repeats)

    @cached_property
    def tokenizer(self):
        return word_tokenizer(self.sizes.vocab)

    def config(self, side: str, **changes: Any) -> Qwen2Config:
        tied = side == "student"
        settings = {"vocab_size": self.sizes.vocab, "max_position_embeddings": 32_768, "tie_word_embeddings": tied}
        return Qwen2Config(**{**settings, **getattr(self.sizes, side), **changes})

    def model(self, config: Qwen2Config, attention: str = "sdpa") -> PreTrainedModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        return self.model(self.config("teacher"))

    def student(self) -> PreTrainedModel:
        """A new student on each call, because trainers change its forward."""
        return self.model(self.config("student"))

    # ------------------------------------------------------------------------------------------------- measurements

    def steady(
        self,
        budget: Budget,
        step: Callable[[], Any],
        work: Work,
        *,
        reset: Callable[[], Any] = lambda: None,
        first: Callable[[], Any] | None = None,
        repeats: int | None = None,
        counted: Callable[[], Any] | None = None,
    ) -> Cells:
        """Time and memory of a step in the steady state, its floor, and its counts.

        Args:
            work (`Work`): the work that the step has to do at least.
            reset (`Callable`): called before each step, outside the measurement.
            first (`Callable`, *optional*): the warm-up, called once; by default a few steps.
            counted (`Callable`, *optional*): the function under the profiler, by default one step. It returns the
                divisor of its counts if it is not 1.
        """
        once = partial(measure, reset=reset, device=self.device, warmup=0)
        graphs = [compiled_graphs()]
        warm = once(lambda _: (first or step)(), [None] * (1 if first else self.sizes.warmup))
        graphs.append(compiled_graphs())
        if budget.left < 0:
            raise NotMeasured(f"the warm-up alone took {sum(warm.times):.0f} s of {budget.seconds:.0f} s")
        reset()
        units = [1.0]
        counts = count_events(lambda: units.append((counted or step)() or 1.0))
        found = [once(lambda _: step(), [None]) for _ in budget.repeats(repeats or self.sizes.repeats)]
        graphs.append(compiled_graphs())
        result = Measurement([time for each in found for time in each.times], max(each.memory for each in found))
        floor = self.ceilings.floor(work)
        return {
            "seconds": result.time, "all seconds": result.times, "warm-up": sum(warm.times), "memory": result.memory,
            "flops": work.flops, "bytes": work.bytes, "floor": floor, "share": floor / result.time,
            "graphs": graphs[1] - graphs[0], "recompilations": graphs[2] - graphs[1],
            **{name: count / units[-1] for name, count in counts.items()},
        }  # fmt: skip

    def clean_up(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    # ----------------------------------------------------------------------------------------------------- trainers

    def settings(self, **changes: Any) -> Cells:
        return {
            "output_dir": self.folder.name, "per_device_train_batch_size": self.sizes.batch[0], "max_length": None,
            "bf16": True, "use_cpu": not self.is_cuda, "report_to": "none", "disable_tqdm": True,
            "logging_steps": 1000, "save_strategy": "no", "seed": 0, **checkpointing(False), **changes,
        }  # fmt: skip

    @cached_property
    def ids(self) -> list[list[int]]:
        """Two batches of token ids; all of them are labels."""
        rows, length = self.sizes.batch
        return torch.randint(2, self.sizes.vocab, (2 * rows, length), generator=torch.manual_seed(0)).tolist()

    @cached_property
    def rows(self) -> Dataset:
        return Dataset.from_dict({"input_ids": self.ids, "labels": self.ids})

    def kd_trainer(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        rows: Dataset | None = None,
        peft: Any = None,
        **changes,
    ) -> KDTrainer:
        return KDTrainer(
            student, teacher, KDConfig(**self.settings(divergence="jensen_shannon", **changes)),
            train_dataset=rows or self.rows, processing_class=self.tokenizer, teacher_processing_class=self.tokenizer,
            peft_config=peft,
        )  # fmt: skip

    def sft_trainer(self, student: PreTrainedModel, rows: Dataset | None = None, **changes: Any) -> SFTTrainer:
        tools = {"train_dataset": rows or self.rows, "processing_class": self.tokenizer}
        return SFTTrainer(student, SFTConfig(**self.settings(**changes)), **tools)

    def training_step(self, budget: Budget, trainer: Any, work: Callable[[Mapping[str, Tensor]], Work]) -> Cells:
        """`trainer.training_step` on a ready batch: forward, loss and backward, without the optimizer's step."""
        model, batch, num_items = first_batch(trainer)
        step = partial(train_on, trainer, model, batch, num_items)
        tokens = batch["input_ids"].numel()
        cells = self.steady(budget, step, work(batch), reset=partial(model.zero_grad, set_to_none=True))
        return {**cells, "tokens/s": tokens / cells["seconds"]}

    def step_work(self, *sides: tuple[str, str, float | None], lengths: Sequence[int] | None = None) -> Work:
        """The work of a training step; for each side, its trained part and the bytes of quantised weights."""
        rows, length = self.sizes.batch
        lengths = lengths or [length] * rows
        work, labels = Work(), sum(length - 1 for length in lengths)
        for side, trained, weight_bytes in sides:
            config = self.config(side)
            work += backbone_work(config, lengths, item=BFLOAT16, trained=trained, weight_bytes=weight_bytes)
            products = {"nothing": 1, "adapters": 2, "weights": 3}[trained]
            head, hidden = config.vocab_size * config.hidden_size, labels * config.hidden_size
            moved = head * (2 if trained == "weights" else 1) + hidden * (1 if trained == "nothing" else 2)
            work += Work(2 * products * labels * head, BFLOAT16 * moved)
        return work


def train_on(trainer: Any, model: nn.Module, batch: Mapping[str, Tensor], num_items: Any) -> None:
    trainer.training_step(model, dict(batch), num_items)


def first_batch(trainer: Any) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """The model as `train()` prepares it, the first batch on its device, and the number of its labels."""
    trainer.remove_callback(PrinterCallback)
    trainer.model_wrapped = model = trainer.accelerator.prepare_model(trainer.model)
    batches = iter(trainer.get_train_dataloader())
    (batch,), num_items = trainer.get_batch_samples(batches, 1, trainer.args.device)
    return model, trainer._prepare_inputs(batch), num_items


class Pair:
    """A student and a wider teacher whose distributions differ only by what the teacher's layers add.

    Student and teacher share one table of embeddings and one head, rotated isometrically into the teacher's width. If
    the embeddings are large compared with the output of the layers, both models are the same function of the last
    token. With smaller embeddings, the teacher's random layers disturb it more. So any acceptance rate is possible
    without training, and the forwards cost as much as real ones.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.student = bench.model(bench.config("student", tie_word_embeddings=False)).eval()
        self.teacher = bench.model(bench.config("teacher")).eval()
        vocab, narrow = bench.sizes.vocab, self.student.config.hidden_size
        wide = self.teacher.config.hidden_size
        options = {"device": bench.device, "generator": torch.Generator(bench.device).manual_seed(0)}
        turn = torch.linalg.qr(torch.randn(wide, narrow, **options))[0].t()  # (Ds, Dt), orthonormal rows
        # With logits of this deviation, fewer than TOP_K tokens have nearly all of the probability.
        deviation = 2.5 * math.sqrt(2 * math.log(vocab))
        tables = [torch.randn(vocab, narrow, **options) for _ in range(2)]
        with torch.no_grad():
            self.student.get_input_embeddings().weight.copy_(tables[0] * 1000)
            self.student.get_output_embeddings().weight.copy_(tables[1] * deviation / narrow**0.5)
            self.teacher_embeddings = (tables[0] @ turn).to(torch.bfloat16)
            # After the norm, the teacher's hidden states are longer by the square root of the ratio of widths.
            head = tables[1] @ turn * deviation / narrow**0.5 * (narrow / wide) ** 0.5
            self.teacher.get_output_embeddings().weight.copy_(head)
        for model in (self.student, self.teacher):
            model.generation_config.eos_token_id = None

    @torch.no_grad()
    def acceptance(self, ids: Tensor, scale: float) -> float:
        """The probability that a token of the student is among the teacher's `TOP_K`."""
        self.teacher.get_input_embeddings().weight.copy_(self.teacher_embeddings * scale)
        hidden = [last_hidden_states(model, input_ids=ids) for model in (self.student, self.teacher)]
        student, teacher = (
            model.get_output_embeddings()(states.flatten(0, 1)[:SEARCHED]).float()  # (n, V)
            for model, states in zip((self.student, self.teacher), hidden, strict=True)
        )
        uniform = torch.rand(len(student), generator=torch.manual_seed(0)).to(ids.device)
        tokens = sample(student, uniform, 1.0, 1.0)
        return ((teacher > teacher.gather(1, tokens[:, None])).sum(1) < TOP_K).float().mean().item()

    @cache  # noqa: B019 - one pair lives as long as its process
    def scale(self, acceptance: float) -> float:
        """The factor of the teacher's embeddings that gives that acceptance, by bisection of its logarithm."""
        ids = self.prompts(8)["student_prompt_ids"].to(self.bench.device)
        low, high = -8.0, 12.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self.acceptance(ids, 2**middle) < acceptance else (low, middle)
        return 2 ** ((low + high) / 2)

    def prompts(self, rows: int) -> dict[str, Tensor]:
        """Left-padded prompts of different lengths."""
        generator, longest = torch.Generator().manual_seed(1), self.bench.sizes.prompt
        ids = torch.randint(2, self.bench.sizes.vocab, (rows, longest), generator=generator)
        mask = torch.arange(longest) >= torch.arange(rows)[:, None] % (longest // 2)
        names = [f"{side}_prompt_{part}" for side in ("student", "teacher") for part in ("ids", "mask")]
        return dict(zip(names, (ids, mask) * 2, strict=True))

    def work(self, stats: RolloutStats, rows: int) -> Work:
        """The work of the forwards that were run; each reads the weights and the cache."""
        context = self.bench.sizes.prompt + self.bench.sizes.new_tokens / 2
        read = partial(reading_work, rows=rows, context=context, item=BFLOAT16)
        student = read(self.student.config, new=1).times(stats.student_forwards)
        return student + read(self.teacher.config, new=DRAFT).times(stats.teacher_forwards)
