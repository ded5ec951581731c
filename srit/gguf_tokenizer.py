"""The byte-level BPE tokenizer inside a .gguf file."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from srit.models.files import InputError
from srit.models.gguf import metadata, open_gguf

CONTROL, USER_DEFINED = 3, 4
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _pre_tokenizer(name: str, path: Path) -> Any:
    """What splits text before BPE, by the name that GGUF gives it."""
    if name in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    patterns = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": QWEN2}
    if name in patterns:
        split = pre_tokenizers.Split(Regex(patterns[name]), "isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise InputError(f"{path}: pre-tokenizer {name!r} is not supported; use the safetensors "
                     "checkpoint with its tokenizer.json")


def read_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any], str | None]:
    """(tokenizer, settings, chat template) of a .gguf file with a byte-level BPE vocabulary."""
    reader = open_gguf(path)

    def get(key: str, default: Any = None) -> Any:
        return metadata(reader, f"tokenizer.{key}", default)

    kind, tokens = get("ggml.model"), get("ggml.tokens")
    if kind != "gpt2" or not tokens:
        raise InputError(f"{path}: tokenizer model {kind!r} is not supported (only byte-level BPE, "
                         "'gpt2'); use the safetensors checkpoint with its tokenizer.json")
    merges = [tuple(merge.split(" ", 1)) for merge in get("ggml.merges", [])]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(get("ggml.pre", "default"), path)
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, get("ggml.token_type", []), strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            special = AddedToken(token, special=type_ == CONTROL, normalized=False)
            tokenizer.add_special_tokens([special]) if type_ == CONTROL else tokenizer.add_tokens(
                [special])
    settings: dict[str, Any] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        index = get(f"ggml.{key}_token_id")
        if index is not None:
            settings[name] = tokens[index]
    if get("ggml.add_bos_token", False):
        settings["add_bos_token"] = True
        bos = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return tokenizer, settings, get("chat_template")
