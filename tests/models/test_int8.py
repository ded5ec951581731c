"""Products in int8: exact for what was quantized, and each row alone."""

import pytest
import torch
from tiny import tiny_checkpoint

from srit.models import int8, load_model
from srit.models.int8 import Int8Linear, check_int8, exact_products, quantize_normed, quantize_rows
from srit.runtime.files import InputError

needs_int8 = pytest.mark.skipif(not exact_products(), reason="no exact int8 products on this CPU")
SIZES = [(16, 8), (97, 33), (1, 5), (192, 64), (40, 1536)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_its_own_scale_and_errs_by_half_a_step(dtype):
    x = torch.randn(7, 33)
    x[1] = 0
    x[2, 5] = 1e4  # an outlier
    x[3] *= 1e-20
    x[4] *= 1e25
    x[5] = -x[5].abs()
    x = x.to(dtype)
    values, scales = quantize_rows(x)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32 and (scales > 0).all()
    error = (values.double() * scales.double() - x.double()).abs()
    assert (error <= 0.5001 * scales).all()
    largest = values.abs().amax(-1)
    assert largest[1] == 0 and (largest[x.any(-1)] == 127).all()
    for i in range(7):
        alone = quantize_rows(x[i])
        assert torch.equal(alone.values, values[i]) and torch.equal(alone.scales, scales[i])


@needs_int8
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("out, size", SIZES)
def test_it_is_the_product_of_the_quantized_tensors(out, size, biased):
    weight, x = torch.randn(out, size), torch.randn(5, 3, size)
    weight[0], x[0, 0] = 127, 127  # the largest sum, beyond the integers of float32
    weight[out // 2], x[1, 1] = 0, 0
    weight[-1, 0], x[2, 2, 0] = 300, -300
    bias = torch.randn(out) if biased else None
    (w, w_scales), (q, scales) = quantize_rows(weight), quantize_rows(x)
    plain = (q.double() @ w.double().t()) * scales.double() * w_scales[:, 0].double()
    want = plain if bias is None else plain + bias
    layer, other = Int8Linear(weight, bias), torch.randn(5, 3, out)
    for got, more in ((layer(x), 0), (layer(quantize_rows(x)), 0),
                      (layer.binary(x, "add", other), other)):
        bound = plain.abs() + (want + more).abs() + want.abs()
        assert got.dtype == torch.float32
        assert ((got - (want + more)).abs() <= 3 * torch.finfo(torch.float32).eps * bound).all()
    in_bf16 = Int8Linear(weight.bfloat16(), bias)(x)
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), Int8Linear(weight.bfloat16().float(), bias)(x),
                               rtol=2**-8, atol=0)


@needs_int8
@pytest.mark.parametrize("out, size", [*SIZES, (576, 64)])
def test_a_row_depends_neither_on_the_others_nor_on_how_many_they_are(out, size):
    layer, x = Int8Linear(torch.randn(out, size)), torch.randn(130, 1, size)
    whole = layer(x)
    for rows in range(1, 131):
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
    order = torch.randperm(130)
    assert torch.equal(layer(x[order]), whole[order])
    assert torch.equal(layer(x.transpose(0, 1)), whole.transpose(0, 1))  # as a prompt is prefilled


@needs_int8
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_so_and_stays_alone(bad):
    layer, x = Int8Linear(torch.randn(16, 8)), torch.randn(3, 8)
    want = layer(x)
    x[1, 4] = bad
    got = layer(x)
    assert torch.equal(got[::2], want[::2]) and not got[1].isfinite().any()


def int8_logits(model, ids):
    model.pack_weights("int8")
    with torch.no_grad():
        return model(ids)


def test_a_norm_and_its_quantization_are_one(family):
    model, x = family[2], torch.randn(4, 1, 48)
    for block in model.model.layers:
        with torch.no_grad():
            want = block.input_layernorm(x)
            values, scales = quantize_normed(block.input_layernorm, x)
        assert ((values * scales - want).abs() <= 0.5001 * scales).all()


@needs_int8
def test_a_model_is_the_one_whose_weights_and_activations_are_rounded(family, ids):
    """A twin without packed weights, in which every product of a block rounds what it reads."""
    model, twin = load_model(str(family[0]))[0], load_model(str(family[0]))[0]
    twin.requires_grad_(False)
    int8.smooth(twin)

    def rounded(x):
        values, scales = quantize_rows(x)
        return values * scales

    for layer in twin.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.copy_(rounded(layer.weight))
            layer.register_forward_pre_hook(lambda layer, args: rounded(args[0]))
    with torch.no_grad():
        full, want = model(ids), twin(ids)
    got = int8_logits(model, ids)
    # Not equal: what lies half-way between two integers may be rounded either way.
    assert (got - want).norm() < 0.25 * (full - want).norm()
    assert model.model.layers[0].mlp.up_proj.weight is None


def test_smoothing_keeps_the_model(family, ids):
    model = load_model(str(family[0]))[0]
    with torch.no_grad():
        before = model(ids)
        int8.smooth(model)
        after = model(ids)
    if model.config.is_gemma:  # its norms hold w - 1, which rounds
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


@needs_int8
def test_an_outlier_channel_behind_a_norm_costs_nothing(tmp_path):
    """A channel that is 2^8 times as large, of weights 2^8 times as small, is smoothed away."""
    directory, ids = str(tiny_checkpoint(tmp_path / "m", scale=2.0)), torch.randint(3, 300, (2, 9))
    model, outlier = load_model(directory)[0], load_model(directory)[0]
    with torch.no_grad():
        for block in outlier.model.layers:
            block.input_layernorm.weight[3] *= 2.0**8
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                layer.weight[:, 3] *= 2.0**-8
            block.post_attention_layernorm.weight[5] *= 2.0**8
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[:, 5] *= 2.0**-8
    assert torch.equal(int8_logits(outlier, ids), int8_logits(model, ids))


def test_where_it_cannot_be_it_says_so(tmp_path, monkeypatch):
    model = load_model(str(tiny_checkpoint(tmp_path / "m")))[0]
    with pytest.raises(InputError, match="--quantization int8 on cuda: it is for CPUs; leave it out"):
        check_int8(torch.device("cuda"), torch.float32)
    product = Int8Linear.product
    monkeypatch.setattr(Int8Linear, "product", lambda self, x: product(self, x).clamp(max=2.0**15))
    with pytest.raises(InputError, match="no exact int8 products .* leave it out"):
        model.pack_weights("int8")
    monkeypatch.setattr(int8, "exact_products", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(InputError, match="does not multiply bfloat16, as the head does; use --dtype"):
        load_model(str(tmp_path / "m"), dtype=torch.bfloat16)[0].pack_weights("int8")
    assert model.packed_head is None and model.model.layers[0].mlp.up_proj.weight is not None
