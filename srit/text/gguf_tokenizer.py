"""Rebuild the tokenizer of a .gguf file: byte-level BPE, or SentencePiece as BPE with byte fallback.

llama.cpp defines what the values of `tokenizer.ggml.pre` mean (src/llama-vocab.cpp).
"""

from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from srit.models.gguf_metadata import read_metadata
from srit.runtime.files import InputError
from srit.runtime.limits import GGUF_TOKEN_CHARACTERS, check, is_integer
from srit.text.library_errors import library_errors

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DIGITS = [r"\p{N}", GPT2]
SPLITS = {  # by `pre`; each pattern splits the pieces of the one before
    "gpt-2": [GPT2], "mpt": [GPT2], "olmo": [GPT2], "smollm": DIGITS, "starcoder": DIGITS,
    "refact": DIGITS, "command-r": DIGITS, "llama-bpe": [LLAMA3], "llama3": [LLAMA3],
    "llama-v3": [LLAMA3], "qwen2": [QWEN2], "deepseek-r1-qwen": [QWEN2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
INSTEAD = "use the safetensors checkpoint with its tokenizer.json"


def read_gguf_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any], str | None, list[int]]:
    """(tokenizer, settings as in tokenizer_config.json, chat template, stop ids) of a .gguf file.

    Raises InputError for a tokenizer or pre-tokenizer that cannot be rebuilt exactly.
    """
    data = read_metadata(path)
    prefix = "tokenizer.ggml."
    ggml = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    kind, architecture = ggml.get("model"), data.get("general.architecture")
    _check(ggml, str(path))
    with library_errors(f"{path}: damaged tokenizer"):
        if kind == "gpt2" and "merges" in ggml:
            tokenizer = _byte_level(ggml, path)
        elif kind == "llama" and architecture == "llama":
            tokenizer = _sentencepiece(ggml)
        else:
            raise InputError(f"{path}: a tokenizer of model {kind!r} for architecture "
                             f"{architecture!r} is not supported; {INSTEAD}")
        tokens, types = ggml["tokens"], ggml.get("token_type", [])
        for wanted, add in (((UNKNOWN, CONTROL), tokenizer.add_special_tokens),
                            ((USER_DEFINED,), tokenizer.add_tokens)):
            add([AddedToken(token, normalized=False)
                 for token, type_ in zip(tokens, types, strict=False) if type_ in wanted])
    settings: dict[str, Any] = {
        f"{name}_token": tokens[ggml[key]]
        for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"),
                          ("unk", "unknown_token_id"), ("pad", "padding_token_id"))
        if key in ggml}  # each an id of the vocabulary: see _check
    if length := data.get(f"{architecture}.context_length"):
        settings["model_max_length"] = length
    default = kind == "llama" or ggml.get("pre") in LLAMA3_NAMES  # llama.cpp's default
    bos = settings.get("bos_token")
    if bos is not None and ggml.get("add_bos_token", default):
        with library_errors(f"{path}: bos_token {bos!r:.80}"):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))])
    stops = [ggml[key] for key in ("eot_token_id", "eom_token_id") if key in ggml]
    return tokenizer, settings, data.get("tokenizer.chat_template"), stops


def _check(ggml: dict[str, Any], where: str) -> None:
    tokens = ggml.get("tokens")
    check(isinstance(tokens, list) and len(set(map(str, tokens))) == len(tokens) > 0
          and all(isinstance(token, str) and len(token) <= GGUF_TOKEN_CHARACTERS for token in tokens),
          where, "tokenizer.ggml.tokens", tokens,
          f"different texts of {GGUF_TOKEN_CHARACTERS:,} characters at most")
    for key, kind in (("merges", str), ("scores", float), ("token_type", int)):
        values = ggml.get(key, [])
        check(isinstance(values, list) and all(isinstance(value, kind) for value in values),
              where, f"tokenizer.ggml.{key}", values, f"a list of {kind.__name__}")
    check(all(merge.count(" ") == 1 for merge in ggml.get("merges", [])), where,
          "tokenizer.ggml.merges", "a merge", "two pieces and a space between them")
    for key in (key for key in ggml if key.endswith("_token_id")):
        check(is_integer(ggml[key], 0, len(tokens) - 1), where, f"tokenizer.ggml.{key}", ggml[key],
              f"an id of the vocabulary, from 0 to {len(tokens) - 1}")


def _byte_level(ggml: dict[str, Any], path: Path) -> Tokenizer:
    name = ggml.get("pre", "default")
    if not isinstance(name, str) or name not in SPLITS:
        raise InputError(f"{path}: pre-tokenizer {name!r} is not supported; {INSTEAD}")
    tokenizer = Tokenizer(models.BPE(
        vocab={token: index for index, token in enumerate(ggml["tokens"])},
        merges=[tuple(merge.split(" ", 1)) for merge in ggml["merges"]],
        ignore_merges=name in LLAMA3_NAMES))
    if SPLITS[name] == [QWEN2]:
        tokenizer.normalizer = normalizers.NFC()  # as in Qwen's own tokenizer.json
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[name]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(ggml: dict[str, Any]) -> Tokenizer:
    """Llama's SentencePiece BPE. Merges are ranked by the score of the piece that they produce."""
    vocabulary = {token: index for index, token in enumerate(ggml["tokens"])}
    ranked = []
    for piece, score in zip(ggml["tokens"], ggml["scores"], strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, -cut, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    unknown = ggml["tokens"][ggml.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(
        vocab=vocabulary, merges=[(left, right) for _, _, left, right in ranked],
        unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if ggml.get("add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer
