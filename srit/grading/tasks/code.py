"""code: a Python program that passes the unit tests of `answer`, which are Python too (assert ...).

The program runs without network, in namespaces of its own (util-linux's unshare), with an empty
environment, in a directory of its own, and within the limits below. What the user may read and write,
it may as well: use a container where that matters. For root it runs as nobody, because no limit on
processes holds for root.
"""

import ast
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from srit.grading.final_answer import completed
from srit.runtime import limits
from srit.runtime.files import InputError

show = str
SECONDS = 10  # of a clock, for program and tests together
MEMORY = 2**30  # bytes of address space of each process
PROCESSES = 64  # and threads
OUTPUT = 2**20  # bytes of each file it writes, also of what it prints
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
SANDBOX = ["unshare", "--user", "--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child",
           "prlimit", f"--as={MEMORY}", f"--nproc={PROCESSES}", f"--fsize={OUTPUT}", f"--cpu={SECONDS}",
           "--core=0"]
PYTHON = [sys.executable, "-I"]
NOBODY = 65534
# The program is not __main__, and the last line is out of its reach if it leaves before the tests.
MAIN = """\
def compiled(name):
    with open(name, encoding="utf-8") as file:
        return compile(file.read(), name, "exec")
names = {{"__name__": "program"}}
exec(compiled("program.py"), names)
exec(compiled("tests.py"), names)
print("\\n{token}", flush=True)
"""


def check(row: Mapping, where: str) -> None:
    tests = row["answer"]
    limits.check(_is_python(tests) and tests.strip() != "", where, "answer", tests,
                 "unit tests in Python for task code, such as assert add(1, 2) == 3")
    check_sandbox()


def extract(text: str, row: Mapping) -> tuple[str | None, str | None]:
    """The last fenced block that is Python; flexible, without a fence, the whole text."""
    text = completed(text)
    fenced = next((block for block in reversed(FENCE.findall(text)) if _is_python(block)), None)
    return fenced or (text if text.strip() and _is_python(text) else None), fenced


def equal(answer: str, row: Mapping) -> bool:
    check_sandbox()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        directory.chmod(0o777)
        for name, text in (("program.py", answer), ("tests.py", row["answer"]),
                           ("main.py", MAIN.format(token=token))):
            (directory / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        with open(directory / "output", "w+b") as output:
            done = _run("main.py", cwd=directory, stdout=output, stderr=subprocess.DEVNULL)
            output.seek(max(0, output.seek(0, 2) - 100))
            return done.returncode == 0 and output.read().split()[-1:] == [token.encode()]


@cache
def check_sandbox() -> None:
    """InputError where the kernel, or a container's rules, permit no namespaces without network."""
    try:
        done = _run("-c", "", cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        told = done.stdout.decode(errors="replace").strip()
        why = told or f"status {done.returncode}" if done.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        raise InputError("--allow_code_execution True: no program can run here without network "
                         f"({why}); it takes Linux, util-linux (unshare, prlimit), a container that "
                         "permits user namespaces, and a Python that others than root may read")


def _run(*arguments: str, **options: Any) -> subprocess.CompletedProcess:
    if os.geteuid() == 0:
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    # The limit holds also when nobody waits any more, because this process was killed.
    command = ["timeout", "--signal=KILL", str(SECONDS), *SANDBOX, *PYTHON, *arguments]
    return subprocess.run(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True, **options)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
