"""A decode step over pages, by the PyTorch twin and the Triton kernel, against plain attention."""

import pytest
import torch

from srit.models import KVCache, ModelConfig
from srit.models.paged_cache import PagedCache

F32, BF16 = torch.float32, torch.bfloat16
GPU = torch.cuda.is_available()
# (heads, key/value heads, head size), window, dtype
CASES = [((4, 2, 8), None, F32), ((3, 1, 24), 40, F32), ((2, 2, 16), 5, BF16), ((6, 2, 16), None, BF16)]


def make_config(heads: int, kv_heads: int, size: int, window: int | None) -> ModelConfig:
    kind = "llama" if window is None else "mistral"
    return ModelConfig.from_dict({
        "architectures": [f"{kind.capitalize()}ForCausalLM"], "model_type": kind, "vocab_size": 16,
        "hidden_size": heads * size, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True, "hidden_act": "silu", "sliding_window": window})


def truth(q, keys, values, window):
    """q (H, hd) over keys and values (K, T, hd) of all tokens seen, in float64."""
    group = len(q) // len(keys)
    keys, values = (x[:, -(window or 10**6):].double().repeat_interleave(group, 0)
                    for x in (keys, values))
    scores = torch.einsum("hd,htd->ht", q.double(), keys) * q.shape[-1] ** -0.5
    return torch.einsum("ht,htd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("shape, window, dtype", CASES, ids=str)
def test_a_step_is_attention_over_the_tokens_of_the_row(monkeypatch, kernels, shape, window, dtype):
    monkeypatch.setenv("SRIT_KERNELS", kernels)
    device = "cuda" if GPU and kernels == "triton" else "cpu"
    heads, kv_heads, size = shape
    config = make_config(*shape, window)
    assert config.windows == (window,)
    cache = PagedCache(config, 40, 8, 3, dtype, device)
    for pool in cache.keys + cache.values:
        pool.fill_(100.0)  # reading an unwritten position shows in the result
    expected = []  # keys and values of every row
    for length, readers in ((33, 3), (0, 1), (70, 2)):
        source = KVCache(config, 1, max(length, 1), dtype, device)
        source.keys[0].normal_(), source.values[0].normal_()
        prompt = cache.add_prompt(source, 0, length)
        for _ in range(readers):
            cache.add_row(prompt)
            expected.append([source.keys[0][0, :, :length], source.values[0][0, :, :length]])
    eps = 16 * torch.finfo(dtype).eps
    for turn in range(35):
        if turn == 20:  # the last row moves into its slot
            cache.remove_row(1)
            expected[1] = expected.pop()
        cache.allocate()
        step = cache.begin(8)
        q = torch.randn(8, heads, size).to(device, dtype)
        k, v = torch.randn(2, 8, kv_heads, size).to(device, dtype)
        out = cache.attend(q, k, v, step, 0, window, size**-0.5)
        assert (step.table.inverse is None) == (kernels == "triton")
        cache.advance(8, 1)
        for row, kept in enumerate(expected):
            kept[0] = torch.cat([kept[0], k[row, :, None]], 1)
            kept[1] = torch.cat([kept[1], v[row, :, None]], 1)
            want = truth(q[row], *kept, window)
            assert (out[row].double() - want).norm() <= eps * want.norm(), (turn, row)
