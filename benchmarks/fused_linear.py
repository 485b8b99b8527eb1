"""Hard labels and a divergence from hidden states and heads, forward and backward, against three alternatives.

    python -m benchmarks.fused_linear                    # a CPU: 1,024 positions of a 151,936-row vocabulary, float32
    python -m benchmarks.fused_linear --preset h100      # 8,192 positions of a 128,256-row vocabulary, bfloat16

Each implementation runs in a separate process. Dense logits need about 7 GB with the first preset. Liger's row needs
`pip install 'hf_distill[benchmarks]'`. Ratios are ours / this row. The gradients of a step count as its memory. The
differences are relative to dense logits: of the loss, and of its gradients (all of the hidden states, a sample of the
head's rows). TRL's function has no hard labels, so its loss is different. `--only ours dense products` adds the matrix
products alone, which no implementation can be faster than.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import Measurement, NotMeasured, columns, in_fresh_process, machine, measure, print_table
from hf_distill.losses.fused_linear import fused_linear_distillation_loss

# TRL and Liger name a divergence by the teacher's weight in the mixture. Ours has a name for each.
BETAS = {"forward_kl": 0.0, "jensen_shannon": 0.5, "reverse_kl": 1.0}
KD_WEIGHT = 0.5
SAMPLED_HEAD_ROWS = 2048
PRESETS = {
    "cpu": {},
    "h100": {
        "rows": 8192, "vocab": 128_256, "student_width": 2048, "teacher_width": 4096, "dtype": "bfloat16",
        "device": "cuda", "divergence": ["jensen_shannon"], "repeats": 20, "warmup": 3,
    },
}  # fmt: skip


class Inputs(NamedTuple):
    student_hidden: Tensor  # (N, Ds)
    student_head: Tensor  # (V, Ds)
    teacher_hidden: Tensor  # (N, Dt)
    teacher_head: Tensor  # (V, Dt)
    labels: Tensor  # (N,)


class Result(NamedTuple):
    measurement: Measurement
    loss: float
    gradients: list[np.ndarray]


def ours(x: Inputs, divergence: str, options: argparse.Namespace) -> Tensor:
    weights = {"kd_weight": KD_WEIGHT, "temperature": options.temperature}
    return fused_linear_distillation_loss(*x, divergence=divergence, **weights).loss


def trl(x: Inputs, divergence: str, options: argparse.Namespace) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        x.student_hidden, x.student_head, None, x.teacher_hidden, x.teacher_head, None,
        BETAS[divergence], options.temperature,
    )  # fmt: skip
    return options.temperature**2 * per_token.mean()


def dense(x: Inputs, divergence: str, options: argparse.Namespace) -> Tensor:
    student_logits = (x.student_hidden @ x.student_head.t()).float()  # (N, V)
    with torch.no_grad():
        teacher_logits = (x.teacher_hidden @ x.teacher_head.t()).float()  # (N, V)
    ce = F.cross_entropy(student_logits, x.labels)
    student = F.log_softmax(student_logits / options.temperature, -1)
    teacher = F.log_softmax(teacher_logits / options.temperature, -1)
    if divergence == "forward_kl":
        kd = _kl(teacher, student)
    elif divergence == "reverse_kl":
        kd = _kl(student, teacher)
    else:
        mixture = torch.logaddexp(student, teacher) - np.log(2)
        kd = (_kl(teacher, mixture) + _kl(student, mixture)) / 2
    return KD_WEIGHT * options.temperature**2 * kd + (1 - KD_WEIGHT) * ce


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def liger(x: Inputs, divergence: str, options: argparse.Namespace) -> Tensor:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise NotMeasured(f"{error}; pip install 'hf_distill[benchmarks]'") from None
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - KD_WEIGHT,
        weight_soft_loss=KD_WEIGHT * options.temperature**2,
        beta=BETAS[divergence],
        temperature=options.temperature,
        compiled=options.liger_compiled,
    )
    return loss(*x)


class _Products(torch.autograd.Function):
    """The four matrix products of a step with nothing between them; what it returns is no loss."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head):
        teacher_hidden @ teacher_head.t()
        logits = hidden @ head.t()
        ctx.save_for_backward(hidden, head, logits)
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx, _):
        hidden, head, logits = ctx.saved_tensors
        return logits @ head, logits.t() @ hidden if ctx.needs_input_grad[1] else None, None, None


def products(x: Inputs, divergence: str, options: argparse.Namespace) -> Tensor:
    return _Products.apply(*x[:4])


IMPLEMENTATIONS = {"ours": ours, "trl": trl, "dense": dense, "liger": liger, "products": products}
TITLES = {
    "ours": "hf_distill", "trl": "TRL, divergence alone", "dense": "dense logits", "liger": "Liger, {}",
    "products": "the products alone",
}  # fmt: skip


def run(name: str, divergence: str, options: argparse.Namespace) -> Result:
    """Measures one implementation in this process."""
    x = make_inputs(options)
    losses = []

    def step(_: None) -> None:
        loss = IMPLEMENTATIONS[name](x, divergence, options)
        loss.backward()
        losses.append(loss.detach())

    def reset() -> None:
        x.student_hidden.grad = x.student_head.grad = None

    measurement = measure(step, [None] * options.repeats, reset=reset, device=options.device, warmup=options.warmup)
    gradients = [x.student_hidden.grad]
    if not options.freeze_head:
        gradients.append(x.student_head.grad[:: max(1, options.vocab // SAMPLED_HEAD_ROWS)])
    return Result(measurement, losses[-1].item(), [gradient.float().cpu().numpy() for gradient in gradients])


def merged(first: Result, second: Result) -> Result:
    """The times of both rounds and the larger memory. Loss and gradients are the same in every round."""
    times, memory = zip(first.measurement, second.measurement, strict=True)
    return first._replace(measurement=Measurement([*times[0], *times[1]], max(memory)))


def make_inputs(options: argparse.Namespace) -> Inputs:
    """Random hidden states and heads that give logits of standard deviation 2."""
    generator = torch.Generator(options.device).manual_seed(0)
    like = {"generator": generator, "device": options.device, "dtype": getattr(torch, options.dtype)}
    tensors = []
    for width in (options.student_width, options.teacher_width):
        tensors.append(torch.randn(options.rows, width, **like))
        tensors.append(torch.randn(options.vocab, width, **like).mul_(2 / width**0.5))
    tensors[0].requires_grad_()
    tensors[1].requires_grad_(not options.freeze_head)
    labels = torch.randint(options.vocab, (options.rows,), generator=generator, device=options.device)
    return Inputs(*tensors, labels)


def row_of_table(name: str, results: dict[str, Result | str], options: argparse.Namespace) -> dict[str, str]:
    title = TITLES[name].format("compiled" if options.liger_compiled else "not compiled")
    result, ours, truth = results[name], results.get("ours"), results.get("dense")
    if isinstance(result, str):
        return {"implementation": title, "time": "not measured"}
    row = columns(result.measurement, ours.measurement if isinstance(ours, Result) else None)
    if isinstance(truth, Result) and name in ("ours", "liger"):
        row["loss diff."] = f"{abs(result.loss - truth.loss) / abs(truth.loss):.0e}"
        row["gradient diff."] = f"{max(map(_difference, result.gradients, truth.gradients)):.0e}"
    return {"implementation": title, **row}


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sets the defaults of the options below")
    parser.add_argument("--rows", type=int, default=1024, help="label-bearing positions, N")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--student-width", type=int, default=896)
    parser.add_argument("--teacher-width", type=int, default=1536)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divergence", nargs="+", choices=BETAS, default=["forward_kl", "jensen_shannon"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--freeze-head", action="store_true", help="the student's head needs no gradient (LoRA)")
    parser.add_argument("--rounds", type=int, default=1, help="times that the implementations take turns")
    parser.add_argument("--repeats", type=int, default=3, help="steps per round; the median time of all is shown")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those, in every round")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=["ours", "trl", "dense", "liger"])
    parser.add_argument("--liger-compiled", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    options = parser.parse_args()
    if options.liger_compiled is None:
        options.liger_compiled = options.device.startswith("cuda")
    return options


def main() -> None:
    options = parse_arguments()
    for divergence in options.divergence:
        results: dict[str, Result | str] = {}
        for name in options.only * options.rounds:
            if isinstance(results.get(name), str):
                continue
            try:
                found = in_fresh_process(run, name, divergence, options)
                results[name] = found if name not in results else merged(results[name], found)
            except NotMeasured as error:
                results[name] = str(error)
        title = (
            f"{divergence}, temperature {options.temperature:g}, N={options.rows:,}, V={options.vocab:,}, "
            f"Ds={options.student_width:,}, Dt={options.teacher_width:,}, {options.dtype}"
            f"{', frozen head' if options.freeze_head else ''}; {machine(options.device)}"
        )
        rows = [row_of_table(name, results, options) for name in results]
        reasons = {name: result for name, result in results.items() if isinstance(result, str)}
        print_table(title, rows, options.markdown, reasons)


if __name__ == "__main__":
    main()
