"""`srit convert`: what comes out, and where it refuses to write."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import demo, tiny_checkpoint, write_rows

from srit.commands import convert
from srit.commands.config import ConvertConfig
from srit.config import SFTConfig
from srit.models import load_model
from srit.runtime.files import InputError
from srit.train import sft


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "M")


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run with a checkpoint and an adapter."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", [demo(i, i + 1, 2) for i in range(4)])
    sft.main(SFTConfig(str(tiny), [str(rows)], str(folder / "out"), dtype="float32", device="cpu",
                       max_length=256, max_steps=2, save_steps=2, learning_rate=0.05, use_peft=True))
    return folder / "out"


def test_an_adapter_and_a_checkpoint_become_the_model_of_the_run(tiny, run, tmp_path):
    convert.main(ConvertConfig(str(tiny), str(tmp_path / "a"), adapter=str(run / "adapter")))
    convert.main(ConvertConfig(str(run), str(tmp_path / "b"), dtype="bfloat16"))
    trained = load_file(run / "model.safetensors")
    merged, rounded = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    before = load_file(tiny / "model.safetensors")
    assert any(not torch.equal(before[name], trained[name]) for name in trained)
    for name, value in trained.items():
        torch.testing.assert_close(merged[name], value)
        assert torch.equal(rounded[name], value.bfloat16())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        ".lock", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


def test_it_writes_to_a_new_or_an_empty_directory_only(tiny, run, tmp_path):
    """Not over its input, not into a run, not beside shards that an old index names."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.safetensors.index.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(tiny)
    for place in (tiny, run, old, link):
        before = content(place)
        with pytest.raises(InputError, match=f"{place} holds .*a new or an empty directory only"):
            convert.main(ConvertConfig(str(tiny), str(place)))
        assert content(place) == before


def test_it_writes_nothing_into_an_input(tiny, run, tmp_path):
    """A stranger in a checkpoint would make it a damaged one."""
    inside = run / "checkpoint-2" / "hf"
    with pytest.raises(InputError, match="checkpoint-2, which is an input"):
        convert.main(ConvertConfig(str(tiny), str(inside), str(run / "checkpoint-2")))
    with pytest.raises(InputError, match="adapter, which is an input"):
        convert.main(ConvertConfig(str(tiny), str(run / "adapter" / "hf"), str(run / "adapter")))
    assert not inside.exists() and not (run / "adapter" / "hf").exists()


def test_a_conversion_has_the_directory_to_itself(tiny, tmp_path):
    code = ("import sys, time; from pathlib import Path; from srit.runtime.lock import lock; "
            f"held = lock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {other.pid} on "):
        convert.main(ConvertConfig(str(tiny), str(tmp_path)))
    other.kill()
    other.communicate()
    convert.main(ConvertConfig(str(tiny), str(tmp_path)))


def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(tiny, tmp_path):
    """No file may grow beyond a limit, which the kernel enforces as it does a full disk."""
    out = tmp_path / "out"
    killed = out / ".convert.tmp"  # what a killed one left
    killed.mkdir(parents=True)
    (killed / "model-00001-of-00002.safetensors").write_text("half")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors: .*File too large"):
            convert.main(ConvertConfig(str(tiny), str(out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(out) == [".lock"]
    convert.main(ConvertConfig(str(tiny), str(out)))
    assert load_model(out)[1].vocab_size == 320 and not killed.exists()
    assert "model-00001-of-00002.safetensors" not in os.listdir(out)


def test_weights_that_the_dtype_cannot_hold_are_refused(tiny, tmp_path):
    big = tiny_checkpoint(tmp_path / "big")
    tensors = load_file(big / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000.0
    save_file(tensors, big / "model.safetensors")
    with pytest.raises(InputError, match="model.norm.weight is not finite in float16: .*bfloat16"):
        convert.main(ConvertConfig(str(big), str(tmp_path / "out"), dtype="float16"))
    assert not (tmp_path / "out").exists()
    convert.main(ConvertConfig(str(big), str(tmp_path / "out"), dtype="bfloat16"))


def test_a_hub_snapshot_whose_blob_is_gone_is_named(tiny, tmp_path):
    """Its chat template would otherwise be left out in silence."""
    snapshot = tiny_checkpoint(tmp_path / "snapshot")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/9f3b")
    with pytest.raises(InputError, match="chat_template.jinja: a link to ../../blobs/9f3b, which does"):
        convert.main(ConvertConfig(str(snapshot), str(tmp_path / "out")))


def test_a_flipped_bit_of_a_checkpoint_or_an_adapter_is_noticed(tiny, run, tmp_path):
    for name, file in (("checkpoint-2", "config.json"), ("adapter", "adapter_model.safetensors")):
        copy = shutil.copytree(run / name, tmp_path / name)
        data = bytearray((copy / file).read_bytes())
        data[-1] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: {file} is damaged"):
            convert.main(ConvertConfig(str(tiny), str(tmp_path / "out"), str(copy)))
    assert not (tmp_path / "out").exists()
