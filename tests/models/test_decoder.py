"""Every family against transformers: full, padded, packed, and token by token through the cache."""

import json
import shutil

import pytest
import torch
from families import COMMON, FAMILIES
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint

from srit.models import KVCache, ModelConfig, load_model, save_model
from srit.runtime.files import InputError

transformers = pytest.importorskip("transformers")

T = 19


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(directory written by transformers, their model, ours)."""
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # biases and norms start at constants; make them matter
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return directory, theirs, load_model(str(directory))[0]


@pytest.fixture
def ids():
    return torch.randint(3, 131, (3, T))


def close(a, b):
    assert (a - b).abs().max() <= 1e-4, (a - b).abs().max()


@torch.no_grad()
def test_logits(family, ids):
    _, theirs, ours = family
    close(ours(ids), theirs(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_d8_padding(family, ids, side):
    _, theirs, ours = family
    mask = torch.ones_like(ids)
    for row, length in enumerate((T, 11, 4)):
        mask[row, : T - length] = 0
    if side == "right":
        mask = mask.flip(1)
    logits = ours(ids, attention_mask=mask)
    assert torch.isfinite(logits).all()
    for row in range(3):
        real = mask[row].bool()
        close(logits[row][real], theirs(ids[row][real][None]).logits[0])


@torch.no_grad()
def test_b12_packing(family, ids):
    _, theirs, ours = family
    lengths = (T, 1, 12)
    rows = [ids[i, :n] for i, n in enumerate(lengths)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = ours(torch.cat(rows)[None], cu_seqlens=bounds)[0].split(lengths)
    for row, logits in zip(rows, packed, strict=True):
        close(logits, theirs(row[None]).logits[0])


@torch.no_grad()
def test_branches_of_one_prefix(family, ids):
    """Segments that continue another one, in and out of the sliding window, beside strangers."""
    _, theirs, ours = family
    prefix, ends = ids[0, :9], [ids[1, :7], ids[2, :1], ids[0, 9:T]]
    alone = ids[1, :5]
    segments = [alone, prefix, *ends]
    lengths = [len(x) for x in segments]
    positions = [torch.arange(5), torch.arange(9), *(9 + torch.arange(n) for n in lengths[2:])]
    packed = ours(torch.cat(segments)[None], positions=torch.cat(positions)[None],
                  cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
                  parents=torch.tensor([-1, -1, 1, 1, 1]))[0].split(lengths)
    close(packed[0], theirs(alone[None]).logits[0])
    for end, logits in zip(ends, packed[2:], strict=True):
        truth = theirs(torch.cat([prefix, end])[None]).logits[0]
        close(packed[1], truth[:9])
        close(logits, truth[9:])


@torch.no_grad()
def test_cache_token_by_token(family, ids):
    _, theirs, ours = family
    truth = theirs(ids).logits
    cache = KVCache(ours.config, 3, T)
    close(torch.cat([ours(ids[:, t : t + 1], cache=cache) for t in range(T)], 1), truth)
    cache = KVCache(ours.config, 5, T + 3)  # prefill, then two at a time, in chosen slots
    rows = torch.tensor([4, 0, 2])
    parts = [ours(ids[:, :9], cache=cache, rows=rows)]
    parts += [ours(ids[:, t : t + 2], cache=cache, rows=rows) for t in range(9, T, 2)]
    close(torch.cat(parts, 1), truth)
    assert cache.lengths.tolist() == [T, 0, T, 0, T]


@torch.no_grad()
def test_cache_slots_of_different_lengths(family, ids):
    """Prompts padded on the right: what lies beyond a row's length is never seen."""
    _, theirs, ours = family
    cache = KVCache(ours.config, 3, T)
    ours(ids[:, :10], cache=cache)
    cache.lengths.copy_(torch.tensor([10, 6, 3]))
    logits = ours(ids[:, 10:11], cache=cache)
    for row, length in enumerate((10, 6, 3)):
        whole = torch.cat([ids[row, :length], ids[row, 10:11]])
        close(logits[row, 0], theirs(whole[None]).logits[0, -1])


@torch.no_grad()
def test_forward_does_not_depend_on_recording_gradients(family, ids):
    _, _, ours = family
    with torch.enable_grad():
        recorded = ours(ids)
    assert recorded.requires_grad and torch.equal(recorded, ours(ids))


def test_gradient_checkpointing_changes_no_gradient(family, ids):
    _, _, ours = family
    grads = []
    for recompute in (None, "mlp", "block"):
        ours.train()
        ours.gradient_checkpointing = recompute
        ours.zero_grad()
        ours(ids).square().mean().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    ours.gradient_checkpointing = None
    ours.eval()
    for same in zip(*grads, strict=True):
        assert all(torch.equal(same[0], other) for other in same[1:])


def test_c10_saved_and_read_back_by_both(family, ids, tmp_path):
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


def test_bf16_compute_over_fp32_weights(family, ids):
    """A20: activations bfloat16, weights and their gradients float32, logits float32."""
    directory, theirs, _ = family
    ours, _ = load_model(str(directory), compute_dtype=torch.bfloat16)
    assert ours.hidden(ids).dtype == torch.bfloat16
    logits = ours(ids)
    assert logits.dtype == torch.float32
    logits.mean().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    truth = theirs(ids).logits
    assert (logits - truth).norm() / truth.norm() < 0.05


def test_sharded_checkpoint(family, ids, tmp_path):
    directory, theirs, _ = family
    shutil.copy(directory / "config.json", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    where = {}
    for part, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({n: tensors[n] for n in names}, tmp_path / f"part{part}.safetensors")
        where |= {n: f"part{part}.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with torch.no_grad():
        close(load_model(str(tmp_path))[0](ids), theirs(ids).logits)
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(InputError, match="shard part1.safetensors is missing"):
        load_model(str(tmp_path))


@pytest.fixture
def broken(family, tmp_path):
    """A copy to break, and a function that loads it."""
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
def test_models_that_are_not_there(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_a_shard_outside_the_directory_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, "model_type": "llama"}))
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lies outside the directory"):
        load_model(str(tmp_path))


def test_gemma3_inside_a_multimodal_config():
    text = {**COMMON, "model_type": "gemma3_text", "head_dim": 16}
    config = ModelConfig.from_dict({"model_type": "gemma3", "text_config": text})
    assert config.is_gemma and config.to_dict()["architectures"] == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize("tied", [True, False])
def test_gguf(tmp_path, tied):
    """A llama written as GGUF, with q and k rows interleaved as llama.cpp wants them."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**COMMON, "tie_word_embeddings": tied,
                                         "rope_parameters": {"rope_type": "default",
                                                             "rope_theta": 5000.0}})
    theirs = transformers.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(80)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if ".q_proj." in name or ".k_proj." in name:
            heads = 4 if ".q_proj." in name else 2
            tensor = tensor.view(heads, 2, -1, 48).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)),
                          tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, config = load_model(str(tmp_path / "m.gguf"))
    ids = torch.randint(3, 131, (2, 9))
    with torch.no_grad():
        close(ours(ids), theirs(ids).logits)
    assert config.tie_word_embeddings == tied
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:500])
    with pytest.raises(InputError, match="damaged or not GGUF"):
        load_model(str(tmp_path / "cut.gguf"))


def test_packed_weights_give_the_same_logits_and_leave_one_copy(tmp_path):
    for overrides in ({}, {"attention_bias": True}, {"tie_word_embeddings": False}):
        model, config = load_model(str(tiny_checkpoint(tmp_path / str(overrides), **overrides)))
        ids = torch.randint(config.vocab_size, (2, 9))
        with torch.inference_mode():
            want = model(ids)
            model.pack_weights()
            torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        assert model.model.layers[0].mlp.up_proj.weight is None
