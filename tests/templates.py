"""Chat templates in the style of five model families, and a tiny tokenizer for each."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from srit.text.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>",
            "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>",
            "[INST]", "[/INST]"]
TEXT = ["Tom has 3 apples and buys 4 more, so he has 7.", "user assistant system model",
        "Answer: Let's think step by step. The answer is 7.", "You are helpful."]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}")
QWEN = """\
{%- if tools %}
    {{- 'tools: ' + tools | tojson }}
{%- endif %}
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}
    {{- raise_exception('no tools here') }}
{%- endif %}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}")


# In the style of Qwen3's: a thought stays in the answer to the last question only.
QWEN3 = """\
{%- set last = namespace(question=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.question = messages.index(message) %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- set answer = message.content %}
        {%- if '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- answer }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


class Family(NamedTuple):
    template: str | None
    eos: str
    turn_end: str
    renders_bos: bool


FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", "<|im_end|>", False),
    "chatml-other-eos": Family(CHATML, "</s>", "<|im_end|>", False),
    "qwen": Family(QWEN, "</s>", "<|im_end|>", False),
    "llama3": Family(LLAMA3, "</s>", "<|eot_id|>", True),
    "gemma": Family(GEMMA, "</s>", "<end_of_turn>", True),
    "mistral": Family(MISTRAL, "</s>", "</s>", True),
    "none": Family(None, "</s>", "</s>", False),
}


@cache
def _trained() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return backend.to_str()


def write_tokenizer(directory: Path, template: str | None = CHATML, eos: str | None = "<|im_end|>",
                    post_bos: bool = False, **settings) -> Path:
    """tokenizer.json and tokenizer_config.json; `post_bos`: the post-processor adds BOS."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = Backend.from_str(_trained())
    if post_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos,
              "pad_token": eos, "chat_template": template, **settings}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None}))
    return directory


def family_tokenizer(directory: Path, name: str, **settings) -> Tokenizer:
    family = FAMILIES[name]
    return load_tokenizer(write_tokenizer(directory, family.template, family.eos, **settings))
