"""A whole checkpoint in a few kilobytes: random llama, real tokenizer, chat template."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from srit.models import Decoder, ModelConfig, save_model
from srit.models.int8 import check_int8
from srit.runtime.files import InputError
from srit.text.prompts import Rendered

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "Tom has 3 apples and buys 4 more. How many apples does he have now?",
    "He has 3 + 4 = 7 apples. The answer is 7.",
    "Question: Answer the following mathematical question with numerical solution.",
    "Let's think step by step. user assistant",
]


def tiny_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def tiny_checkpoint(directory: Path, seed: int = 0, scale: float = 1.0, **changes) -> Path:
    """Write a random checkpoint; `scale` above 1 sharpens its predictions."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = ModelConfig.from_dict({**CONFIG, **changes})
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08 * scale)
            elif "norm" in name:
                parameter.fill_(1.0)
    save_model(model, config, directory)
    tiny_tokenizer(directory)
    return directory


def tiny_gguf(path: Path, alphabet: str = "ab", weight: float = 1.0) -> Path:
    """A GGUF file of a llama whose tokens are <s>, the characters of `alphabet`, and ab."""
    gguf = pytest.importorskip("gguf")
    writer, tokens = gguf.GGUFWriter(path, "llama"), ["<s>", *alphabet, "ab"]
    for add, value in ((writer.add_embedding_length, 8), (writer.add_feed_forward_length, 8),
                       (writer.add_block_count, 1), (writer.add_head_count, 2),
                       (writer.add_context_length, 512), (writer.add_layer_norm_rms_eps, 1e-5),
                       (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
                       (writer.add_token_list, tokens), (writer.add_token_merges, ["a b"]),
                       (writer.add_token_types, [3, *[1] * (len(tokens) - 1)]),
                       (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 0),
                       (writer.add_chat_template, "{{ messages[0]['content'] }}")):
        add(value)
    names = {"token_embd": (len(tokens), 8), "output_norm": (8,), "blk.0.attn_norm": (8,),
             "blk.0.ffn_norm": (8,),
             **{f"blk.0.{part}": (8, 8) for part in ("attn_q", "attn_k", "attn_v", "attn_output",
                                                     "ffn_gate", "ffn_up", "ffn_down")}}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def question(i: int, a: int, b: int) -> dict:
    return {"id": f"q{i}", "task": "math", "answer": str(a + b),
            "question": f"Tom has {a} apples and buys {b} more. How many apples now?"}


def demo(i: int, a: int, b: int) -> dict:
    return {**question(i, a, b), "teacher": "rule",
            "completion": f"He has {a} + {b} = {a + b} apples. The answer is {a + b}."}


def pair(i: int, a: int, b: int) -> dict:
    row = question(i, a, b)
    return {"id": row["id"], "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": demo(i, a, b)["completion"]}],
            "rejected": [{"role": "assistant", "content": f"{a + b + 1}"}]}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


# Prompt, chosen, rejected; common beginnings of completions; a one-token prompt and completion.
SIZES = [(20, 15, 9, 0), (7, 30, 4, 3), (1, 1, 8, 0), (33, 12, 12, 11)]


def sides(size):
    prompt, chosen, rejected, common = size
    start = torch.randint(3, 300, (prompt + common,)).tolist()
    ends = [torch.randint(3, 300, (n - common,)).tolist() for n in (chosen, rejected)]
    ends[1][0] = 300 + (ends[0][0] + 1) % 10
    return [Rendered(start + end, [False] * prompt + [True] * (common + len(end)), "") for end in ends]


def skip_without_int8(dtype: torch.dtype) -> None:
    """Skip the test where --quantization int8 is refused on a CPU."""
    try:
        check_int8(torch.device("cpu"), dtype)
    except InputError as error:
        pytest.skip(str(error))
