"""metrics.jsonl, one row per logged step, and a progress bar."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from srit.runtime import distributed
from srit.runtime.files import atomic_write
from srit.runtime.jsonl import cut_torn_line, has_rows, read_jsonl


class MetricsLog:
    """Averages what a step adds, and writes it when asked.

    Resuming at step k drops the rows after step k: those steps are trained, and logged, again; what
    was added before step k but not yet written comes back from `pending`. Values stay tensors on
    their device until a row is written, so adding one never waits for the GPU. Other ranks than 0
    write nothing.
    """

    def __init__(self, output_dir: str | Path, start: int, total: int,
                 pending: dict[str, Any] | None = None) -> None:
        self.path = Path(output_dir) / "metrics.jsonl"
        self.main = distributed.rank() == 0
        pending = pending or {"sums": {}, "weight": 0.0}
        self.sums = {name: torch.tensor(value) for name, value in pending["sums"].items()}
        self.weight = torch.tensor(pending["weight"], dtype=torch.float64)
        self.tokens, self.since = 0, time.perf_counter()
        if self.main:
            cut_torn_line(self.path)
            rows = read_jsonl(self.path) if start > 0 and has_rows(self.path) else []
            with atomic_write(self.path) as handle:
                for row in rows:
                    if row["step"] <= start:
                        handle.write(json.dumps(row) + "\n")
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not self.main,
                        dynamic_ncols=True)

    def add(self, sums: dict[str, torch.Tensor], weight: int, tokens: int,
            finite: torch.Tensor) -> None:
        """Add one step: `sums` over `weight` units (tokens or pairs); `tokens` for the speed.

        A step that is not `finite` was skipped, and has no part in the means.
        """
        for name, value in sums.items():
            before = self.sums.get(name, 0.0)
            before = before.to(value.device) if isinstance(before, torch.Tensor) else before
            self.sums[name] = before + torch.where(finite, value, 0.0)
        self.weight = self.weight.to(finite.device) + weight * finite
        self.tokens += tokens
        self.bar.update()

    def pending(self) -> dict[str, Any]:
        """What was added since the last row, to go on with after a restart."""
        return {"sums": {name: float(value) for name, value in self.sums.items()},
                "weight": float(self.weight)}

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write the means since the last row together with `values` (learning_rate, eval_loss, ...).

        Without a single finite step the means are null.
        """
        weight = float(self.weight)
        means = {name: float(value) / weight if weight else None
                 for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.since
        row = {"step": step, **means, **values}
        if self.tokens:
            row["tokens_per_second"] = round(self.tokens / seconds, 1)
        self.sums, self.weight, self.tokens = {}, torch.zeros((), dtype=torch.float64), 0
        self.since = time.perf_counter()
        if not self.main:
            return
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        shown = ("loss", "eval_loss", "rewards/margins", "tokens_per_second")
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown
                              if row.get(name) is not None})

    def close(self) -> None:
        self.bar.close()
