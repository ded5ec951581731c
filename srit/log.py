"""metrics.jsonl, one row per logged step, and a progress bar."""

import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from srit import dist
from srit.models.files import atomic_write
from srit.records import read_jsonl


class MetricsLog:
    """Averages what a step adds, and writes it when asked.

    Resuming at step k drops the rows after step k: those steps are trained, and logged, again.
    Values stay tensors on their device until a row is written, so adding one never waits for the
    GPU. Other ranks than 0 write nothing.
    """

    def __init__(self, output_dir: str | Path, start: int, total: int) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self.main = dist.rank() == 0
        self.sums: dict[str, torch.Tensor] = {}
        self.weight = 0
        self.tokens, self.since = 0, time.perf_counter()
        if self.main:
            rows = read_jsonl(self.path) if start > 0 and self.path.is_file() else []
            with atomic_write(self.path) as handle:
                for row in rows:
                    if row["step"] <= start:
                        handle.write(json.dumps(row) + "\n")
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not self.main,
                        dynamic_ncols=True)

    def add(self, sums: dict[str, torch.Tensor], weight: int, tokens: int) -> None:
        """Add one step: `sums` over `weight` units (tokens or pairs); `tokens` for the speed."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.weight += weight
        self.tokens += tokens
        self.bar.update()

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write the means since the last row together with `values` (learning_rate, eval_loss, ...)."""
        means = {name: float(value) / self.weight for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.since
        row = {"step": step, **means, **values}
        if self.tokens:
            row["tokens_per_second"] = round(self.tokens / seconds, 1)
        self.sums, self.weight, self.tokens = {}, 0, 0
        self.since = time.perf_counter()
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        shown = ("loss", "eval_loss", "rewards/margins", "tokens_per_second")
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown if name in row})

    def close(self) -> None:
        self.bar.close()
