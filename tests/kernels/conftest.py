import pytest
import torch


@pytest.fixture(params=["torch", "triton"])
def kernels(request, monkeypatch):
    """Runs a test with the PyTorch twins and with the Triton kernels, interpreted without a GPU."""
    monkeypatch.setenv("SRIT_KERNELS", request.param)
    return request.param


@pytest.fixture
def poison_empty(monkeypatch):
    """A function; after its call, uninitialised float tensors are full of NaN."""

    def poisoned(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    def poison():
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    return poison
