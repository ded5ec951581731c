"""Several processes are one: losses, gradients and weights, replicated (ddp) or sharded (fsdp)."""

import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from forks import generate_no_code, run_ranks
from safetensors.torch import load_file
from tiny import demo, metrics, pair, tiny_checkpoint, write_rows

from srit.models import load_model

# Unequal lengths; 13 and 7 rows in global batches of 4: the last step leaves ranks without a row.
ROWS = {"sft": [demo(i, i % 7 + 1, (i * 3) % 11) for i in range(13)],
        "dpo": [pair(i, i % 7 + 1, (i * 3) % 11) for i in range(7)]}
# A large epsilon: else Adam makes a whole step of a gradient of 1e-12, whose sign is chance.
SETTINGS = {"dtype": "float32", "device": "cpu", "max_length": 256, "logging_steps": 1,
            "learning_rate": 1e-3, "warmup_ratio": 0.0, "adam_epsilon": 1e-3,
            "lr_scheduler_type": "constant"}
KEYS = {"sft": ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens", "eval_loss"),
        "dpo": ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "grad_norm",
                "num_tokens", "eval_loss")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "tiny", scale=2.0)
    for stage, rows in ROWS.items():
        write_rows(folder / f"{stage}.jsonl", rows)
        write_rows(folder / f"{stage}-eval.jsonl", rows[:5])
    return folder


def train(files, stage, output_dir, ranks, torchrun=False, prepare=None, **settings):
    """Run a stage in `ranks` processes; 4 rows or pairs to an optimizer step."""
    settings = {**SETTINGS, "max_steps": 5, "eval_steps": 5, "per_device_train_batch_size": 4 // ranks,
                "eval_file": files / f"{stage}-eval.jsonl", "load_best_model_at_end": False,
                **settings}
    settings |= {"model_name_or_path": files / "tiny", "train_file": files / f"{stage}.jsonl",
                 "output_dir": output_dir}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    if torchrun:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node", str(ranks), "-m", f"srit.train.{stage}", *words],
                              capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
    else:
        run_ranks(stage, words, ranks, f"{tempfile.mkdtemp(dir=files)}/rank", prepare)
    return output_dir


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    """The same steps in one process, by stage and adapter."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def get(stage, **settings):
        key = stage, *settings.items()
        if key not in known:
            known[key] = train(files, stage, folder / str(len(known)), 1, **settings)
        return known[key]
    return get


def assert_same_run(stage, one, many, tolerance=1e-6):
    assert len(metrics(one)) == len(metrics(many))
    for a, b in zip(metrics(one), metrics(many), strict=True):
        for name in a.keys() & set(KEYS[stage]):
            allowed = 1e-7
            if name.startswith("rewards/"):
                # A difference of log-probs times beta: what those may differ by, it may, however small.
                allowed = tolerance * 0.1 * (abs(a["logps/chosen"]) + abs(a["logps/rejected"]))
            assert a.get(name) == pytest.approx(b.get(name), rel=tolerance, abs=allowed), name
    assert_same_weights(one, many, tolerance)


def assert_same_weights(one, many, tolerance=1e-6):
    a, b = (load_file(d / "model.safetensors") for d in (one, many))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * a[name].norm(), name


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("parallel,ranks", [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_n_ranks_are_one(files, one_process, tmp_path, stage, parallel, ranks):
    many = train(files, stage, tmp_path / "many", ranks, parallel=parallel)
    assert_same_run(stage, one_process(stage), many)


@pytest.mark.parametrize("stage,parallel,ranks", [("sft", "ddp", 2), ("dpo", "fsdp", 4)])
def test_an_adapter_on_many_ranks(files, one_process, tmp_path, stage, parallel, ranks):
    """Three rows of A leave the fourth rank nothing to hold; it holds on through a restart too."""
    settings = {"use_peft": True, "lora_r": 3, "learning_rate": 1e-2}
    one = one_process(stage, **settings)
    out = train(files, stage, tmp_path / "many", ranks, parallel=parallel, max_steps=3, save_steps=3,
                **settings)
    train(files, stage, out, ranks, parallel=parallel, **settings)
    assert_same_run(stage, one, out)
    a, b = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (one, out))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_accumulation_checkpointing_and_the_adapter_as_reference_when_sharded(files, one_process,
                                                                             tmp_path):
    """Two passes a step and rank, blocks recomputed, the reference from the same sharded weights."""
    settings = {"use_peft": True, "precompute_ref_log_probs": False, "learning_rate": 1e-2}
    one = one_process("dpo", **settings)
    two = train(files, "dpo", tmp_path / "two", 2, parallel="fsdp", per_device_train_batch_size=1,
                gradient_accumulation_steps=2, gradient_checkpointing=True, **settings)
    assert_same_run("dpo", one, two)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_of_a_sharded_model(files, one_process, tmp_path):
    """The generated code is that of one rank (tests/models/test_compile.py)."""
    two = train(files, "dpo", tmp_path / "two", 2, parallel="fsdp", torch_compile=True,
                gradient_checkpointing=True, prepare=generate_no_code)
    assert_same_run("dpo", one_process("dpo"), two, tolerance=1e-4)


def test_bfloat16_sharded_follows_bfloat16_replicated(files, tmp_path):
    a, b = (train(files, "sft", tmp_path / parallel, 2, parallel=parallel, dtype="bfloat16")
            for parallel in ("ddp", "fsdp"))
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-2)


@pytest.mark.parametrize("parallel,first,then", [("fsdp", 2, 1), ("ddp", 1, 2), ("fsdp", 1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(files, one_process, tmp_path, parallel, first,
                                                    then):
    """Stopped at step 3 of 5, at a checkpoint that all ranks wrote a part of."""
    out = tmp_path / "out"
    mode = {ranks: parallel if ranks > 1 else "ddp" for ranks in (first, then)}
    train(files, "sft", out, first, parallel=mode[first], max_steps=3, save_steps=3,
          async_save=parallel == "fsdp")
    assert len(list((out / "checkpoint-3" / "state").glob("*.safetensors"))) == first
    train(files, "sft", out, then, parallel=mode[then])
    assert_same_weights(one_process("sft"), out)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4, 5]


def test_a_sharded_checkpoint_is_a_model(files, tmp_path):
    """load_model puts the parts of all ranks together."""
    out = train(files, "sft", tmp_path / "out", 2, torchrun=True, parallel="fsdp", max_steps=2,
                save_steps=2)
    checkpoint, config = load_model(str(out / "checkpoint-2"))
    final, _ = load_model(str(out))
    assert config.hidden_size == 32
    for (name, a), b in zip(checkpoint.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(a, b), name
