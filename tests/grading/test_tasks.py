"""What the tasks beside math and choice (test_answers.py) read, and what equals their truth."""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from srit.grading.final_answer import final_answer
from srit.grading.judge import Judge, grade
from srit.grading.tasks import code, expression
from srit.runtime.files import InputError


def right(task, text, answer):
    found = grade(text, {"id": "a", "task": task, "answer": answer})
    return found.correct, found.strict_correct


@pytest.mark.parametrize("text, flexible, strict", [
    ("It is warm. The answer is St. Louis. It lies there.", "St. Louis", "St. Louis"),
    ("Answer: **Paris**\n", "Paris", "Paris"), ("#### Paris", "Paris", "Paris"),
    (r"So \boxed{\frac{1}{2}} and \boxed{x^{2}}.", "x^{2}", "x^{2}"), (r"So \boxed{x^{2}", None, None),
    ("I think so.\nParis", "Paris", None), ("", None, None), ("The answer is", "The answer is", None),
    ("<think>The answer is Rome.</think>The answer is Paris", "Paris", "Paris"),
    ("<think>The answer is Rome.", None, None),
    ("The answer is Paris\nQuestion: And?\nThe answer is Rome", "Paris", "Paris")])
def test_the_words_of_an_answer(text, flexible, strict):
    assert final_answer(text) == (flexible, strict)


@pytest.mark.parametrize("text, answer, expected", [
    ("The answer is Paris.", "paris", (True, True)),
    ("So it is\n**the Eiffel  Tower**", "Eiffel tower", (True, False)),
    ("The answer is “Ｐａｒｉｓ”!", "Paris", (True, True)),
    ("The answer is not Paris.", "Paris", (False, False)),
    ("The answer is Paris or Rome.", "Paris", (False, False)), ("Answer: 07:30", "07:30", (True, True)),
    ("The answer is Café", "Cafe", (False, False)), ("", "Paris", (False, False))])
def test_exact_is_the_same_text_but_for_case_space_and_punctuation(text, answer, expected):
    assert right("exact", text, answer) == expected


@pytest.mark.parametrize("text, answer, expected", [
    ('{"b": [1, 2], "a": "x"}', '{"a": "x", "b": [1.0, 2]}', (True, True)),
    ('```json\n{"a": 1}\n```', '{"a": 1}', (True, True)),
    ('First {"a": 2}. Here it is: {"a": 1}.', '{"a": 1}', (True, False)),
    ('{"a": {"c": null}}', '{"a": {"c": null}}', (True, True)),
    ('{"a": 1, "b": 2}', '{"a": 1}', (False, False)), ('{"a": true}', '{"a": 1}', (False, False)),
    ('{"a": [2, 1]}', '{"a": [1, 2]}', (False, False)), ('{"a": "1"}', '{"a": 1}', (False, False)),
    ('{"a": 1', '{"a": 1}', (False, False)), ("[1]", '{"a": 1}', (False, False)),
    ('{{"a": 1}', '{"a": 1}', (True, False)), ('{"a":' * 5000, '{"a": 1}', (False, False))])
def test_json_compares_keys_and_values(text, answer, expected):
    assert right("json", text, answer) == expected


@pytest.mark.parametrize("text, answer, expected", [
    (r"So \boxed{1 + x^2}.", "x^2+1", (True, True)),
    ("The answer is $(x-1)^2$.", "x^2-2x+1", (True, True)),
    (r"\boxed{2}", "x^2+1", (False, False)), (r"\boxed{3}", r"\frac{\sqrt{3}}{2}", (False, False)),
    (r"the answer is \(\frac{3}{2\sqrt{3}}\) cm", r"\frac{\sqrt{3}}{2}", (True, True)),
    (r"\boxed{(3, 5)}", "(3, 7)", (False, False)), (r"\boxed{(3,5)}", "(3, 5)", (True, True)),
    ("The answer is 1000000.", "10^6", (True, True)), ("We have\n$$x^2+1$$", "x^2+1", (True, False)),
    ("The answer is not $x^2+1$.", "x^2+1", (False, False)), (r"\boxed{3", "3", (False, False)),
    ("The answer is $x^2+1$ or $x$.", "x^2+1", (False, False)), ("", "7", (False, False)),
    (f"The answer is $3$ {'cm ' * 5000}!", "3", (False, False))])
def test_expression_compares_as_mathematics(text, answer, expected):
    pytest.importorskip("math_verify")
    assert right("expression", text, answer) == expected


def test_expression_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    expression.parse.cache_clear()
    with pytest.raises(InputError, match=r"needs math-verify: pip install 'srit\[math\]'"):
        right("expression", r"\boxed{7}", "7")


def test_expression_does_not_evaluate_what_a_model_wrote(tmp_path):
    pytest.importorskip("math_verify")
    made = tmp_path / "made"
    text = rf"\boxed{{__import__('os').mkdir('{made}')}}"
    assert right("expression", text, "7") == (False, False) and not made.exists()


TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
ADD = "def add(a, b):\n    return a + b\n"


def test_code_does_not_run_unless_it_may():
    with pytest.raises(InputError, match="row 'a': .*runs programs.*--allow_code_execution True"):
        right("code", ADD, TESTS)


def test_where_no_sandbox_is_permitted_code_is_refused(monkeypatch):
    monkeypatch.setattr(code, "SANDBOX", ["/nowhere/unshare"])
    code.check_sandbox.cache_clear()
    with pytest.raises(InputError, match="no program can run here without network .*/nowhere/unshare"):
        code.check({"answer": TESTS}, "rows.jsonl:1")


@pytest.fixture
def sandbox(monkeypatch):
    """Skips where it cannot be; root's own Python may lie where nobody else may look."""
    if os.geteuid() == 0 and os.access("/usr/bin/python3", os.X_OK):
        monkeypatch.setattr(code, "PYTHON", ["/usr/bin/python3", "-I"])
    monkeypatch.setattr(code, "SECONDS", 5)
    code.check_sandbox.cache_clear()
    try:
        code.check_sandbox()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("text, expected", [
    (f"Here:\n```python\n{ADD}```\nDone.", (True, True)), (ADD, (True, False)),
    (f"```python\n{ADD.replace('+', '-')}```", (False, False)), ("I do not know.", (False, False)),
    (f"```\n{ADD}if __name__ == '__main__':\n    add(int(input()), 1)\n```", (True, True)),
    ("```\nimport os\nos._exit(0)\n```", (False, False)),
    ("```\nraise SystemExit\n```", (False, False)),
    (f"```\n{ADD}'''```", (False, False))])
def test_code_is_right_if_it_passes_the_tests(sandbox, text, expected):
    found = Judge(allow_code_execution=True)(text, {"id": "a", "task": "code", "answer": TESTS})
    assert (found.correct, found.strict_correct) == expected


@pytest.mark.parametrize("program", [
    "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "import time\ntime.sleep(60)", "x = bytearray(2 ** 31)", "print('x' * 2 ** 22)",
    "open('big', 'w').write('x' * 2 ** 22)",
    "import os, time\nfor _ in range(100):\n    if os.fork() == 0:\n        time.sleep(2)\n"
    "        os._exit(0)"])
def test_code_has_no_network_and_limits(sandbox, monkeypatch, program):
    if "time.sleep(60)" in program:
        monkeypatch.setattr(code, "SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1]))
        assert not code.equal(f"{program}\n{ADD}", {"answer": TESTS})


def test_code_sees_no_environment_and_no_other_process(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    tests = ("import os\nassert 'SECRET' not in os.environ and 'HOME' not in os.environ\n"
             "assert [name for name in os.listdir('/proc') if name.isdigit()] == ['1']")
    assert code.equal("", {"answer": tests})


def test_no_process_outlives_its_program(sandbox):
    name = f"sleep-of-{os.getpid()}"
    program = ("import os\nif os.fork() == 0:\n    os.setsid()\n"
               f"    os.execv('/bin/sleep', ['{name}', '977'])\n")
    assert code.equal(program, {"answer": "import time\ntime.sleep(0.2)"})
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            assert name.encode() not in file.read_bytes()
