"""The checkpoint's tokenizer and chat template, and its BOS, EOS and stop tokens.

The `tokenizers` library runs tokenizer.json; chat_template.py runs the chat template.
"""

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from srit.models.load import resolve
from srit.runtime.files import InputError, atomic_write
from srit.runtime.limits import (
    TEMPLATE_CHARACTERS,
    TOKEN_ID,
    check,
    is_integer,
    read_bytes,
    read_object,
)
from srit.text import chat_template
from srit.text.library_errors import library_errors

# Alpaca's format, for checkpoints without a template. It starts with BOS if the tokenizer adds one to
# plain text.
DEFAULT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
### Response:
{{ message['content'] }}{{ eos_token }}

{% elif message['role'] == 'system' -%}
{{ message['content'] }}

{% else -%}
### Instruction:
{{ message['content'] }}

{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
### Response:
{% endif -%}
"""
SENTINEL = "\u241f"
KEPT_SETTINGS = ("unk_token", "model_max_length")
TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Around the number of a special token that is ordinary text. Unicode reserves both for internal use.
MARK, END = "\ufdd0", "\ufdd1"


class Tokenizer:
    """Encodes and decodes text, renders conversations, and knows the special ids.

    eos_id: int. bos_id, pad_id: int or None. turn_end_id: ends an assistant's turn. stop_ids: all ids
    that end a generation. adds_bos: whether plain text starts with BOS. vocab_size: highest id + 1.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any],
                 template: str | None, stop_ids: Sequence[int] = (), source: str = "",
                 today: str | None = None, template_kwargs: dict[str, Any] | None = None) -> None:
        self.backend, self.settings, self.source, self.today = backend, settings, source, today
        self.template_kwargs = template_kwargs or {}
        self.tokens = {name: _token_text(settings[name], name, source) for name in TOKEN_NAMES
                       if settings.get(name) is not None}
        for index in stop_ids:
            check(is_integer(index, 0, TOKEN_ID), source, "eos_token_id", index,
                  f"ids from 0 to {TOKEN_ID}")
        check(template is None or isinstance(template, str) and len(template) <= TEMPLATE_CHARACTERS,
              source, "chat_template", template, f"a text, {TEMPLATE_CHARACTERS:,} characters at most")
        self.backend.no_truncation()
        self.backend.no_padding()
        self.added = backend.get_added_tokens_decoder()
        self.bos_token, self.bos_id = self._special("bos_token")
        self.eos_token, self.eos_id = self._special("eos_token")
        self.pad_token, self.pad_id = self._special("pad_token", required=False)
        if self.eos_id is None:
            raise InputError(f"{source}: no eos_token; add it to tokenizer_config.json")
        self.vocab_size = max(backend.get_vocab().values()) + 1
        # As in transformers 5, the post-processor of tokenizer.json decides, not add_bos_token of
        # tokenizer_config.json.
        first = self._encoding(backend, "a", add_special_tokens=True).ids[:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        if template is None:
            template = ("{{- bos_token -}}\n" if self.adds_bos else "") + DEFAULT_TEMPLATE
        self.chat_template = template
        for name in self.template_kwargs:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise InputError(f"{source}: --chat_template_kwargs {name}: the chat template has no "
                                 "such variable")
        self.turn_end_id = self._turn_end()
        self.stop_ids = frozenset((self.eos_id, self.turn_end_id, *stop_ids))
        self.controls = self._controls()  # {id: text} of the tokens that only a template may write
        longest_first = sorted(self.controls.values(), key=len, reverse=True)
        self._texts = [MARK, *longest_first]
        self._numbers = {text: number for number, text in enumerate(self._texts)}
        self._typed = re.compile("|".join(map(re.escape, self._texts)))

    def _special(self, name: str, required: bool = True) -> tuple[str | None, int | None]:
        token = self.tokens.get(name)
        index = None if token is None else self.backend.token_to_id(token)
        if token is not None and index is None and required:
            raise InputError(f"{self.source}: {name} {token!r} is not in the vocabulary")
        return (token, index) if index is not None else (None, None)

    def _turn_end(self) -> int:
        """The added token that the template puts after an assistant's message, else EOS."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        try:
            after = self.apply_chat_template(talk, False).rpartition(SENTINEL)[2]
        except InputError:  # the model can still be used with plain text
            return self.eos_id
        first = self.encode(after.lstrip())[:1]  # some templates put a space before it
        return first[0] if first and first[0] in self.added else self.eos_id

    def _controls(self) -> dict[int, str]:
        """Special tokens, those that end generation, and what the template puts around turns.

        Some checkpoints do not declare the latter as special.
        """
        talk = [{"role": role, "content": SENTINEL} for role in ("user", "assistant", "user")]
        try:
            turns = self.encode(self.apply_chat_template(talk, False))
        except InputError:  # the model can still be used with plain text
            turns = []
        names = self.stop_ids | {self.bos_id, self.pad_id, *turns}
        return {index: token.content for index, token in self.added.items() if token.content and (
            token.special or (index in names and re.search(r"[^\w\s]", token.content)))}

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens in the text are parsed; none is added."""
        return self._encoding(self.backend, text).ids

    def _encoding(self, backend: tokenizers.Tokenizer, text: str,
                  add_special_tokens: bool = False) -> tokenizers.Encoding:
        with library_errors(f"{self.source}: the tokenizer fails"):
            try:
                return backend.encode(text, add_special_tokens=add_special_tokens)
            except TypeError:
                raise InputError("the text is not valid Unicode (half of a surrogate pair): "
                                 f"{text[:60]!r}") from None

    def mark(self, text: str) -> str:
        """The text with its special tokens marked as ordinary text, for `encode_marked`."""
        return self._typed.sub(lambda found: f"{MARK}{self._numbers[found[0]]}{END}", text)

    def unmark(self, text: str) -> str:
        return re.sub(f"{MARK}([0-9]{{1,9}}){END}", self._original, text)

    def _original(self, found: re.Match) -> str:
        number = int(found[1])
        return self._texts[number] if number < len(self._texts) else found[0]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text whose marked special tokens are ordinary text, and whose others are parsed."""
        if MARK not in text:
            return self.encode(text)
        backend, names, ids = self._literal
        expected = 0

        def replace(found: re.Match) -> str:
            nonlocal expected
            if found[1]:
                return self._original(found)
            expected += 1
            return names[found[0]]

        either = f"{MARK}([0-9]{{1,9}}){END}|" + "|".join(map(re.escape, self._texts[1:]))
        found = [ids.get(i, i) for i in self._encoding(backend, re.sub(either, replace, text)).ids]
        if sum(i in self.controls for i in found) != expected:
            raise InputError(f"{self.source}: this tokenizer cannot write the special tokens in "
                             f"{self.unmark(text)!r:.80} as ordinary text")
        return found

    def spans(self, text: str, literal: bool) -> list[tuple[int, int]]:
        """The characters [start, end) of the text that each of its tokens stands for.

        literal: special tokens in the text are ordinary text, as in `encode_marked(mark(text))`;
        otherwise the tokens are those of `encode(text)`.
        """
        backend = self._literal[0] if literal and self._typed.search(text) else self.backend
        spans, done = [], 0
        for start, end in self._encoding(backend, text).offsets:
            # Some tokenizers leave a token's leading spaces out of its offsets. Tokens that are
            # bytes of one character each have that character's.
            spans.append((min(start, done), end))
            done = end
        return spans

    @cached_property
    def _literal(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """(a copy of the tokenizer that knows the control tokens by other names, {text: other name},
        {id in the copy: id}). Nobody can type those names: they are random."""
        prefix = f"\ufdd2{secrets.token_hex(8)}:"
        names = {text: f"{prefix}{number}\ufdd3" for text, number in self._numbers.items()}
        data = json.loads(self.backend.to_str())
        data["post_processor"] = None
        for token in data["added_tokens"]:
            if token["id"] in self.controls:
                token["content"] = names[token["content"]]
        copy = tokenizers.Tokenizer.from_str(json.dumps(data))
        return copy, names, {copy.token_to_id(token["content"]): token["id"]
                             for token in data["added_tokens"]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[dict[str, str]],
                            add_generation_prompt: bool) -> str:
        """The conversation as text. Raises InputError with the template's error message."""
        variables = {"messages": list(messages), "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt, **self.template_kwargs,
                     **{name: token for name, token in self.tokens.items() if token}}
        try:
            return chat_template.render(self.chat_template, variables, self.today)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from None

    def check_model(self, vocab_size: int) -> None:
        """Raise InputError for a model with fewer tokens than this tokenizer."""
        if self.vocab_size > vocab_size:
            raise InputError(f"{self.source}: the tokenizer has {self.vocab_size} tokens, the model "
                             f"only {vocab_size}; they do not belong together")

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer files and generation_config.json, as transformers and vLLM read them."""
        directory = Path(directory)
        with atomic_write(directory / "tokenizer.json") as handle:
            handle.write(self.backend.to_str())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast",
                    "add_bos_token": self.adds_bos, "clean_up_tokenization_spaces": False}
        settings |= {k: self.settings[k] for k in KEPT_SETTINGS if k in self.settings}
        specials = {k: v for k, v in (("bos_token", self.bos_token), ("eos_token", self.eos_token),
                                      ("pad_token", self.pad_token)) if v is not None}
        generation = {k: v for k, v in (("bos_token_id", self.bos_id),
                                        ("eos_token_id", sorted(self.stop_ids)),
                                        ("pad_token_id", self.pad_id)) if v is not None}
        for name, value in (("tokenizer_config.json", {**settings, **specials}),
                            ("special_tokens_map.json", specials),
                            ("generation_config.json", generation)):
            with atomic_write(directory / name) as handle:
                json.dump(value, handle, indent=2, ensure_ascii=False)
                handle.write("\n")
        with atomic_write(directory / "chat_template.jinja") as handle:
            handle.write(self.chat_template)


def load_tokenizer(name: str | Path, today: str | None = None,
                   template_kwargs: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a model directory, hub id, .gguf file or package file.

    today: the ISO date that its chat template shows; by default the real one.
    template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
    """
    path = resolve(name)
    if path.suffix == ".gguf":
        from srit.text.gguf_tokenizer import read_gguf_tokenizer

        return Tokenizer(*read_gguf_tokenizer(path), str(path), today, template_kwargs)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: no tokenizer.json; convert the tokenizer with "
                         "transformers' AutoTokenizer(...).save_pretrained")
    data = read_bytes(file)
    with library_errors(f"{file}: damaged or not a tokenizer"):
        backend = tokenizers.Tokenizer.from_buffer(data)
    settings = {**_json(path / "special_tokens_map.json"), **_json(path / "tokenizer_config.json")}
    stops: list[int] = []
    for source in ("generation_config.json", "config.json"):
        value = _json(path / source).get("eos_token_id")
        stops += value if isinstance(value, list) else [] if value is None else [value]
    if settings.get("eos_token") is None and stops and is_integer(stops[0], 0, TOKEN_ID):
        settings["eos_token"] = backend.id_to_token(stops[0])
    return Tokenizer(backend, settings, _chat_template(path, settings), stops, str(path), today,
                     template_kwargs)


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return read_bytes(file, 4 * TEMPLATE_CHARACTERS).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 ({error.reason})") from None
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {}
    for entry in template:
        good = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        check(good, str(path), "an entry of chat_template", entry, "an object with name and template")
        named[entry["name"]] = entry.get("template")
    if "default" not in named:
        raise InputError(f"{path}: chat templates {sorted(named)}, none is 'default'; put the one "
                         "to use in chat_template.jinja")
    return named["default"]


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _token_text(value: Any, name: str, source: str) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    check(isinstance(text, str), source, name, value, "a string, or an object with the string content")
    return text
