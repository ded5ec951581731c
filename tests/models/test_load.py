"""Checkpoints in and out; damaged ones raise an error that names the damage."""

import json
import os
import shutil

import pytest
import torch
from families import COMMON
from safetensors.torch import load_file, save_file

from srit.models import ModelConfig, load_model, save_model
from srit.runtime.files import InputError


def test_a_saved_model_is_read_back_by_transformers(family, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    directory, theirs, ours = family
    save_model(ours, ours.config, tmp_path)
    before, after = load_file(directory / "model.safetensors"), load_file(
        tmp_path / "model.safetensors")
    assert {k: v for k, v in before.items() if k in after}.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in after)
    assert ("lm_head.weight" in after) == (not ours.config.tie_word_embeddings)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)


def test_a_checkpoint_in_shards_is_read(family, ids, tmp_path):
    directory, theirs, _ = family
    shutil.copy(directory / "config.json", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    where = {}
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({n: tensors[n] for n in names}, tmp_path / f"part{part}.safetensors")
        where |= {n: f"part{part}.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path))[0](ids), theirs(ids).logits, rtol=0,
                                   atol=1e-4)
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(InputError, match="shard part1.safetensors is missing"):
        load_model(str(tmp_path))


@pytest.fixture
def broken(family, tmp_path):
    """A copy to damage."""
    shutil.copytree(family[0], tmp_path / "m")
    return tmp_path / "m"


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", ["llama3"], indirect=True)
@pytest.mark.parametrize("damage,message", [
    (lambda d: edit_config(d, model_type="mamba"), "model_type 'mamba' is not supported"),
    (lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}),
     "rope type 'yarn' is not supported"),
    (lambda d: edit_config(d, hidden_act="relu"), "activation 'relu'"),
    (lambda d: edit_config(d, vocab_size=None), "vocab_size must be an integer from 1"),
    (lambda d: edit_config(d, num_hidden_layers=4), r"missing tensor model\.layers\.3"),
    (lambda d: edit_config(d, num_hidden_layers=2), r"unexpected tensor model\.layers\.2"),
    (lambda d: edit_config(d, intermediate_size=81),
     r"gate_proj\.weight has shape \(80, 48\), the config asks for \(81, 48\)"),
    (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda d: (d / "config.json").unlink(), "no such file"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-100]), "damaged or not safetensors"),
    (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 64), "damaged or not safetensors"),
])
def test_damaged_checkpoints_are_named(broken, damage, message):
    damage(broken)
    with pytest.raises(InputError, match=message):
        load_model(str(broken))


@pytest.mark.parametrize("name,message", [
    ("/nowhere/at/all", "neither a model directory nor a .gguf file"),
    ("package:no_such_package/x.gguf", "no package 'no_such_package'"),
    ("package:../x/y", "no package"),
])
def test_a_model_that_is_not_there_is_named(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_a_shard_outside_the_directory_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, "model_type": "llama"}))
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lies outside the directory"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("weight_map", [
    None, [], {"a": 5}, {"a": ["x"]}, {"a": None, "b": "x"}, {"a": ""}, {"a": "config.json"}])
def test_an_index_of_other_types_is_refused(tmp_path, weight_map):
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, "model_type": "llama"}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="weight_map must be|is missing|not safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["llama3"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_weights_without_their_scales_are_refused(broken, dtype):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InputError, match=rf"model\.norm\.weight has dtype {dtype}; quantised"):
        load_model(str(broken))


@pytest.mark.parametrize("family", ["llama3"], indirect=True)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_directory_in_place_of_a_file_is_refused_at_once(broken, name, make):
    (broken / name).unlink(missing_ok=True)
    (broken / "model.safetensors").unlink()
    make(broken / name)
    with pytest.raises(InputError, match="not a regular file|no model.safetensors"):
        load_model(str(broken))


def test_gemma3_is_read_from_a_multimodal_config():
    text = {**COMMON, "model_type": "gemma3_text", "head_dim": 16}
    config = ModelConfig.from_dict({"model_type": "gemma3", "text_config": text})
    assert config.is_gemma and config.to_dict()["architectures"] == ["Gemma3ForCausalLM"]
