"""The learning rate is a pure function of the step, and is transformers' schedule."""

import pytest
import torch

from srit.config import SFTConfig
from srit.training.optimizer import lr_factor, make_adamw, optimizer_step, warmup_steps


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_is_that_of_transformers(scheduler, warmup):
    transformers = pytest.importorskip("transformers")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    theirs = transformers.get_scheduler(name, optimizer, warmup, 10)
    for step in range(10):
        assert lr_factor(step, 10, warmup, scheduler) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warmup_counts_optimizer_steps():
    assert warmup_steps(100, 0.03, 0) == 3
    assert warmup_steps(10, 0.03, 0) == 1
    assert warmup_steps(10, 0.03, 4) == 4
    assert warmup_steps(10, 0.0, 0) == 0


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = make_adamw(model, SFTConfig("m", ["f"], "o", weight_decay=0.5))
    decays = {tuple(p.shape): g["weight_decay"] for g in optimizer.param_groups
              for p in g["params"]}
    assert decays == {(2, 3): 0.5, (2,): 0.0}


@pytest.mark.parametrize("max_norm,after", [(1.0, 1.0), (0.0, 5.0), (9.0, 5.0)])
def test_gradients_are_clipped_inside_the_update(max_norm, after):
    """The norm is the one before clipping; the first moment is that of the clipped gradient."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = make_adamw(model, SFTConfig("m", ["f"], "o"))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm, finite = optimizer_step(model, optimizer, 1e-3, max_norm, loss=torch.tensor(1.0))
    assert norm.item() == pytest.approx(5.0) and finite
    moment = optimizer.state[model.weight]["exp_avg"] / (1 - optimizer.param_groups[0]["betas"][0])
    torch.testing.assert_close(moment, torch.tensor([[0.6, 0.8]]) * after)
