"""--quantization int8 of sample and eval."""

import pytest
import torch
from tiny import question, skip_without_int8, tiny_checkpoint, write_rows

from srit.config import EvalConfig, SampleConfig
from srit.runtime.files import InputError
from srit.train import sample


def settings(world, output, **changes):
    return {"model_name_or_path": str(world / "m"), "output_dir": str(world / output), "device": "cpu",
            "max_new_tokens": 12, **changes}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantization")
    tiny_checkpoint(root / "m", scale=2.0)
    write_rows(root / "q.jsonl", [question(i, i + 2, 3) for i in range(5)])
    return root


def samples(world, output, **changes):
    cfg = SampleConfig(train_file=[str(world / "q.jsonl")], **settings(world, output, **changes))
    sample.main(cfg)
    return (world / output / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_do_not_depend_on_the_batch_and_a_run_keeps_its_quantization(world, dtype):
    skip_without_int8(getattr(torch, dtype))
    quantized = {"dtype": dtype, "quantization": "int8"}
    int8 = samples(world, dtype, **quantized)
    assert samples(world, f"{dtype}-3", per_device_batch_size=3, **quantized) == int8
    with pytest.raises(InputError, match="quantization"):
        samples(world, dtype, dtype=dtype)
    assert samples(world, f"{dtype}-none", dtype=dtype) != int8


def test_vllm_refuses_it(world):
    for cls, files in ((SampleConfig, "train_file"), (EvalConfig, "eval_file")):
        with pytest.raises(InputError, match="--engine vllm: must be srit with --quantization int8"):
            cls(**settings(world, "o", quantization="int8", engine="vllm", **{files: ["q"]}))
