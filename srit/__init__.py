"""Self-refine instruction-tuning: make a small language model reason like a large one."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for each other by spinning, by default for many milliseconds. Beside one other
# busy process that made a training step 16 times as long; this bound makes it two (docs/step.md).
# It is read as torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
