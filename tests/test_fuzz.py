"""Any input gives a result or an InputError, never a traceback, a hang or a damaged file.

SOME cases of each test always run, MANY with `pytest -m fuzz`.
"""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, demo, pair, tiny_checkpoint, tiny_gguf

from srit.config import DPOConfig, InstructConfig, SampleConfig, SFTConfig
from srit.data.examples import read_pairs, read_sft
from srit.data.questions import read_demos, read_questions
from srit.launch import parse
from srit.models import ModelConfig, load_model
from srit.recipe import read_recipe
from srit.runtime.files import InputError
from srit.text import chat_template
from srit.text.prompts import render
from srit.text.tokenizer import load_tokenizer
from srit.training.checkpoint import damage

SOME, MANY = 150, 10_000
FOLDER = Path(tempfile.mkdtemp(prefix="srit-fuzz-"))
TINY = tiny_checkpoint(FOLDER / "tiny")
TOKENIZER = load_tokenizer(str(TINY))

scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
           | st.sampled_from(["", "math", "choice", "user", "assistant", "llama", 1e400, -1, 2**70,
                              10**4000, "\ud83d", "<|im_end|>"]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


def cases(strategy):
    """Parametrize a test: SOME cases, and MANY with -m fuzz."""
    def decorate(check):
        @pytest.mark.parametrize("n", [SOME, pytest.param(MANY, marks=pytest.mark.fuzz)])
        def test(n):
            given(strategy)(settings(
                max_examples=n, deadline=10_000, database=None, phases=[Phase.generate, Phase.shrink],
                derandomize=n == SOME, suppress_health_check=list(HealthCheck))(check))()
        return test
    return decorate


def may_refuse(function, *arguments):
    """Call the function. A readable InputError is as good as a result."""
    try:
        function(*arguments)
    except InputError as error:
        assert str(error).strip() and len(str(error)) < 20_000


@st.composite
def edited(draw, originals):
    """One of the originals with some bytes deleted, doubled, replaced or inserted."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.sampled_from([0, 1, 2, 8, 100])))
        data[at:to] = draw(st.sampled_from([data[at:to] * 2, b"", b"\0", b"\xff", b"{", b"\n", b'"'])
                           | st.binary(max_size=12))
    return bytes(data)


@st.composite
def changed(draw, original):
    """The mapping with some values replaced and some keys added or removed."""
    row = dict(original)
    for key in draw(st.lists(st.sampled_from([*original, "new"]), min_size=1, max_size=3)):
        if draw(st.booleans()):
            row[key] = draw(values)
        else:
            row.pop(key, None)
    return row


LINES = [json.dumps(row).encode() + b"\n" for row in (
    demo(0, 1, 2), {**pair(0, 1, 2), "chosen_forced": [[0, 2], [3, 4]]},
    {"prompt": "a", "completion": " b 7", "completion_forced": [[2, 4]]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"id": "c", "task": "choice", "question": "q", "choices": {"A": "x", "B": "y"}, "answer": "A",
     "completion": "The answer is A."})]


def read_rows(data: bytes) -> None:
    file = FOLDER / "rows.jsonl"
    file.write_bytes(data)
    may_refuse(read_questions, file)
    may_refuse(read_demos, file)
    may_refuse(read_sft, [str(file)], TOKENIZER, 64,
               InstructConfig(prompt_style=["direct", "cot"]))
    may_refuse(read_pairs, [str(file)], TOKENIZER, 64)
    assert file.read_bytes() == data


@cases(st.binary(max_size=200) | edited(LINES) | edited([b"".join(LINES[:2])]))
def test_bytes_as_rows(data):
    read_rows(data)


def as_parquet(rows):
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, FOLDER / "rows.parquet")
    return (FOLDER / "rows.parquet").read_bytes()


FILES = {"rows.csv": b'prompt,completion\na,"b ""c"""\n"d\ne",f\n',
         "rows.jsonl.gz": gzip.compress(LINES[0]), "rows.json": b"[" + b",".join(LINES) + b"]",
         "rows.parquet": as_parquet([json.loads(line) for line in LINES[2:4]])}


@cases(st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(st.just(name), st.binary(max_size=50) | edited([FILES[name]]))))
def test_bytes_as_files_of_other_formats(case):
    name, data = case
    (FOLDER / name).write_bytes(data)
    may_refuse(read_sft, [str(FOLDER / name)], TOKENIZER, 64)


@cases(st.lists(st.one_of(*(changed(json.loads(line)) for line in LINES)), min_size=1, max_size=3))
def test_rows_with_other_values(rows):
    read_rows("".join(json.dumps(row) + "\n" for row in rows).encode())


@cases(changed({**CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
                "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}))
def test_config_json(raw):
    may_refuse(ModelConfig.from_dict, raw)


@cases(edited([(TINY / "config.json").read_bytes()]))
def test_bytes_as_config_json(data):
    folder = FOLDER / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    may_refuse(load_model, str(folder))


WEIGHTS = (TINY / "model.safetensors").read_bytes()
HEADER = 8 + int.from_bytes(WEIGHTS[:8], "little")


@cases(edited([WEIGHTS[:HEADER]]) | st.binary(max_size=64))
def test_bytes_as_a_safetensors_header(header):
    folder = FOLDER / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(header + WEIGHTS[HEADER:])
    may_refuse(load_model, str(folder))


TOKENIZER_FILES = {
    **{name: (TINY / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")},
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "chat_template.jinja": TOKENIZER.chat_template.encode()}


def read_tokenizer(name: str, data: bytes) -> None:
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    for other, original in TOKENIZER_FILES.items():
        (folder / other).write_bytes(original)
    (folder / name).write_bytes(data)
    may_refuse(lambda: load_tokenizer(str(folder)).encode("Tom has 3 apples."))


@cases(st.one_of(*(edited([data]).map(lambda data, name=name: (name, data))
                   for name, data in TOKENIZER_FILES.items())))
def test_bytes_as_a_tokenizer(change):
    read_tokenizer(*change)


@cases(changed(json.loads(TOKENIZER_FILES["tokenizer_config.json"])) | st.fixed_dictionaries(
    {"eos_token_id": values}))
def test_tokenizer_settings_with_other_values(row):
    name = "generation_config.json" if row.keys() == {"eos_token_id"} else "tokenizer_config.json"
    read_tokenizer(name, json.dumps(row).encode())


INDEX = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}


@cases(edited([json.dumps(INDEX).encode()]) | values.map(lambda value: json.dumps(
    {"weight_map": value}).encode()) | changed(INDEX["weight_map"]).map(lambda value: json.dumps(
        {"weight_map": value}).encode()))
def test_bytes_as_a_shard_index(data):
    folder = FOLDER / "index"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((TINY / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "model.safetensors.index.json").write_bytes(data)
    may_refuse(load_model, str(folder))


GGUF = tiny_gguf(FOLDER / "tiny.gguf").read_bytes()
GGUF_HEADER = GGUF.index(b"blk.0.ffn_down.weight") + 64


@cases(edited([GGUF]) | edited([GGUF[:GGUF_HEADER]]).map(lambda head: head + GGUF[GGUF_HEADER:]))
def test_bytes_as_a_gguf_file(data):
    file = FOLDER / "m.gguf"
    file.write_bytes(data)
    may_refuse(load_model, str(file))
    may_refuse(lambda: load_tokenizer(str(file)).encode("ab"))


def test_the_gguf_file_itself_is_read():
    load_model(str(FOLDER / "tiny.gguf"))
    assert load_tokenizer(str(FOLDER / "tiny.gguf")).encode("ab<s>") == [3, 0]


PIECES = st.lists(st.text(max_size=5) | st.sampled_from([
    "<|im_end|>", "<|im_start|>", "<|pad|>", "\n", "user", " a", "\ufdd0", "\ufdd01\ufdd1", "<", "|>"]),
    max_size=8)


@cases(st.tuples(PIECES.map("".join), PIECES.map("".join)))
def test_no_text_in_a_message_becomes_a_control_token(texts):
    def check(question, answer):
        row = render(TOKENIZER, [{"role": "user", "content": question}], answer)
        assert [i for i in row.ids if i in TOKENIZER.controls] == CONTROLS
        assert TOKENIZER.decode(row.ids, False).startswith(f"<|im_start|>user\n{question}<|im_end|>\n")
    may_refuse(check, *texts)


CONTROLS = [i for i in render(TOKENIZER, [{"role": "user", "content": "a"}], "b").ids
            if i in TOKENIZER.controls]


@cases(st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), st.text(), max_size=3),
                max_size=5))
def test_messages_for_a_chat_template(messages):
    may_refuse(TOKENIZER.apply_chat_template, messages, True)


@cases(edited([TOKENIZER.chat_template.encode()]).map(lambda data: data.decode(errors="replace"))
       | st.text("{%}#- \nmessages[0]forin()'\"", max_size=40))
def test_text_as_a_chat_template(template):
    may_refuse(chat_template.render, template, {"messages": [{"role": "user", "content": "a"}]})


def parse_flags(cls, stage, words):
    try:
        parse(cls, stage, words)
    except SystemExit as end:  # tyro's usage message
        assert end.code == 2


@cases(st.tuples(st.sampled_from([(SFTConfig, "sft"), (DPOConfig, "dpo"), (SampleConfig, "sample")]),
                 changed({"model_name_or_path": "m", "train_file": ["f"], "output_dir": "o",
                          "learning_rate": 1e-4, "max_steps": 3, "beta": 0.1, "top_k": 3,
                          "prompt_style": ["cot"], "use_peft": True})))
def test_yaml_with_other_values(case):
    (cls, stage), values_ = case
    file = FOLDER / "config.yaml"
    file.write_text(json.dumps(values_), encoding="utf-8")
    may_refuse(parse_flags, cls, stage, ["--config", str(file)])


RECIPES = [file.read_bytes() for file in (Path(__file__).parent.parent / "runs").glob("*.yaml")]


@cases(edited(RECIPES))
def test_bytes_as_a_recipe(data):
    file = FOLDER / "recipe.yaml"
    file.write_bytes(data)
    may_refuse(read_recipe, file)
    assert file.read_bytes() == data


@cases(st.tuples(st.sampled_from(["state/shard", "trainer_state.json", "SHA256SUMS"]),
                 st.integers(0, 399), st.integers(1, 255)))
def test_any_changed_byte_of_a_checkpoint_is_detected(change):
    name, at, mask = change
    folder = FOLDER / "checkpoint-1"
    (folder / "state").mkdir(parents=True, exist_ok=True)
    contents = {"state/shard": bytes(range(200)) * 2, "trainer_state.json": b'{"step": 1}' * 40}
    contents["SHA256SUMS"] = "".join(f"{hashlib.sha256(data).hexdigest()}  {file}\n"
                                     for file, data in contents.items()).encode()
    for file, data in contents.items():
        (folder / file).write_bytes(data)
    assert damage(folder) is None
    data = bytearray(contents[name])
    data[at % len(data)] ^= mask
    (folder / name).write_bytes(data)
    assert damage(folder)
