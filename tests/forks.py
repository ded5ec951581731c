"""Stages and `srit run` in processes forked from one that has imported them: they start at once."""

import atexit
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from srit import launch
from srit.commands import run
from srit.commands.cli import COMMANDS
from srit.models import Decoder
from srit.train import dpo, eval, pair, sample, sft

MAINS = {"run": run.main, "sft": sft.main, "sample": sample.main, "pair": pair.main, "dpo": dpo.main,
         "eval": eval.main}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([  # the compiler, because torch imports it in the first optimizer step
    "torch._dynamo", *(main.__module__ for main in MAINS.values())])


class Fork(SERVER.Process):
    """`srit COMMAND words`, started; it writes to log.out and log.err, and calls `prepare` first."""

    def __init__(self, command: str, words: list, log: Path, cwd: Path | str = "/",
                 env: dict[str, str] | None = None, prepare: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.command, self.words, self.cwd = command, [str(word) for word in words], cwd
        self.env, self.prepare = env or {}, prepare
        self.files = [Path(f"{log}.{end}") for end in ("out", "err")]
        for file in self.files:
            file.write_text("")
        self.start()
        atexit.register(lambda: self.is_alive() and self.kill())  # of a test that failed

    def run(self) -> None:
        os.chdir(self.cwd)
        os.environ.update(self.env)
        for number, file in enumerate(self.files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        if self.prepare:
            self.prepare()
        launch.run(COMMANDS[self.command][1], self.command, MAINS[self.command], self.words)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 60.0) -> tuple[str, str]:
        """What it wrote to the ends of stdout and stderr, when it has ended."""
        self.join(timeout)
        assert self.exitcode is not None, "waited too long"
        return self.said()

    def said(self) -> tuple[str, str]:
        return tuple(file.read_text() for file in self.files)


class ForkedStage(multiprocessing.get_context("fork").Process):
    """What `srit run` needs of subprocess.Popen: a stage, forked from this process."""

    def __init__(self, words: list[str], start_new_session: bool, env: dict[str, str]) -> None:
        super().__init__()
        self.command, self.words, self.env = Path(words[1]).stem, words[2:], env
        self.start()

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a new Python has no handlers
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.environ.update(self.env)
        launch.run(COMMANDS[self.command][1], self.command, MAINS[self.command], self.words)

    def wait(self, timeout: float) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def fork_stages() -> None:
    """`srit run` forks its stages instead of starting Python for each."""
    run.subprocess = SimpleNamespace(Popen=ForkedStage, TimeoutExpired=subprocess.TimeoutExpired)


def fork_run(recipe: Path, log: Path) -> Fork:
    """`srit run --config recipe`, whose stages are forks as well."""
    return Fork("run", ["--config", recipe], log, prepare=fork_stages)


def start_ranks(stage: str, words: list, cwds: Sequence[Path | str], log: Path,
                prepare: Callable[[], None] | None = None) -> list[Fork]:
    """The ranks of a stage, one in each working directory; rank N writes to log-N.out and .err."""
    # As under torchrun the parent has the store; port 0 takes a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    for rank, cwd in enumerate(cwds):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(cwds)),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
               "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks.append(Fork(stage, words, f"{log}-{rank}", cwd, env if len(cwds) > 1 else {}, prepare))
        ranks[-1].store = store  # lives as long as they do
    return ranks


def run_ranks(stage: str, words: list, ranks: int, log: Path,
              prepare: Callable[[], None] | None = None) -> None:
    """Run the stage to its end."""
    started = start_ranks(stage, words, ["/"] * ranks, log, prepare)
    while running := [process for process in started if process.exitcode is None]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in started):  # the others would wait for this one
            for process in running:
                process.kill()
    assert not any(process.exitcode for process in started), [process.said() for process in started]


def generate_no_code() -> None:
    """Compiled layers are traced and differentiated by AOTAutograd, and run eagerly."""
    Decoder.compile_layers.__defaults__ = ("aot_eager",)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # logs fit, a checkpoint does not


def without_override() -> None:
    """As a user who is not root: permissions count."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc.capget(header, sets)
    sets[0] &= ~2  # CAP_DAC_OVERRIDE
    libc.capset(header, sets)
