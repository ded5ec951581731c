"""Models read from GGUF files."""

import pytest
import torch
from families import COMMON

from srit.models import load_model
from srit.runtime.files import InputError


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_written_as_gguf_gives_the_same_logits(tmp_path, tied):
    """q and k rows are interleaved, as llama.cpp wants them; a cut file is named."""
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
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
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    assert config.tie_word_embeddings == tied
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:500])
    with pytest.raises(InputError, match="damaged or not GGUF"):
        load_model(str(tmp_path / "cut.gguf"))
