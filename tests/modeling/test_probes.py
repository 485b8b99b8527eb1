"""The checks that ask a model itself."""

import copy

import pytest
import torch
from torch import nn

from hf_distill.modeling import check_head, check_load_balancing, head_of
from tests.conftest import make_model
from tests.families import tiny_model


def test_damaged_weights_are_refused_in_words():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the teacher's logits are not finite"):
        check_head(model, "teacher")


@pytest.mark.parametrize("what", ["weight", "bias", "scale", "softcap", "weak softcap"])
def test_check_head_notices_a_head_that_is_not_the_models(what, monkeypatch):
    model = make_model("phi")
    nn.init.normal_(model.lm_head.bias)
    right = head_of(model)
    wrong = {
        "weight": right._replace(weight=right.weight.roll(1, 0)),
        "bias": right._replace(bias=None),
        "scale": right._replace(logit_scale=0.5),
        "softcap": right._replace(softcap=1.0),
        "weak softcap": right._replace(softcap=15.0),
    }[what]
    monkeypatch.setattr("hf_distill.modeling.probes.head_of", lambda model: wrong)
    with pytest.raises(ValueError, match=r"the student \(PhiForCausalLM\) does not compute its logits"):
        check_head(model, "student")


def test_check_head_leaves_the_model_as_it_was():
    model = make_model("gpt2", resid_pdrop=0.5).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_head(model, "student")
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_check_head_takes_half_precision_and_refuses_a_quantised_head():
    check_head(make_model("granite").to(torch.bfloat16), "teacher")
    model = make_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="the teacher's output layer is quantised"):
        check_head(model, "teacher")


def test_load_balancing_loss_that_is_not_mixtrals_is_refused_in_words(monkeypatch):
    check_load_balancing(tiny_model("mixtral"), "student")
    with pytest.raises(ValueError, match=r"the student \(DogeForCausalLM\).*set router_aux_loss_coef=0.0"):
        check_load_balancing(tiny_model("doge"), "student")  # it has no experts
    monkeypatch.setattr("hf_distill.modeling.probes.load_balancing_loss", lambda *_: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"the student \(MixtralForCausalLM\) is not that of Mixtral"):
        check_load_balancing(tiny_model("mixtral"), "student")
