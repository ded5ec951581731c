"""`srit plan`: parameter counts, what autograd saves, and how many tokens fit."""

import dataclasses
import math

import pytest
import torch
from tiny import CONFIG

from srit.commands.plan import (
    GIB,
    SHAPES,
    PlanConfig,
    count_parameters,
    main,
    most_tokens,
    plan,
    read_shape,
)
from srit.models import Decoder, ModelConfig
from srit.runtime.files import InputError


@pytest.mark.parametrize("name,parameters", [
    ("SmolLM2-135M", 134_515_008), ("Llama-3.2-1B", 1_235_814_400), ("Llama-2-7B", 6_738_415_616),
    ("Llama-3.1-8B", 8_030_261_248), ("Llama-2-70B", 68_976_648_192)])
def test_published_shapes_have_their_published_size(name, parameters):
    assert count_parameters(read_shape(name), 0)[0] == parameters


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 5}, {"num_key_value_heads": 4},
                                     {"intermediate_size": 200}])
def test_saved_is_what_autograd_saves(changes):
    """Counts every storage that the forward of the blocks saves, except parameters."""
    config = ModelConfig.from_dict({**CONFIG, "hidden_size": 128, "head_dim": 32,
                                    "intermediate_size": 256, **changes})
    model, N = Decoder(config), 512
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inner = torch.autograd.graph.saved_tensors_hooks

    class Both(inner):  # the model's own hooks hide ours, so what they pack is noted too
        def __init__(self, pack, unpack):
            super().__init__(lambda t: note(p) if isinstance(p := pack(t), torch.Tensor) else p,
                             unpack)

    torch.autograd.graph.saved_tensors_hooks = Both
    try:
        with inner(note, lambda t: t):
            model.hidden(torch.randint(300, (1, N)), cu_seqlens=torch.tensor([0, 200, N]),
                         positions=torch.cat([torch.arange(200), torch.arange(N - 200)])[None])
    finally:
        torch.autograd.graph.saved_tensors_hooks = inner
    cfg = PlanConfig("x", "sft", tokens=N, dtype="float32", device="cpu")
    assert plan(config, cfg)["saved"] == pytest.approx(sum(sizes.values()), rel=0.1)


def test_sharding_divides_what_it_shards():
    config = read_shape("Llama-2-7B")
    one, eight = (plan(config, PlanConfig("x", gpus=n, parallel="fsdp")) for n in (1, 8))
    for name in ("weights", "moments", "gradients"):
        assert eight[name] == one[name] / 8
    assert one["gathered"] == 0 < eight["gathered"] < eight["weights"]
    replicated = plan(config, PlanConfig("x", gpus=8))
    assert replicated["peak"] == pytest.approx(one["peak"])
    lora = plan(config, PlanConfig("x", use_peft=True))
    assert lora["gradients"] < 0.01 * one["gradients"]
    # The frozen base is in bfloat16 and needs no cast; in float32 it is as large as ever.
    assert lora["weights"] == pytest.approx(one["weights"] / 2, rel=0.03) and lora["cast"] == 0
    wide = plan(config, PlanConfig("x", use_peft=True, dtype="float32"))
    assert wide["weights"] == pytest.approx(one["weights"], rel=0.03)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"dtype": "float32"},
                                      {"gpus": 4, "parallel": "fsdp"}])
def test_most_tokens_is_the_edge(settings):
    config = read_shape("Llama-3.2-1B")
    cfg = PlanConfig("Llama-3.2-1B", **settings)
    most = most_tokens(config, cfg)
    peaks = [plan(config, dataclasses.replace(cfg, tokens=n))["peak"] for n in (most, most + 64)]
    assert peaks[0] <= cfg.max_memory * GIB < peaks[1]
    assert most_tokens(read_shape("Llama-2-70B"), cfg) == 0


def test_the_command_says_what_to_do(capsys):
    main(PlanConfig("Llama-2-70B"))
    assert "does not fit 80 GiB; not even 64 tokens fit: use more GPUs" in capsys.readouterr().out
    main(PlanConfig("Llama-2-70B", gpus=64, parallel="fsdp", gradient_checkpointing=True))
    assert "fits 80 GiB; at most about" in capsys.readouterr().out
    with pytest.raises(InputError, match="neither a model directory"):
        main(PlanConfig("no/such/shape"))
    for settings, rule in (({"gpus": 0}, "--gpus 0: must be 1 or more"),
                           ({"lora_r": 10**20}, f"--lora_r {10**20}: must be at most"),
                           ({"max_memory": math.nan}, "--max_memory nan: must be a number")):
        with pytest.raises(InputError, match=rule):
            PlanConfig("x", **settings)
    assert set(SHAPES) >= {"SmolLM2-135M", "Llama-2-7B"}


def test_the_advice_names_no_flag_that_is_given(capsys):
    """And a Llama-2-7B with an adapter fits 24 GiB."""
    main(PlanConfig("Llama-2-7B", tokens=2048, max_memory=24, use_peft=True,
                    gradient_checkpointing=True))
    assert "fits 24 GiB" in capsys.readouterr().out
    main(PlanConfig("Llama-2-70B", max_memory=24, use_peft=True))
    assert "use more GPUs with --parallel fsdp, or --gradient_checkpointing True\n" in (
        capsys.readouterr().out)
