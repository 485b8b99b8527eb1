"""Plans of rows with pictures, against real steps of tiny models on the CPU, and batches that processors make."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from hf_distill import KDConfig, KVProjectionConfig, SpeculativeKDConfig
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.modeling import expose_hidden_states, select_positions, spare_frozen_tower
from hf_distill.planning import plan_run
from hf_distill.planning.batches import Batch
from hf_distill.planning.models import ModelSpec, layer_bytes
from hf_distill.planning.steps import SignalSpec, StudentRun, student_step
from hf_distill.trainers.pictures import freeze_tower
from tests.conftest import make_model
from tests.planning.peaks import second_peak
from tests.vision import (
    FAMILIES,
    NEEDS_5_18,
    PROCESSED,
    VISION,
    VOCAB,
    HandMade,
    make_processor,
    make_vlm,
    picture,
    tokenised,
)

PLANNED = sorted(FAMILIES.keys() - {"llava_onevision", "mllama", "lfm2_vl"})
WIDTH, ROWS, LENGTH, PICTURES = 48, 2, 64, 16
LABELS = ROWS * (LENGTH - 1 - PICTURES)


@pytest.mark.parametrize("family", [*sorted({*PLANNED} - {"llama4"}), pytest.param("llama4", marks=NEEDS_5_18)])
def test_pixels_have_the_shapes_that_processors_make(family):
    if family in PROCESSED:
        mark = "<boi>" if family == "gemma3" else "<image>"
        pictures = [[picture(i, (16, 16))] for i in range(ROWS)]
        splits = {"do_image_splitting": False} if family == "smolvlm" else {}
        processor = make_processor(family, **splits)
        found = processor(images=pictures, text=[mark] * ROWS, padding=True, return_tensors="pt")
    else:
        found = HandMade(family)(list(tokenised(ROWS)))
    expected = {name: each.shape for name, each in found.items() if name in ("pixel_values", "image_grid_thw")}
    inputs = Batch(ROWS, 8, 1, pictures=4).inputs(make_vlm(family))
    assert {name: inputs[name].shape for name in expected} == expected
    assert set(inputs) - {"input_ids"} <= set(found)


class Step:
    """A real micro-batch with pictures, as the trainer makes it."""

    def __init__(self, model, run):
        if run.freezes_tower:
            freeze_tower(model)
        self.model = model.train()
        if run.checkpointing is not None:
            model.gradient_checkpointing_enable(run.checkpointing)
        spare_frozen_tower(model)
        expose_hidden_states(model)
        self.objective, self.inputs = run.objective, run.batch.inputs(model)
        self.head, self.labels = Head(torch.randn(VOCAB, WIDTH)), torch.zeros(LABELS, dtype=torch.long)

    def __call__(self):
        signal = TeacherSignal(torch.randn(LABELS, WIDTH), self.head)

        def with_hidden(outputs, head):
            hidden = select_positions(outputs.last_hidden_state, torch.arange(LABELS))
            return signal.loss(hidden, head, self.labels, self.objective).loss

        self.model(**self.inputs, with_hidden=with_hidden).backward()


@pytest.mark.parametrize("freezes", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(
    "family",
    [
        "idefics3",
        "qwen2_5_vl",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gemma3", "qwen3_vl", "internvl")),
    ],
)
def test_the_peak_of_a_step_with_pictures_is_that_of_the_profiler(
    family, checkpointing, freezes, tmp_path, monkeypatch
):
    # A tower that outweighs the language part, so that an error in it would show.
    for name, size in {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4}.items():
        monkeypatch.setitem(VISION, name, size)
    if "depth" in FAMILIES[family]["vision"]:
        own = {**FAMILIES[family]["vision"], "hidden_size": 96, "depth": 4, "intermediate_size": 192}
        monkeypatch.setitem(FAMILIES[family], "vision", own)
    model = make_vlm(family)
    model.config.save_pretrained(tmp_path)
    run = StudentRun(
        ModelSpec(str(tmp_path), "float32"), Batch(ROWS, LENGTH, LABELS, pictures=PICTURES),
        Objective(kd_weight=0.5, vocab_size=VOCAB, chunk_size=32, checked=True),
        (SignalSpec("dense", WIDTH, VOCAB, torch.float32),), checkpointing=checkpointing, device="cpu",
        freezes_tower=freezes,
    )  # fmt: skip
    found, step = student_step(run), Step(model, run)
    beside = found.peak.total - found.peak.parts["the batch"]  # which is alive before the real step
    assert beside == pytest.approx(second_peak(step), rel=0.03)
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", [family for family in PLANNED if family != "gemma3"])  # accelerate refuses it
def test_blocks_of_a_tower_are_layers_to_engines_that_split(family):
    """As accelerate wraps them for FSDP2."""
    model = make_vlm(family)
    plugin = SimpleNamespace(auto_wrap_policy=transformer_auto_wrap_policy, transformer_cls_names_to_wrap=None)
    wrapped = [module for module in model.modules() if fsdp2_prepare_auto_wrap_policy(plugin, model)(module)]
    sizes = [sum(p.nbytes for p in module.parameters()) for module in wrapped]
    alone = {id(p): p.nbytes for p in model.parameters()}
    for parameter in (p for module in wrapped for p in module.parameters()):
        alone.pop(id(parameter), None)
    layer, root = layer_bytes(model)
    assert (layer, root) == (max(sizes), sum(alone.values()))


# ---------------------------------------------------------------------------------------------------------- whole plans


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with configurations: a student and a teacher that see, and one that does not."""
    folder = tmp_path_factory.mktemp("models")
    make_vlm("qwen2_5_vl").config.save_pretrained(folder / "student")
    make_vlm("qwen2_5_vl", num_hidden_layers=3).config.save_pretrained(folder / "teacher")
    make_vlm("mllama").config.save_pretrained(folder / "mllama")
    make_model().config.save_pretrained(folder / "text")
    return folder


def planned(models, student="student", teacher="teacher", config=KDConfig, pictures=16, teacher_pictures=None, **more):
    options = {"max_length": 64, "output_dir": "out", "use_cpu": True, "bf16": False} | more
    teachers = teacher if teacher in (None, "base") else str(models / teacher)
    return plan_run(
        str(models / student), teachers, config(**options), picture_tokens=pictures,
        teacher_picture_tokens=teacher_pictures,
    )  # fmt: skip


def test_tokens_of_pictures_bear_no_labels_and_are_read(models):
    with_pictures, text = planned(models), planned(models, pictures=None)
    assert with_pictures.counts["tokens of an update"] == text.counts["tokens of an update"]
    assert text.counts["label-bearing tokens of an update"] == 8 * 63
    assert with_pictures.counts["label-bearing tokens of an update"] == 8 * (63 - 16)
    assert with_pictures.parts["the batch"] > text.parts["the batch"] + 8 * 16 * 4 * 96 * 4  # patches of 96 numbers
    assert with_pictures.flops["teacher"] > text.flops["teacher"]
    assert with_pictures.always == text.always
    assert any("rows of text alone are counted" in note for note in text.notes)


def test_a_teacher_may_see_a_picture_in_more_tokens(models):
    same, more = planned(models), planned(models, teacher_pictures=32)
    assert more.phases["teacher's forward"] > same.phases["teacher's forward"]
    assert more.counts == same.counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "text"}, "text does not read pictures: leave picture_tokens out"),
        ({"teacher": "text"}, "text does not read pictures"),
        ({"student": "mllama", "teacher": "base"}, "pictures of a mllama cannot be planned"),
        ({"pictures": 64}, "pictures of 64 tokens leave no text in a row of 64"),
        ({"pictures": 0}, "picture_tokens has to be at least 1, got 0"),
        ({"pictures": None, "teacher_pictures": 8}, "teacher_picture_tokens needs picture_tokens"),
        ({"teacher_pictures": 0}, "teacher_picture_tokens has to be at least 1, got 0"),
        ({"packing": True}, "packing and padding_free join rows of text alone"),
        ({"config": KVProjectionConfig}, "work on text alone"),
        ({"config": SpeculativeKDConfig, "max_length": None}, "work on text alone"),
    ],
)
def test_pictures_that_a_run_would_refuse_are_not_planned(models, changes, message):
    with pytest.raises(ValueError, match=message):
        planned(models, **changes)
