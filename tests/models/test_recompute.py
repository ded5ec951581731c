"""What the backward recomputes: the same bits, less memory, and nothing that outlives a step."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_checkpoint

from srit.models import decoder, load_model
from srit.models.lora import add_lora
from srit.models.ops import glu, recomputable, recompute_in_backward, rms_norm

IDS = torch.arange(3, 43)[None]
PACKED = {"cu_seqlens": torch.tensor([0, 16, 24, 32, 40]), "parents": torch.tensor([-1, 0, 0, -1]),
          "positions": torch.cat([torch.arange(24), torch.arange(16, 24), torch.arange(8)])[None]}
GEMMA = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 5,
         "hidden_activation": "gelu_pytorch_tanh"}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, GEMMA], ids=["llama", "gemma3"])
def test_gradients_are_those_of_saved_tensors(tmp_path, monkeypatch, changes, dtype, lora):
    model, _ = load_model(tiny_checkpoint(tmp_path / "m", scale=2.0, **changes), compute_dtype=dtype)
    if lora:
        add_lora(model, r=4)
        torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B)
    for layout in ({}, PACKED):
        grads = []
        for context in (nullcontext, recompute_in_backward):
            monkeypatch.setattr(decoder, "recompute_in_backward", context)
            model.zero_grad()
            hidden = model.hidden(IDS, **layout).float()
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden).sin()).sum().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert grads[0] and all(map(torch.equal, *grads))


def test_inputs_of_linear_layers_are_not_saved(tmp_path, monkeypatch):
    """Their memory is free once the forward is over: marked tensors are held by nobody."""
    model, config = load_model(tiny_checkpoint(tmp_path / "m"))
    for context, freed in ((recompute_in_backward, True), (nullcontext, False)):
        monkeypatch.setattr(decoder, "recompute_in_backward", context)
        inputs = []

        def note(module, args, inputs=inputs):
            inputs.append(weakref.ref(args[0].untyped_storage()))

        hooks = [module.register_forward_pre_hook(note)
                 for name, module in model.model.named_modules() if name.endswith("_proj")]
        hidden = model.hidden(IDS, **PACKED)
        assert hidden.requires_grad and len(inputs) == 7 * config.num_hidden_layers
        assert all((storage() is None) == freed for storage in inputs)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("make", [
    lambda x: rms_norm(x, torch.ones(8), 1e-6), lambda x: glu(x, x + 1, False),
    lambda x: recomputable(x * 2, torch.mul, x, 2)], ids=["rms_norm", "glu", "a function"])
@pytest.mark.parametrize("view", [
    lambda value: value, lambda value: value.view(3, 2, 8), lambda value: value.transpose(0, 1),
    lambda value: value[:, 1:]], ids=["itself", "view", "transposed", "a part"])
def test_a_marked_tensor_is_recomputed_or_saved_as_it_is(make, view):
    x, weight, grads = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True), []
    for context in (nullcontext, recompute_in_backward):
        with context():
            out = view(make(x)) * weight
        grads.append(torch.autograd.grad(out.square().sum(), (x, weight)))
    assert all(map(torch.equal, *grads))


def test_a_mark_is_freed_with_its_memory():
    with recompute_in_backward():
        value = recomputable(torch.ones(4), torch.ones, 4)
    mark = weakref.ref(value.untyped_storage().recompute)
    view = value.view(2, 2)
    del value
    assert mark() is view.untyped_storage().recompute
    del view
    assert mark() is None


def test_nothing_is_marked_outside(tmp_path):
    x = torch.randn(2, 8, requires_grad=True)
    assert not hasattr(rms_norm(x, torch.ones(8), 1e-6).untyped_storage(), "recompute")
    with pytest.raises(RuntimeError), recompute_in_backward():
        assert hasattr(rms_norm(x, torch.ones(8), 1e-6).untyped_storage(), "recompute")
        raise RuntimeError
    assert not hasattr(glu(x, x, True).untyped_storage(), "recompute")


def test_a_step_leaves_nothing_behind(tmp_path):
    """Without the garbage collector: neither a backward nor a dropped loss leaves a cycle."""
    model, _ = load_model(tiny_checkpoint(tmp_path / "m"))
    for finish in (torch.Tensor.backward, lambda loss: None):
        alive = []

        def note(module, inputs, output, alive=alive):
            alive.append(weakref.ref(output.untyped_storage()))

        hooks = [m.register_forward_hook(note) for m in model.modules() if not list(m.children())]
        gc.collect()
        gc.disable()
        try:
            loss = model.hidden(IDS, **PACKED).square().mean()
            assert any(storage() is not None for storage in alive)
            finish(loss)
            del loss
            assert all(storage() is None for storage in alive)
        finally:
            gc.enable()
            for hook in hooks:
                hook.remove()


def test_a_tensor_that_several_nodes_saved_is_recomputed_once():
    x, calls = torch.randn(3, 4, requires_grad=True), []
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]

    def double(x):
        calls.append(weakref.ref(value := 2 * x))
        return value

    with recompute_in_backward():
        y = recomputable(double(x), double, x)
        loss = sum((y @ w).square().sum() for w in weights)
        del y
    assert calls.pop()() is None  # the forward's tensor is gone
    grads = torch.autograd.grad(loss, weights, retain_graph=True)
    assert len(calls) == 1 and calls[0]() is None  # one more, which is gone as well
    assert all(map(torch.equal, grads, torch.autograd.grad(loss, weights)))  # again, for a kept graph
    y = 2 * x
    assert all(torch.allclose(g, 2 * y.T @ y @ w) for g, w in zip(grads, weights, strict=True))
