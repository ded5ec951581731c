"""The checkpoint's own tokenizer and chat template, and what they say about BOS, EOS and stops.

tokenizer.json is run by the `tokenizers` library, the chat template by jinja2 in a sandbox.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from srit.models.files import InputError, atomic_write
from srit.models.load import resolve

# Alpaca's layout, for checkpoints that bring no template of their own.
DEFAULT_TEMPLATE = """\
{%- if adds_bos %}{{ bos_token }}{% endif -%}
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


class Tokenizer:
    """Text to ids and back, and the ids with a meaning.

    bos_id, eos_id, pad_id: int or None. turn_end_id: the token that ends an assistant's turn.
    stop_ids: every id that ends a generation. adds_bos: plain text of this model begins with BOS.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any],
                 template: str | None, stop_ids: Sequence[int] = (), source: str = "") -> None:
        self.backend, self.settings, self.source = backend, settings, source
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos_token, self.bos_id = self._special("bos_token")
        self.eos_token, self.eos_id = self._special("eos_token")
        self.pad_token, self.pad_id = self._special("pad_token")
        self.vocab_size = backend.get_vocab_size()
        first = backend.encode("a").ids[:1]
        self.adds_bos = self.bos_id is not None and (
            first == [self.bos_id] or bool(settings.get("add_bos_token")))
        self.chat_template = template if template is not None else DEFAULT_TEMPLATE
        self.turn_end_id = self._turn_end()
        named = (self.eos_id, self.turn_end_id, *stop_ids)
        self.stop_ids = frozenset(i for i in named if i is not None)

    def _special(self, name: str) -> tuple[str | None, int | None]:
        value = self.settings.get(name)
        token = value["content"] if isinstance(value, dict) else value
        if token is None:
            return None, None
        index = self.backend.token_to_id(token)
        if index is None:
            raise InputError(f"{self.source}: {name} {token!r} is not in the vocabulary")
        return token, index

    def _turn_end(self) -> int:
        """What follows an assistant's words in the template, if that is a special token; else EOS."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        after = self.apply_chat_template(talk, False).rpartition(SENTINEL)[2]
        ids = self.encode(after)[:1]
        added = self.backend.get_added_tokens_decoder()
        if ids and ids[0] in added and added[ids[0]].special:
            return ids[0]
        if self.eos_id is None:
            raise InputError(f"{self.source}: neither an eos_token nor a special token that ends a "
                             "turn in the chat template; add eos_token to tokenizer_config.json")
        return self.eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands: special tokens in it are parsed, none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _template(self) -> jinja2.Template:
        def fail(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment.globals["raise_exception"] = fail
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent)
        return environment.from_string(self.chat_template)

    def apply_chat_template(self, messages: Sequence[dict[str, str]],
                            add_generation_prompt: bool) -> str:
        """The conversation as text. Raises InputError with the template's own complaint."""
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "", eos_token=self.eos_token or "",
                pad_token=self.pad_token or "", adds_bos=self.adds_bos)
        except jinja2.TemplateError as error:
            raise InputError(f"{self.source}: chat template: {error}") from None
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise InputError(f"{self.source}: chat template failed: {error!r}") from None

    def save(self, directory: str | Path) -> None:
        """Write the files that transformers and vLLM read, generation_config.json among them."""
        directory = Path(directory)
        with atomic_write(directory / "tokenizer.json") as handle:
            handle.write(self.backend.to_str())
        settings = {k: v for k, v in self.settings.items() if k != "chat_template"}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
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
        template = self.chat_template
        if template == DEFAULT_TEMPLATE:  # other readers do not know adds_bos
            template = template.replace("{%- if adds_bos %}{{ bos_token }}{% endif -%}\n",
                                        "{{- bos_token -}}\n" if self.adds_bos else "")
        with atomic_write(directory / "chat_template.jinja") as handle:
            handle.write(template)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a model directory, hub id, .gguf or package file."""
    path = resolve(name)
    if path.suffix == ".gguf":
        from srit.gguf_tokenizer import read_gguf_tokenizer

        return Tokenizer(*read_gguf_tokenizer(path), source=str(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path}: no tokenizer.json; convert the tokenizer with "
                         "transformers' AutoTokenizer(...).save_pretrained")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: damaged or not a tokenizer ({error})") from None
    settings = {**_json(path / "special_tokens_map.json"), **_json(path / "tokenizer_config.json")}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {t["name"]: t["template"] for t in template}.get("default")
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
    stops: list[int] = []
    for source in ("generation_config.json", "config.json"):
        value = _json(path / source).get("eos_token_id")
        stops += value if isinstance(value, list) else [] if value is None else [value]
    return Tokenizer(backend, settings, template, stops, str(path))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
