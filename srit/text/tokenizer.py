"""The checkpoint's tokenizer and chat template, and its BOS, EOS and stop tokens.

The `tokenizers` library runs tokenizer.json; chat_template.py runs the chat template.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from srit.models.load import resolve
from srit.runtime.files import InputError, atomic_write
from srit.text import chat_template

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


class Tokenizer:
    """Encodes and decodes text, renders conversations, and knows the special ids.

    eos_id: int. bos_id, pad_id: int or None. turn_end_id: ends an assistant's turn. stop_ids: all ids
    that end a generation. adds_bos: whether plain text starts with BOS. vocab_size: highest id + 1.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any],
                 template: str | None, stop_ids: Sequence[int] = (), source: str = "") -> None:
        self.backend, self.settings, self.source = backend, settings, source
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
        self.adds_bos = self.bos_id is not None and backend.encode("a").ids[0] == self.bos_id
        if template is None:
            template = ("{{- bos_token -}}\n" if self.adds_bos else "") + DEFAULT_TEMPLATE
        self.chat_template = template
        self.turn_end_id = self._turn_end()
        self.stop_ids = frozenset((self.eos_id, self.turn_end_id, *stop_ids))

    def _special(self, name: str, required: bool = True) -> tuple[str | None, int | None]:
        value = self.settings.get(name)
        token = value["content"] if isinstance(value, dict) else value
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

    def encode(self, text: str) -> list[int]:
        """Ids of the text. Special tokens in the text are parsed; none is added."""
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError("the text is not valid Unicode (half of a surrogate pair): "
                             f"{text[:60]!r}") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[dict[str, str]],
                            add_generation_prompt: bool) -> str:
        """The conversation as text. Raises InputError with the template's error message."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: self.settings[name] for name in names if self.settings.get(name)}
        tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items()}
        variables = {"messages": list(messages), "tools": None, "documents": None,
                     "add_generation_prompt": add_generation_prompt, **tokens}
        try:
            return chat_template.render(self.chat_template, variables)
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from None

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


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, hub id, .gguf file or package file."""
    path = resolve(name)
    if path.suffix == ".gguf":
        from srit.text.gguf_tokenizer import read_gguf_tokenizer

        return Tokenizer(*read_gguf_tokenizer(path), str(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: no tokenizer.json; convert the tokenizer with "
                         "transformers' AutoTokenizer(...).save_pretrained")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: damaged or not a tokenizer ({error})") from None
    settings = {**_json(path / "special_tokens_map.json"), **_json(path / "tokenizer_config.json")}
    stops: list[int] = []
    for source in ("generation_config.json", "config.json"):
        value = _json(path / source).get("eos_token_id")
        stops += value if isinstance(value, list) else [] if value is None else [value]
    if settings.get("eos_token") is None and stops:
        settings["eos_token"] = backend.id_to_token(stops[0])
    return Tokenizer(backend, settings, _chat_template(path, settings), stops, str(path))


def _chat_template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise InputError(f"{path}: chat templates {sorted(named)}, none is 'default'; put the one "
                         "to use in chat_template.jinja")
    return named["default"]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value
