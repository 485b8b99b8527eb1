"""The rows of benchmarks/gpu.py: one function per group. This is the process of a group; gpu.py starts it.

Models are created on the device, with random weights in bfloat16. Nothing is read from a file or a network. `tiny` runs
the same rows with small shapes: a rehearsal on a CPU, whose numbers have no meaning.

Shapes: B rows, T tokens of a row, N label-bearing positions, Ds and Dt hidden widths, V vocabulary.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import psutil
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available

from benchmarks import fused_linear
from benchmarks.ceilings import (
    Work,
    loss_work,
    reading_work,
)
from benchmarks.gpu_bench import BFLOAT16, DRAFT, TOP_K, Bench, Cells, Pair, first_batch, train_on
from benchmarks.measure import machine, watched
from benchmarks.rollout import write_alone, write_together
from benchmarks.timed_rows import Budget, NotMeasured, Row, group_parser, serve
from hf_distill.losses.cross_tokenizer import Spans, cross_tokenizer_loss
from hf_distill.losses.fused_linear import Head
from hf_distill.modeling import last_hidden_states
from hf_distill.speculative import RolloutConfig, RolloutStats
from hf_distill.token_alignment import shared_tokens

PRODUCT_CHUNK = 1024  # positions whose logits exist at a time where only products are measured


def ceiling_row(bench: Bench) -> Row:
    def find(_: Budget) -> Cells:
        found = bench.ceilings
        note = f"{found.flops / 1e12:.3g} TFLOP/s, {found.bytes / 1e12:.3g} TB/s; {machine(bench.device)}"
        return {"note": f"{note}, transformers {transformers.__version__}", "ceilings": found._asdict()}

    return Row("ceilings: one product, one copy", 15, find)


# --------------------------------------------------------------------------------------------------------------- loss


def loss_row(bench: Bench, name: str, divergence: str, limit: float, **changes: Any) -> Row:
    rows, vocab, student_width, teacher_width = bench.sizes.loss
    options = argparse.Namespace(
        rows=rows, vocab=vocab, student_width=student_width, teacher_width=teacher_width, dtype="bfloat16",
        device=bench.device, freeze_head=False, temperature=1.0, liger_compiled=bench.is_cuda,
    )  # fmt: skip
    vars(options).update(changes)
    title = fused_linear.TITLES[name].format("compiled" if options.liger_compiled else "not compiled")
    about = "".join(f", {key.replace('_', ' ')} {value}" for key, value in changes.items())

    def run(budget: Budget) -> Cells:
        x = loss_inputs(tuple(sorted(vars(options).items())))

        def step() -> None:
            fused_linear.IMPLEMENTATIONS[name](x, divergence, options).backward()

        def reset() -> None:
            x.student_hidden.grad = x.student_head.grad = None

        work = loss_work(
            options.rows, vocab, student_width, teacher_width, item=BFLOAT16, frozen_head=options.freeze_head
        )
        return bench.steady(budget, step, work, reset=reset)

    return Row(f"{divergence}: {title}{about}", limit, run)


@cache
def loss_inputs(options: tuple[tuple[str, Any], ...]) -> fused_linear.Inputs:
    return fused_linear.make_inputs(argparse.Namespace(**dict(options)))


def losses(bench: Bench) -> list[Row]:
    limits = {"ours": 30, "trl": 12, "dense": 8, "liger": 25}  # the first and the last compile
    names = [(name, divergence) for name in limits for divergence in ("jensen_shannon", "forward_kl")]
    return [ceiling_row(bench), *(loss_row(bench, name, divergence, limits[name]) for name, divergence in names)]


# --------------------------------------------------------------------------------------------------------------- step

KD_SIDES = ("student", "weights", None), ("teacher", "nothing", None)


def kd_step(bench: Bench, budget: Budget) -> Cells:
    trainer = bench.kd_trainer(bench.student(), bench.teacher)
    return bench.training_step(budget, trainer, lambda _: bench.step_work(*KD_SIDES))


def sft_step(bench: Bench, budget: Budget) -> Cells:
    trainer = bench.sft_trainer(bench.student())
    return bench.training_step(budget, trainer, lambda _: bench.step_work(KD_SIDES[0]))


def limit_step(bench: Bench, budget: Budget) -> Cells:
    """A step of both backbones and the products of both heads alone: no loss, no trainer, no mask."""
    student, teacher = bench.student().train(), bench.teacher.eval()
    ids = torch.tensor(bench.ids[: bench.sizes.batch[0]], device=bench.device)
    head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight

    def step() -> None:
        with torch.no_grad():
            teacher_hidden = last_hidden_states(teacher, input_ids=ids)[:, :-1].flatten(0, 1)  # (N, Dt)
        hidden = last_hidden_states(student, input_ids=ids)[:, :-1].flatten(0, 1)  # (N, Ds)
        with torch.no_grad():
            gradient, head_gradient = torch.empty_like(hidden), torch.zeros_like(head)
            for start in range(0, len(hidden), PRODUCT_CHUNK):
                chunk = slice(start, start + PRODUCT_CHUNK)
                torch.mm(teacher_hidden[chunk], teacher_head.t())
                logits = torch.mm(hidden[chunk], head.t())  # (n, V), used in place of their gradient
                torch.mm(logits, head, out=gradient[chunk])
                head_gradient.addmm_(logits.t(), hidden[chunk])
        hidden.backward(gradient)

    reset = partial(student.zero_grad, set_to_none=True)
    cells = bench.steady(budget, step, bench.step_work(*KD_SIDES), reset=reset)
    return {**cells, "tokens/s": ids.numel() / cells["seconds"]}


def gkd_step(bench: Bench, budget: Budget) -> Cells:
    """A step of TRL's GKDTrainer on the text of the dataset, with the collator of the same batches."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or TRL warns that this trainer is experimental
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[Cells]) -> dict[str, Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    trainer = GKDTrainer(
        model=bench.student(), teacher_model=bench.teacher, data_collator=collate, train_dataset=bench.rows,
        args=GKDConfig(lmbda=0.0, beta=fused_linear.BETAS["jensen_shannon"], **bench.settings()),
        processing_class=bench.tokenizer,
    )  # fmt: skip
    return bench.training_step(budget, trainer, lambda _: bench.step_work(*KD_SIDES))


def steps(bench: Bench) -> list[Row]:
    return [
        ceiling_row(bench),
        Row("KDTrainer", 40, partial(kd_step, bench)),
        Row("limit: backbones and products alone", 15, partial(limit_step, bench)),
        Row("SFTTrainer, no teacher", 15, partial(sft_step, bench)),
        # The last, because it wraps the teacher's forward.
        Row("TRL GKDTrainer, divergence alone", 20, partial(gkd_step, bench)),
    ]


# ------------------------------------------------------------------------------------------------------------- memory


def memory_by_component(bench: Bench, budget: Budget) -> list[Cells]:
    """The memory of each part of a KDTrainer step: its peak above the memory before it, and the memory it keeps."""
    teacher, student = bench.teacher, bench.student()
    trainer = bench.kd_trainer(student, teacher)
    model, batch, num_items = first_batch(trainer)
    parts: dict[str, Cells] = {}

    def held() -> int:
        return torch.cuda.memory_allocated() if bench.is_cuda else psutil.Process().memory_info().rss

    @contextmanager
    def part(name: str) -> Iterator[None]:
        before = held()
        with watched(bench.device) as found:
            yield
        parts[name] = {"memory": found["memory"], "kept": held() - before, "seconds": found["time"]}

    def in_part(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with part(name):
                return function(*args, **kwargs)

        return call

    places = {
        "teacher's forward": (trainer, "teacher_signal"),
        "student's backbone": (trainer.student.base_model, "forward"),
        "loss": (trainer, "distillation_terms"),
        "backward": (trainer.accelerator, "backward"),
    }
    train_on(trainer, model, batch, num_items)
    model.zero_grad(set_to_none=True)
    bench.clean_up()
    with ExitStack() as stack:
        for title, (place, name) in places.items():
            stack.enter_context(patch.object(place, name, in_part(title, getattr(place, name))))
        train_on(trainer, model, batch, num_items)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    with watched(bench.device) as found:
        train_on(trainer, model, batch, num_items)
    sizes = {"student's weights": student, "teacher's weights": teacher}
    return [
        *({"row": name, "kept": sum(p.nbytes for p in model.parameters())} for name, model in sizes.items()),
        *({"row": name, **cells} for name, cells in parts.items()),
        {"row": "gradients", "kept": gradients},
        {"row": "the whole step", "memory": found["memory"], "seconds": found["time"]},
    ]


def memory(bench: Bench) -> list[Row]:
    return [Row("components", 25, partial(memory_by_component, bench))]


# ----------------------------------------------------------------------------------------------------------- rollouts

COUNTED = DRAFT + 1  # new tokens a row while the profiler counts


def rollout_row(bench: Bench, pair: Callable[[], Pair], rows: int, acceptance: float, limit: float) -> Row:
    def run(budget: Budget) -> Cells:
        models, new_tokens = pair(), bench.sizes.new_tokens
        models.acceptance(models.prompts(1)["student_prompt_ids"].to(bench.device), models.scale(acceptance))
        stats: list[RolloutStats] = []

        def write(tokens: int) -> float:
            config = RolloutConfig(tokens, DRAFT, top_k=TOP_K)
            stats.append(write_together(models.student, models.teacher, models.prompts(rows), config, 0))
            return stats[-1].teacher_forwards

        cells = bench.steady(
            budget, partial(write, new_tokens), Work(), first=partial(write, new_tokens // 4), repeats=3,
            counted=partial(write, COUNTED),
        )  # fmt: skip
        written, blocks = stats[-1], stats[-1].blocks
        tested = int(blocks.accepted.sum() + (blocks.accepted < blocks.drafted).sum())
        work = models.work(written, rows)
        floor = bench.ceilings.floor(work)
        return {
            **cells, "flops": work.flops, "bytes": work.bytes, "floor": floor, "share": floor / cells["seconds"],
            "tokens/s": rows * new_tokens / cells["seconds"], "blocks": written.teacher_forwards,
            "student forwards": written.student_forwards, "acceptance": int(blocks.accepted.sum()) / tested,
        }  # fmt: skip

    return Row(f"{rows} rows, acceptance {acceptance:g}", limit, run)


def generate_row(bench: Bench, pair: Callable[[], Pair], rows: int, side: str, limit: float) -> Row:
    def run(budget: Budget) -> Cells:
        models, new_tokens = pair(), bench.sizes.new_tokens
        model, context = getattr(models, side), bench.sizes.prompt + new_tokens / 2

        def write(tokens: int) -> float:
            write_alone(model, models.prompts(rows), tokens, 0)
            return float(tokens)

        work = reading_work(model.config, rows, 1, context, item=BFLOAT16).times(new_tokens)
        cells = bench.steady(
            budget, partial(write, new_tokens), work, first=partial(write, new_tokens // 4), repeats=3,
            counted=partial(write, COUNTED),
        )  # fmt: skip
        return {**cells, "tokens/s": rows * new_tokens / cells["seconds"]}

    return Row(f"{rows} rows, {side}'s generate", limit, run)


def rollouts(bench: Bench) -> list[Row]:
    pair = cache(partial(Pair, bench))
    few, many = bench.sizes.rollout_rows
    return [
        ceiling_row(bench),
        *(rollout_row(bench, pair, rows, rate, 18) for rate in (0.85, 0.4) for rows in (few, many)),
        *(generate_row(bench, pair, rows, side, 8) for side in ("student", "teacher") for rows in (few, many)),
    ]


# ------------------------------------------------------------------------------------------------------------- packed


def packed_step(bench: Bench, budget: Budget, make: Callable[..., Any], sides: Sequence[Any], longest: int) -> Cells:
    """A step on one row of many texts with up to `longest` tokens each. The floor counts token pairs inside a text."""
    generator, vocab, size = torch.Generator().manual_seed(0), bench.sizes.vocab, bench.sizes.packed
    number = 4 * size // longest + 4  # enough for two rows
    lengths = torch.randint(max(longest // 16, 2), longest + 1, (number,), generator=generator).tolist()
    texts = [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]
    rows = Dataset.from_dict({"input_ids": texts, "labels": texts})
    trainer = make(rows=rows, packing=True, max_length=size, per_device_train_batch_size=1)

    def work(batch: Mapping[str, Tensor]) -> Work:
        starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], batch["position_ids"].numel()]
        return bench.step_work(*sides, lengths=[end - start for start, end in zip(starts, ends, strict=True)])

    return bench.training_step(budget, trainer, work)


def one_text_step(bench: Bench, budget: Budget) -> Cells:
    ids = torch.randint(2, bench.sizes.vocab, (2, bench.sizes.packed), generator=torch.manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = bench.kd_trainer(bench.student(), bench.teacher, rows, per_device_train_batch_size=1)
    work = bench.step_work(*KD_SIDES, lengths=[bench.sizes.packed])
    return bench.training_step(budget, trainer, lambda _: work)


def packed(bench: Bench) -> list[Row]:
    kd = lambda **kw: bench.kd_trainer(bench.student(), bench.teacher, **kw)  # noqa: E731
    sft = lambda **kw: bench.sft_trainer(bench.student(), **kw)  # noqa: E731
    size, longest = bench.sizes.packed, bench.sizes.packed // 4
    return [
        ceiling_row(bench),
        Row(f"KDTrainer, 1 x {size:,} packed", 20, lambda b: packed_step(bench, b, kd, KD_SIDES, longest)),
        Row(f"KDTrainer, 1 x {size:,}, one text", 10, partial(one_text_step, bench)),
        Row(f"SFTTrainer, 1 x {size:,} packed", 10, lambda b: packed_step(bench, b, sft, KD_SIDES[:1], longest)),
    ]


# ---------------------------------------------------------------------------------------------------------- quantised


def to_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces the linear layers of the blocks by 4-bit layers of bitsandbytes, on the device, as loading does."""
    if not is_bitsandbytes_available():
        raise NotMeasured("bitsandbytes is not installed: pip install 'hf_distill[quantization]'")
    import bitsandbytes as bnb

    for block in model.base_model.layers:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                weight, bias, device = layer.weight.data, layer.bias, layer.weight.device
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=bias is not None, compute_dtype=torch.bfloat16,
                    quant_type="nf4", compress_statistics=True, device="meta",
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                ).to(device)
                new.bias = bias
                new.requires_grad_(False)
                block.set_submodule(path, new)
    model.is_loaded_in_4bit = True  # PEFT and TRL check this
    return model


def weight_bytes(model: PreTrainedModel) -> float:
    return float(sum(p.nbytes for layer in model.base_model.layers for p in layer.parameters()))


def nf4_teacher_step(bench: Bench, budget: Budget, teacher: Callable[[], PreTrainedModel]) -> Cells:
    moved = weight_bytes(teacher())
    trainer = bench.kd_trainer(bench.student(), teacher())
    cells = bench.training_step(budget, trainer, lambda _: bench.step_work(KD_SIDES[0], ("teacher", "nothing", moved)))
    return {**cells, "note": f"teacher's blocks {moved / 1e9:.2f} GB"}


def qlora_step(bench: Bench, budget: Budget, teacher: Callable[[], PreTrainedModel]) -> Cells:
    """A step of a 4-bit student of the teacher's size, with adapters on all linear layers, taught by that teacher."""
    from peft import LoraConfig

    moved = weight_bytes(teacher())
    student = to_nf4(bench.model(bench.config("teacher")))
    peft = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = bench.kd_trainer(student, teacher(), peft=peft)
    sides = ("teacher", "adapters", moved), ("teacher", "nothing", moved)
    return bench.training_step(budget, trainer, lambda _: bench.step_work(*sides))


def quantised(bench: Bench) -> list[Row]:
    teacher = cache(lambda: to_nf4(bench.model(bench.config("teacher"))))
    return [
        ceiling_row(bench),
        Row("KDTrainer, NF4 teacher", 20, lambda budget: nf4_teacher_step(bench, budget, teacher)),
        Row("KDTrainer, QLoRA student of the teacher's size, NF4 teacher", 20, lambda b: qlora_step(bench, b, teacher)),
    ]


# --------------------------------------------------------------------------------------------------------------- more


def cross_tokenizer_row(bench: Bench, method: str, limit: float) -> Row:
    rows, vocab, *widths = bench.sizes.loss
    rows //= 4

    def run(budget: Budget) -> Cells:
        torch.manual_seed(0)
        # Four fifths of the tokens are common; groups of one and of two tokens.
        pieces = [[b"%06d" % i for i in range(vocab)], [b"%06d" % (i + vocab // 5) for i in range(vocab)]]
        shared = shared_tokens(*pieces)
        shared = shared._replace(**{name: tensor.to(bench.device) for name, tensor in shared._asdict().items()})
        like = {"device": bench.device, "dtype": torch.bfloat16}
        hidden = [torch.randn(rows, width, **like) for width in widths]
        heads = [torch.randn(vocab, width, **like).mul_(2 / width**0.5) for width in widths]
        tokens = [torch.randint(vocab, (rows,), device=bench.device) for _ in range(2)]
        groups = torch.arange(rows, device=bench.device) * 2 // 3
        hidden[0].requires_grad_()
        heads[0].requires_grad_()
        spans = Spans(tokens[0], groups, tokens[1], groups)

        def step() -> None:
            cross_tokenizer_loss(
                hidden[0], Head(heads[0]), hidden[1], Head(heads[1]), tokens[0], spans, shared, method=method
            ).loss.backward()

        def reset() -> None:
            hidden[0].grad = heads[0].grad = None

        return bench.steady(budget, step, loss_work(rows, vocab, *widths, item=BFLOAT16), reset=reset)

    return Row(f"cross-tokenizer loss, {method}, N={rows:,}", limit, run)


def flash_attention_2_step(bench: Bench, budget: Budget) -> Cells:
    if not is_flash_attn_2_available():
        raise NotMeasured("flash_attn is not installed")
    student, teacher = (bench.model(bench.config(side), "flash_attention_2") for side in ("student", "teacher"))
    trainer = bench.kd_trainer(student, teacher)
    return bench.training_step(budget, trainer, lambda _: bench.step_work(*KD_SIDES))


def flash_kernel_step(bench: Bench, budget: Budget) -> Cells:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return kd_step(bench, budget)


def more(bench: Bench) -> list[Row]:
    few, pair = (2, 4) if bench.tiny else (1, 64), cache(partial(Pair, bench))
    return [
        ceiling_row(bench),
        loss_row(bench, "ours", "jensen_shannon", 10, freeze_head=True),
        loss_row(bench, "ours", "jensen_shannon", 10, rows=bench.sizes.loss[0] // 8),
        cross_tokenizer_row(bench, "aligned", 10),
        Row("KDTrainer, flash_attention_2", 12, partial(flash_attention_2_step, bench)),
        Row("KDTrainer, sdpa with its flash kernel alone", 12, partial(flash_kernel_step, bench)),
        *(rollout_row(bench, pair, rows, 0.85, 15) for rows in few),
        cross_tokenizer_row(bench, "uld", 10),
    ]


GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "loss": losses,
    "step": steps,
    "memory": memory,
    "rollout": rollouts,
    "packed": packed,
    "quantised": quantised,
    "more": more,
}


def is_fatal(error: Exception) -> bool:
    """True for an error of the device, after which this process cannot measure anything. Out of memory is not one."""
    is_of_device = any(words in str(error) for words in ("CUDA error", "[CUDA]", "CUBLAS_STATUS", "CUDNN_STATUS"))
    return is_of_device and not isinstance(error, torch.OutOfMemoryError)


def main() -> None:
    parser = group_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    disable_progress_bars()
    bench = Bench(options.device, options.tiny)
    serve(
        options, lambda: GROUPS[options.group](bench),
        clean_up=bench.clean_up, is_fatal=is_fatal,
    )  # fmt: skip


if __name__ == "__main__":
    main()
