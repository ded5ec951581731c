"""Chosen and rejected behind one prompt: the same losses, rewards and gradients as apart."""

from dataclasses import replace

import pytest
import torch
from tiny import SIZES, sides, tiny_checkpoint

from srit.config import DPOConfig
from srit.data.batches import collate
from srit.models import load_model
from srit.train.dpo import compute_loss


@pytest.fixture(params=["llama", "window", "block", "mlp"])
def model(request, tmp_path):
    changes = {}
    if request.param == "window":
        changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                   "sliding_window": 8}
    model, _ = load_model(str(tiny_checkpoint(tmp_path / "m", scale=4.0, **changes)))
    model.gradient_checkpointing = request.param if request.param in ("block", "mlp") else None
    return model.train()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_equal_to_apart(model, loss_type):
    pairs = [sides(size) for size in SIZES]
    apart, shared = collate([[s] for pair in pairs for s in pair]), collate(pairs)
    assert shared.num_tokens == apart.num_tokens == apart.input_ids.numel()
    assert shared.input_ids.numel() == apart.num_tokens - sum(p + c for p, _, _, c in SIZES)
    assert torch.equal(shared.targets, apart.targets)
    assert torch.equal(shared.cu_targets, apart.cu_targets)
    cfg = DPOConfig("m", ["f"], "o", loss_type=loss_type, rpo_alpha=0.5)
    ref, results = -30 * torch.rand(2 * len(pairs)), []
    for batch in (apart, shared):
        model.zero_grad()
        loss, metrics = compute_loss(model, replace(batch, ref_logps=ref), cfg, scale=0.25)
        loss.backward()
        results.append((loss.detach(), metrics, [p.grad.clone() for p in model.parameters()]))
    (loss_a, metrics_a, grads_a), (loss_b, metrics_b, grads_b) = results
    torch.testing.assert_close(loss_b, loss_a, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics_b, metrics_a, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
