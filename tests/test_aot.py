"""Every kernel compiles for the GPUs it is meant for; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aot.py")
SHARED = {80: 164 << 10, 90: 228 << 10}  # bytes an SM


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills_and_with_wide_accesses(arch):
    # Apart from this process, whose kernels are interpreted ones.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"logp_kernel", "grad_kernel", "segment_sum_kernel", "head_kernel", "head_backward_kernel"}
    assert {b["kernel"] for b in built} == names
    for b in built:
        assert b["arch"] == arch and b["spilled"] == 0, b
        assert b["registers"] <= 64, b  # 8 warps of these fill an SM
        assert b["shared"] <= SHARED[arch], b
        if b.get("VOCAB", 0) > 4096:
            assert b["widest_access_bits"] == 128, b
