"""Weights packed for oneDNN: the same results, and rows that do not depend on each other."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_checkpoint

from srit.models import load_model
from srit.models.onednn import PackedLinear, can_pack


@pytest.mark.parametrize("then", ["none", "swish", "add", "mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out,size", [(16, 8), (97, 33), (192, 64), (40, 24)])
def test_a_row_of_a_packed_product_does_not_depend_on_other_rows(out, size, dtype, then):
    if not can_pack(dtype):
        pytest.skip("oneDNN has no products of bfloat16 on this CPU")
    weight, bias, x, other = (torch.randn(*s).to(dtype)
                              for s in ((out, size), (out,), (128, size), (128, out)))
    packed = PackedLinear(weight, bias)

    def product(rows):
        if then in ("add", "mul"):
            return packed.binary(x[None, rows], then, other[None, rows])[0]
        return packed(x[None, rows], then)[0]

    plain = F.linear(x.double(), weight.double(), bias.double())
    want = {"none": plain, "swish": F.silu(plain), "add": plain + other, "mul": plain * other}[then]
    got = product(slice(None))
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()
    alone = torch.cat([product(slice(i, i + 8)) for i in range(0, 128, 8)])
    shuffled = torch.randperm(128)
    for rows in (torch.arange(24), torch.arange(40, 96), shuffled, shuffled[:64]):
        assert torch.equal(product(rows), alone[rows])


def test_packed_weights_give_the_same_logits_and_leave_one_copy(tmp_path):
    for overrides in ({}, {"attention_bias": True}, {"tie_word_embeddings": False}):
        model, config = load_model(str(tiny_checkpoint(tmp_path / str(overrides), **overrides)))
        ids = torch.randint(config.vocab_size, (2, 9))
        with torch.inference_mode():
            want = model(ids)
            model.pack_weights()
            torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        assert model.model.layers[0].mlp.up_proj.weight is None
