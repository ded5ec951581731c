"""Compiled layers: the same losses and gradients, and two programs for all layers and lengths."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from families import COMMON, FAMILIES
from tiny import SIZES, metrics, pair, sides, tiny_checkpoint, write_rows
from torch._dynamo.utils import counters

from srit.config import DPOConfig
from srit.data.batches import collate
from srit.models import Decoder, load_model
from srit.models.lora import add_lora
from srit.runtime.files import InputError
from srit.train import dpo
from srit.train.dpo import compute_loss
from srit.training.setup import check_compiler

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None,
                                    reason="torch.compile needs a C++ compiler")
CFG = DPOConfig("m", ["f"], "o", rpo_alpha=0.5)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def backward(model, sizes):
    """Loss, metrics and gradients of pairs of these sizes."""
    torch.manual_seed(1)
    batch = collate([sides(size) for size in sizes])
    ref = -30 * torch.rand(2 * len(sizes))
    model.zero_grad()
    loss, sums = compute_loss(model, replace(batch, ref_logps=ref), CFG, scale=0.25)
    loss.backward()
    return loss.detach(), sums, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(model, sizes, backend):
    expected = backward(model, sizes)
    model.compile_layers(backend)
    loss, sums, grads = backward(model, sizes)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected[2], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.fixture
def tiny(tmp_path):
    return tiny_checkpoint(tmp_path / "m", scale=4.0)


def make(tiny, dtype=torch.float32):
    return load_model(str(tiny), compute_dtype=dtype)[0].train()


@pytest.mark.parametrize("name", FAMILIES)
def test_traced_layers_give_the_same_loss_and_gradients(name, tmp_path):
    """Traced and differentiated by AOTAutograd, and run eagerly: no code is generated."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, changes = FAMILIES[name]
    config = getattr(transformers, kind)(**{**COMMON, "vocab_size": 320, **changes})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert_same(make(tmp_path), SIZES, "aot_eager")


@needs_compiler
@pytest.mark.parametrize("checkpointing", [None, "block", "mlp"])
def test_generated_code_gives_the_same_loss_and_gradients(tiny, checkpointing):
    model = make(tiny)
    model.gradient_checkpointing = checkpointing
    assert_same(model, SIZES, "inductor")


@needs_compiler
def test_bfloat16_gradients_are_about_as_exact_as_eager_ones(tiny):
    """Both round, so both are compared with float32."""
    _, _, exact = backward(make(tiny), SIZES)
    eager = make(tiny, torch.bfloat16)
    compiled = make(tiny, torch.bfloat16)
    compiled.compile_layers()

    def error(model):
        _, _, grads = backward(model, SIZES)
        return torch.stack([(a - b).norm() / b.norm() for a, b in zip(grads, exact, strict=True)])
    assert (error(compiled) < 1.5 * error(eager) + 1e-3).all()


@pytest.mark.parametrize("lora", [False, True])
def test_two_programs_for_all_layers_and_lengths(tiny, lora):
    """Before and after the attention; two more without gradients, as in evaluation."""
    model = make(tiny)
    if lora:
        add_lora(model)
    model.compile_layers("aot_eager")
    for at in range(1, len(SIZES) + 1):
        backward(model, SIZES[:at])
        # The input of a frozen model's first layer needs no gradient.
        assert counters["stats"]["unique_graphs"] == (4 if lora else 2)
    for at in range(1, len(SIZES) + 1):
        with torch.no_grad():
            batch = collate([sides(size) for size in SIZES[:at]])
            compute_loss(model, replace(batch, ref_logps=torch.zeros(2 * at)), CFG)
        assert counters["stats"]["unique_graphs"] == (6 if lora else 4)
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.parametrize("backend, settings", [
    ("inductor", {}), ("aot_eager", {"use_peft": True, "precompute_ref_log_probs": False})])
def test_a_compiled_run_trains_to_the_same_weights(tiny, tmp_path, monkeypatch, backend, settings):
    """Also when it is resumed."""
    monkeypatch.setattr(Decoder.compile_layers, "__defaults__", (backend,))
    rows = write_rows(tmp_path / "pairs.jsonl", [pair(i, i % 7 + 1, (i * 3) % 11) for i in range(7)])

    def run(name, **changes):
        dpo.main(DPOConfig(str(tiny), [str(rows)], str(tmp_path / name), **{
            "dtype": "float32", "device": "cpu", "max_length": 256, "logging_steps": 1, "max_steps": 4,
            "learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_steps": 2,
            **settings, **changes}))
        return metrics(tmp_path / name)
    plain = run("plain")
    run("compiled", torch_compile=True, max_steps=2)
    torch.compiler.reset()
    compiled = run("compiled", torch_compile=True)
    assert compiled[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for a, b in zip(plain, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@needs_compiler
def test_a_missing_compiler_is_named(monkeypatch):
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="no C\\+\\+ compiler no-such-compiler"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
