"""LoRA: adding and merging an adapter change no logit, and PEFT reads what is saved."""

import json
import os

import pytest
import torch
from tiny import tiny_checkpoint

from srit.models import load_model
from srit.models.load import model_files
from srit.models.lora import add_lora, disabled, load_adapter, lora_parameters, merge, save_adapter
from srit.runtime.files import InputError
from srit.text.tokenizer import load_tokenizer

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def base(tmp_path):
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def model(base):
    return load_model(str(base))[0]


def trained(model, **settings):
    """An adapter whose B is no longer zero."""
    add_lora(model, **settings)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.1)
    return model


@torch.no_grad()
def test_a_new_adapter_changes_no_bit_of_the_logits(model):
    before = model(IDS)
    add_lora(model, r=4, dropout=0.5)
    assert torch.equal(model.eval()(IDS), before)


def test_only_the_adapter_gets_gradients(model):
    trained(model, r=2)
    model(IDS).square().mean().backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    assert names and all(".lora_" in n for n in names)
    assert sum(p.requires_grad for p in model.parameters()) == len(list(lora_parameters(model)))


@torch.no_grad()
def test_disabled_is_the_base_model_only_within_the_block(model):
    before = model(IDS)
    trained(model)
    adapted = model(IDS)
    assert not torch.allclose(adapted, before)
    with pytest.raises(RuntimeError), disabled(model):
        assert torch.equal(model(IDS), before)
        raise RuntimeError
    assert torch.equal(model(IDS), adapted)


@torch.no_grad()
def test_merging_changes_no_logit_and_merging_again_changes_nothing(model):
    names = set(model.state_dict())
    adapted = trained(model, r=8, alpha=4)(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), adapted, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())
    once = model(IDS)
    merge(model)
    assert torch.equal(model(IDS), once)


@torch.no_grad()
def test_a_saved_adapter_is_loaded_into_the_base(model, base, tmp_path):
    adapted = trained(model, r=3, alpha=6, target_modules=["q_proj", "down_proj"])(IDS)
    save_adapter(model, tmp_path / "adapter", str(base))
    fresh, _ = load_model(str(base))
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(IDS), adapted)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)  # the exact base is on record
    assert config["target_modules"] == ["down_proj", "q_proj"]


def test_peft_reads_the_adapter(model, base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    adapted = trained(model, r=4)(IDS)
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_an_adapter_written_by_peft_is_read(base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "adapter")
    ours, _ = load_model(str(base))
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_no_model_and_says_how_to_make_one(model, base, tmp_path):
    save_adapter(trained(model, r=4), tmp_path / "adapter", str(base))
    command = f"srit convert --model_name_or_path {base} --adapter {tmp_path / 'adapter'} --output_dir"
    for load in (load_model, load_tokenizer, model_files):
        with pytest.raises(InputError, match=f"an adapter of {base}, not a model; .*: {command}"):
            load(str(tmp_path / "adapter"))
    edit(tmp_path / "adapter", base_model_name_or_path=None)
    with pytest.raises(InputError, match="an adapter of BASE, .* convert --model_name_or_path BASE"):
        load_model(str(tmp_path / "adapter"))


def edit(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pipe(directory):
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("damage,message", [
    (lambda d: edit(d, peft_type="IA3"), "only LORA"),
    (lambda d: edit(d, use_dora=True), "use_dora, which is not supported"),
    (lambda d: edit(d, r=7), r"has shape \(4, 32\), the model asks for \(7, 32\)"),
    (lambda d: edit(d, target_modules=["q_proj"]), "unexpected tensor"),
    (lambda d: edit(d, target_modules=["no_such"]), "no module 'no_such'"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "no readable adapter"),
    (pipe, "adapter_model.safetensors: no such file"),
    (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    (lambda d: (d / "adapter_config.json").write_text("[" * 500), "adapter_config.json: not JSON"),
    (lambda d: edit(d, r="4"), "r must be an integer, at least 1, got '4'"),
    (lambda d: edit(d, lora_alpha=10**400), "lora_alpha must be a number, at most 1e.30"),
    (lambda d: edit(d, lora_dropout=2), "lora_dropout must be from 0 to 1, got 2"),
    (lambda d: edit(d, target_modules="all-linear"), "target_modules must be a list of names"),
])
def test_damaged_adapters_are_named(model, base, tmp_path, damage, message):
    save_adapter(trained(model, r=4), tmp_path / "adapter", str(base))
    damage(tmp_path / "adapter")
    with pytest.raises(InputError, match=message):
        load_adapter(load_model(str(base))[0], tmp_path / "adapter")


@pytest.mark.parametrize("settings,message", [
    ({"r": 0}, "at least 1"), ({"target_modules": ["attn"]}, "no module 'attn'; there are")])
def test_bad_settings_are_named(model, settings, message):
    with pytest.raises(InputError, match=message):
        add_lora(model, **settings)
    add_lora(model)
    with pytest.raises(InputError, match="has an adapter already"):
        add_lora(model)
