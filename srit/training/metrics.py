"""metrics.jsonl, one row per logged step, and a progress bar."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srit.data.batches import Example, Pair
from srit.runtime import distributed
from srit.runtime.files import atomic_write
from srit.runtime.jsonl import cut_torn_line, has_rows, read_jsonl
from srit.runtime.outcome import Diverged
from srit.runtime.progress_bar import progress_bar
from srit.training.checkpoint import TrainState


class MetricsLog:
    """Means over the steps since the last row; steps that are not finite are left out and counted.

    Resuming at step k drops the rows after step k: those steps are trained, and logged, again. What
    was added before step k but not yet written comes back from `state.log`. Values stay on their
    device until a row is written, so adding one never waits for the GPU. Only rank 0 writes.
    """

    def __init__(self, output_dir: str | Path, state: TrainState, max_skipped_steps: int) -> None:
        self.path, self.state = Path(output_dir) / "metrics.jsonl", state
        self.max_skipped_steps = max_skipped_steps
        self.main = distributed.rank() == 0
        pending = state.log or {"sums": {}, "weight": 0.0}
        self.sums = {name: torch.tensor(value) for name, value in pending["sums"].items()}
        self.weight = torch.tensor(pending["weight"], dtype=torch.float64)
        self.tokens, self.since = 0, time.perf_counter()
        self.unchecked: list[tuple[int, list[str], Tensor]] = []  # step, row ids, finite
        if self.main:
            cut_torn_line(self.path)
            rows = read_jsonl(self.path) if state.step > 0 and has_rows(self.path) else []
            with atomic_write(self.path) as handle:
                for row in rows:
                    if row["step"] <= state.step:
                        handle.write(json.dumps(row) + "\n")
        self.bar = progress_bar(total=state.total_steps, initial=state.step, unit="step")

    def add(self, sums: Mapping[str, Tensor], grad_norm: Tensor, weight: int,
            items: Sequence[Example | Pair], finite: Tensor) -> None:
        """Add the step that `state` is at: `sums` over `weight` tokens or pairs, trained on `items`."""
        for name, value in {**sums, "grad_norm": grad_norm * weight}.items():
            before = self.sums.get(name, 0.0)
            before = before.to(value.device) if isinstance(before, Tensor) else before
            self.sums[name] = before + torch.where(finite, value, 0.0)
        self.weight = self.weight.to(finite.device) + weight * finite
        self.tokens += sum(item.num_tokens for item in items)
        self.unchecked.append((self.state.step, [item.id for item in items], finite))
        self.bar.update()

    def pending(self) -> dict[str, Any]:
        """What was added since the last row, to go on with after a restart."""
        self._count_skipped()
        return {"sums": {name: float(value) for name, value in self.sums.items()},
                "weight": float(self.weight)}

    def write(self, learning_rate: float, epoch: float, values: Mapping[str, float]) -> None:
        """Write the means since the last row, together with `values` (eval_loss, ...).

        Without a single finite step the means are null.
        """
        self._count_skipped()
        weight = float(self.weight)
        means = {name: float(value) / weight if weight else None
                 for name, value in self.sums.items()}
        row = {"step": self.state.step, **means, "learning_rate": learning_rate, "epoch": epoch,
               "num_tokens": self.state.num_tokens, "skipped_steps": self.state.skipped_steps, **values}
        if self.tokens:
            seconds = time.perf_counter() - self.since
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

    def last_step_was_finite(self) -> bool:
        """False when the last step was skipped, also if that was before a restart."""
        self._count_skipped()
        return self.state.last_step_finite

    def close(self) -> None:
        self.bar.close()

    def _count_skipped(self) -> None:
        """Count the steps that were skipped since the last call, and name their rows.

        Raises Diverged when the run has skipped more than max_skipped_steps.
        """
        steps, self.unchecked = self.unchecked, []
        finite = torch.stack([ok for _, _, ok in steps]).tolist() if steps else []
        for (step, ids, _), ok in zip(steps, finite, strict=True):
            self.state.last_step_finite = ok
            if ok:
                continue
            self.state.skipped_steps += 1
            text = (f"step {step}: loss or gradient is not finite; rows of this step: "
                    f"{', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}")
            if self.state.skipped_steps > self.max_skipped_steps:
                raise Diverged(f"{text}. {self.state.skipped_steps} steps were skipped for this, "
                                 f"--max_skipped_steps is {self.max_skipped_steps}: lower "
                                 "--learning_rate, or look at these rows")
            if self.main:
                print(f"\nskipped {text}", file=sys.stderr)
