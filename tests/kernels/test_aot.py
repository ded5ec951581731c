"""Every kernel compiles for sm_80 and sm_90; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aot.py")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes available to a program
NAMES = {"logp_kernel", "grad_kernel", "multiply_kernel", "segment_sum_kernel", "head_kernel",
         "partials_kernel", "merge_kernel", "paged_attention_kernel"}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
def test_no_spill_wide_accesses_and_tensor_cores(arch):
    """Wide accesses where bytes count; products on tensor cores, on sm_90 by wgmma fed by TMA."""
    # In a process of its own: in this one kernels are interpreted.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, str(arch)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {b["kernel"] for b in built} == NAMES
    for b in built:
        assert b["arch"] == arch and b["spilled"] == 0, b
        assert b["shared"] <= SHARED[arch], b
        if b["kernel"] == "partials_kernel":
            half = b["dtype"] != "fp32"
            assert b["registers"] <= 255, b
            assert bool(b["wgmma"]) == (half and arch == 90), b
            assert bool(b["mma"]) == (half and arch == 80), b
            assert bool(b["tma"]) == b["TMA"], b
            continue
        if b["kernel"] == "paged_attention_kernel":
            assert bool(b["mma"]) == (b["dtype"] != "fp32"), b
            assert b["registers"] <= 255 and b["widest_access_bits"] == 128, b
            continue
        assert b["registers"] <= 64, b  # with 8 warps: 4 programs per SM
        if b.get("VOCAB", 0) > 4096:
            assert b["widest_access_bits"] == 128, b
    assert any(b.get("TMA") for b in built) == (arch == 90)
