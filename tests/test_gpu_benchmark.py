"""The benchmarks that wait for a GPU: their counts of work against torch's, and a rehearsal of all rows in small."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings, fused_linear, gpu, gpu_bench, gpu_rows
from benchmarks.ceilings import Ceilings, Work, backbone_work, count_events, loss_work, reading_work
from benchmarks.timed_rows import JSON, MARKDOWN, Budget, NotMeasured
from hf_distill.modeling import cache_keyword
from tests.conftest import make_model

ROWS, LENGTH, VOCAB = 2, 6, 384


def counted_flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def make_qwen(**config):
    return make_model("qwen2", attn_implementation="eager", tie_word_embeddings=False, **config)


def attention_flops(config, pairs, products=2):
    return config.num_hidden_layers * products * 2 * config.hidden_size * pairs


def angle_flops(model, length):
    """The products of matrices by which older versions of transformers compute the angles of rotary embeddings."""
    states, places = torch.zeros(1, length, 4), torch.arange(length).unsqueeze(0)
    return counted_flops(lambda: model.base_model.rotary_emb(states, places))


@pytest.mark.parametrize("trained", ["nothing", "weights"])
def test_work_of_a_backbone_is_what_torch_counts(trained):
    model = make_qwen(max_position_embeddings=64)
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH))

    def run():
        if trained == "nothing":
            with torch.no_grad():
                model.base_model(ids)
        else:
            model.train().base_model(ids).last_hidden_state.sum().backward()

    config = model.config
    work = backbone_work(config, [LENGTH] * ROWS, item=4, trained=trained)
    # Eager attention multiplies all pairs; ours counts a token with itself and those before it.
    times = 1 if trained == "nothing" else 3
    future = ROWS * (LENGTH**2 - LENGTH * (LENGTH + 1) / 2)
    expected = work.flops + times * attention_flops(config, future)
    assert counted_flops(run) == pytest.approx(expected + angle_flops(model, LENGTH), rel=1e-12)


def test_weights_of_a_backbone_are_its_linear_layers():
    model = make_qwen()
    linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    assert ceilings.layer_parameters(model.config) == sum(module.weight.numel() for module in linear)


def test_frozen_weights_cost_two_thirds_of_the_linear_products():
    config = make_qwen().config
    free, adapters, weights = (
        backbone_work(config, [4], item=2, trained=trained).flops for trained in ("nothing", "adapters", "weights")
    )
    assert weights == 3 * free
    assert weights - adapters == 2 * ceilings.layer_parameters(config) * 4


def test_work_of_reading_a_token_over_a_cache_is_what_torch_counts():
    model, context = make_qwen(), 5
    ids = torch.randint(2, VOCAB, (ROWS, context + 1))
    with torch.no_grad():
        keyword = cache_keyword(model)
        cache = getattr(model(ids[:, :-1], use_cache=True), keyword)
        found = counted_flops(lambda: model(ids[:, -1:], **{keyword: cache}))
    work = reading_work(model.config, ROWS, 1, context + 1, item=4)
    assert found == pytest.approx(work.flops + angle_flops(model, 1), rel=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_work_of_the_loss_is_what_torch_counts_for_dense_logits_and_for_ours(frozen):
    options = gpu_rows.argparse.Namespace(
        rows=7, vocab=50, student_width=4, teacher_width=6, dtype="float32", device="cpu", freeze_head=frozen,
        temperature=1.0,
    )  # fmt: skip
    x = fused_linear.make_inputs(options)
    expected = loss_work(7, 50, 4, 6, item=4, frozen_head=frozen)
    for name in ("dense", "ours"):
        loss = fused_linear.IMPLEMENTATIONS[name]
        assert counted_flops(lambda loss=loss: loss(x, "jensen_shannon", options).backward()) == expected.flops
    tensors = [x.student_hidden, x.student_head, x.teacher_hidden, x.teacher_head]
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert expected.bytes == sum(tensor.nbytes for tensor in [*tensors, *gradients])


def test_the_floor_is_the_longer_of_arithmetic_and_traffic():
    ceiling = Ceilings(flops=100.0, bytes=10.0)
    assert ceiling.floor(Work(200.0, 10.0)) == 2.0
    assert ceiling.floor(Work(200.0, 30.0)) == 3.0


def test_products_and_reads_of_the_host_are_counted():
    a = torch.randn(4, 4)

    def step():
        b = torch.mm(a, a) @ a
        b.sum().item()
        b.nonzero()

    counts = count_events(step)
    assert (counts["products"], counts["host reads"], counts["syncs"]) == (2, 2, 0)


def test_the_pair_of_models_has_the_acceptance_that_is_asked_for():
    bench = gpu_bench.Bench("cpu", tiny=True)
    pair = gpu_bench.Pair(bench)
    ids = pair.prompts(8)["student_prompt_ids"]
    assert pair.acceptance(ids, 2**12) > 0.95  # the teacher says what the student says
    rates = [pair.acceptance(ids, pair.scale(rate)) for rate in (0.85, 0.4)]
    assert rates == pytest.approx([0.85, 0.4], abs=0.1)


def test_rows_of_a_step_and_of_a_rollout_have_all_of_their_numbers():
    bench = gpu_bench.Bench("cpu", tiny=True)
    step = next(row for row in gpu_rows.steps(bench) if row.name == "KDTrainer").measure(Budget(30))
    rollout = gpu_rows.rollouts(bench)[1].measure(Budget(30))
    for row in (step, rollout):
        assert {"seconds", "memory", "floor", "share", "warm-up", "recompilations", "tokens/s"} <= row.keys()
        assert row["products"] > 0
        assert row["share"] == pytest.approx(row["floor"] / row["seconds"])
    assert rollout["student forwards"] >= rollout["blocks"] > 0


def test_a_warm_up_that_is_longer_than_its_row_may_take_is_told():
    bench = gpu_bench.Bench("cpu", tiny=True)
    with pytest.raises(NotMeasured, match="the warm-up alone took"):
        bench.steady(Budget(-1), lambda: None, Work())


def test_every_group_has_a_title_and_a_limit():
    assert list(gpu.GROUPS) == ["tests", *gpu_rows.GROUPS]


@pytest.mark.slow
def test_all_rows_are_rehearsed_on_a_cpu(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--tiny", "--device=cpu", f"--output={tmp_path}", "--patience=10", "--budget=1200"]  # of a busy machine
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    groups = json.loads((tmp_path / JSON).read_text())["groups"]
    assert list(groups) == list(gpu.GROUPS)
    errors = {row["error"] for rows in groups.values() for row in rows if "error" in row}
    missing = ("liger_kernel", "flash_attn", "bitsandbytes")  # packages that need not be there
    assert not {error for error in errors if not any(name in error for name in missing)}, tmp_path / "log.txt"
    assert all(f"**{title}**" in (tmp_path / MARKDOWN).read_text() for title, _ in gpu.GROUPS.values())
