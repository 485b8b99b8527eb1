import pytest
import torch

from hf_distill.losses.fused_linear import Head


@pytest.fixture
def product_dtypes(monkeypatch):
    """Under `torch.autocast("cpu")` products are in float64, as they are in bfloat16 on CUDA; those of each width."""
    dtypes = {}
    project_ = Head.project_

    def watched(self, out, hidden):
        dtypes.setdefault(hidden.shape[1], set()).add(hidden.dtype)
        project_(self, out, hidden)

    monkeypatch.setattr(Head, "project_", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16), monkeypatch.context() as patch:
        patch.setattr(torch, "get_autocast_dtype", lambda device: torch.float64)
        yield dtypes
