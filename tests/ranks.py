"""A training stage on several ranks, forked from a process that has imported it: they start at once."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist

from srit import launch
from srit.config import DPOConfig, SFTConfig
from srit.models import Decoder
from srit.train import dpo, sft

STAGES = {"sft": (SFTConfig, sft.main), "dpo": (DPOConfig, dpo.main)}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["srit.train.sft", "srit.train.dpo"])


def run_ranks(stage: str, argv: list[str], ranks: int, folder: str,
              prepare: Callable[[], None] | None = None) -> None:
    """Run the stage to its end; each rank calls `prepare` first and writes to folder/rank-N."""
    # As under torchrun the parent has the store; port 0 takes a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [SERVER.Process(target=_rank, args=(stage, argv, rank, ranks, store.port, folder,
                                                  prepare))
               for rank in range(ranks)]
    for process in started:
        process.start()
    while running := [process for process in started if process.exitcode is None]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in started):  # the others would wait for this one
            for process in running:
                process.kill()
    said = {file.name: file.read_text() for file in Path(folder).iterdir()}
    assert not any(process.exitcode for process in started), said


def generate_no_code() -> None:
    """Compiled layers are traced and differentiated by AOTAutograd, and run eagerly."""
    Decoder.compile_layers.__defaults__ = ("aot_eager",)


def _rank(stage: str, argv: list[str], rank: int, ranks: int, port: int, folder: str,
          prepare: Callable[[], None] | None) -> None:
    os.chdir("/")
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                          TORCHELASTIC_USE_AGENT_STORE="True")
    output = os.open(Path(folder) / f"rank-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if prepare:
        prepare()
    config, main = STAGES[stage]
    launch.run(config, stage, main, argv)
