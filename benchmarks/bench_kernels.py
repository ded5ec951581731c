"""Benchmark of the linear head against its peers: correctness first, then time and memory.

    python benchmarks/bench_kernels.py                  everything that this device can run
    python benchmarks/bench_kernels.py --plot FILE.csv  Markdown table and figures from a CSV

Stages: `score` (log-probs, no gradient), `train` (mean NLL, forward and backward), `frozen` (the same
with a frozen head), `dpo` (preference loss of pairs whose prompts are as long as their completions).
Every contender must first agree with float64. The roofline is measured: the bare GEMMs of the stage, on
one chunk of rows, in the same dtype. Contenders take turns, so noise of the machine hits all alike.
Peak memory is what a call adds. Peers that are not installed are named and left out. Writes
benchmarks/results/bench_kernels_<device>.csv after every shape.
"""

import argparse
import csv
import ctypes
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tables import pyplot, write_csv
from torch import Tensor

from srit.kernels import dpo_loss, linear_dpo, linear_logp, linear_nll, segment_sum
from srit.kernels.chunks import chunk_limit
from srit.kernels.linear_logp import linear_logp_ref
from srit.runtime.run_dir import describe

MODELS = {  # D, V
    "SmolLM2-135M": (576, 49152),
    "Llama-3.2-1B": (2048, 128256),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
}
GEMMS = {"score": 1, "train": 3, "frozen": 2, "dpo": 3}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative Frobenius error against float64
BETA = 0.1


@dataclass
class Problem:
    """N rows to score; for `dpo`, sequences of one length, half prompt and half completion."""

    stage: str
    hidden: Tensor  # (N, D); dpo: (2B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,); dpo: (2B, T), the token that each position predicts
    rows: Tensor | None = None  # dpo: the completions' positions in the flattened hidden
    cu_targets: Tensor | None = None
    ref: Tensor | None = None  # (2B,)

    @property
    def scored(self) -> int:
        return len(self.targets) if self.rows is None else len(self.rows)

    def completions(self) -> tuple[Tensor, Tensor]:
        """Hidden states and targets of the scored rows of `dpo`."""
        return self.hidden.flatten(0, 1)[self.rows], self.targets.flatten()[self.rows]


def make_problem(stage: str, n: int, d: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Random hidden states of unit size, weights that give logits of a few units."""
    torch.manual_seed(n + d)
    trained = stage != "score"
    weight = (torch.randn(vocab, d, device=device) * 2 / d**0.5).to(dtype)
    weight.requires_grad_(trained and stage != "frozen")
    if stage != "dpo":
        hidden = torch.randn(n, d, device=device).to(dtype).requires_grad_(trained)
        return Problem(stage, hidden, weight, torch.randint(0, vocab, (n,), device=device))
    length = min(512, n)
    sequences = 2 * max(1, n // length)
    hidden = torch.randn(sequences, length, d, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (sequences, length), device=device)
    half = torch.arange(length // 2, length, device=device)
    rows = (torch.arange(sequences, device=device)[:, None] * length + half).flatten()
    cu = torch.arange(0, len(rows) + 1, len(half), dtype=torch.int32)
    ref = torch.randn(sequences, device=device) - 8.0 * len(half)
    return Problem(stage, hidden, weight, targets, rows, cu, ref)


def result(p: Problem, logps: Tensor) -> Tensor:
    return logps if p.stage == "score" else -logps.mean()


def ours_logp(p: Problem) -> Tensor:
    return result(p, linear_logp(p.hidden, p.weight, p.targets, path="gemm"))


def ours_fused(p: Problem) -> Tensor:
    return linear_logp(p.hidden, p.weight, p.targets, path="fused")


def ours_nll(p: Problem) -> Tensor:
    return linear_nll(p.hidden, p.weight, p.targets, scale=1 / len(p.targets))


def eager(p: Problem) -> Tensor:
    return result(p, linear_logp_ref(p.hidden, p.weight, p.targets))


_compiled = torch.compile(linear_logp_ref)


def compiled(p: Problem) -> Tensor:
    return result(p, _compiled(p.hidden, p.weight, p.targets))


def selective(p: Problem) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    # All rows as one sequence: its branch for 16 bits loops over sequences.
    return result(p, selective_log_softmax(F.linear(p.hidden, p.weight)[None], p.targets[None])[0])


def trl_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The head of TRL's trainers since 1.15: chunks of tokens and vocabulary, logits made twice."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ())[0]


def trl_chunked(p: Problem) -> Tensor:
    return result(p, trl_logps(p.hidden, p.weight, p.targets))


def torch_chunked(p: Problem) -> Tensor:
    # Its own chunk size is many times slower on a CPU, and its sums in bf16 are too coarse.
    rows = min(p.scored, chunk_limit(p.hidden, len(p.weight), None))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, acc_policy="accurate")
    return F.linear_cross_entropy(p.hidden, p.weight, p.targets, options=options)


def liger(p: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(p.weight, p.hidden, p.targets)


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(p.hidden, p.weight, p.targets)


def pair_loss(p: Problem, sums: Tensor) -> Tensor:
    return dpo_loss(sums[0::2], sums[1::2], p.ref[0::2], p.ref[1::2], BETA)[0].sum()


def ours_dpo(p: Problem) -> Tensor:
    x, targets = p.completions()
    return linear_dpo(x, p.weight, targets, p.cu_targets, p.ref, beta=BETA)[0]


def ours_two_pass(p: Problem) -> Tensor:
    x, targets = p.completions()
    return pair_loss(p, segment_sum(linear_logp(x, p.weight, targets, path="gemm"), p.cu_targets))


def trl_dpo(p: Problem) -> Tensor:
    """TRL since 1.15: on a GPU prompts never reach the head, on a CPU they are masked behind it."""
    if p.hidden.is_cuda:
        x, targets = p.completions()
        return pair_loss(p, trl_logps(x, p.weight, targets).view(len(p.ref), -1).sum(1))
    return masked_loss(p, trl_logps(p.hidden.flatten(0, 1), p.weight, p.targets.flatten()))


def trl_all_rows(p: Problem) -> Tensor:
    """TRL to 1.13, without Liger: logits of all rows; prompts are masked behind the head."""
    from trl.trainer.utils import selective_log_softmax

    return masked_loss(p, selective_log_softmax(F.linear(p.hidden, p.weight), p.targets).flatten())


def masked_loss(p: Problem, logps: Tensor) -> Tensor:
    """The loss from log-probs of all positions, flattened."""
    mask = torch.zeros_like(logps)
    mask[p.rows] = 1
    return pair_loss(p, (logps * mask).view(p.targets.shape).sum(1))


def eager_completions(p: Problem) -> Tensor:
    x, targets = p.completions()
    return pair_loss(p, linear_logp_ref(x, p.weight, targets).view(len(p.ref), -1).sum(1))


def liger_dpo(p: Problem) -> Tensor:
    """Takes no cached reference but scores one: here with the same states and weight."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    labels = torch.full_like(p.targets, -100).flatten()
    labels[p.rows] = p.targets.flatten()[p.rows]
    labels = labels.view_as(p.targets)
    order = torch.arange(len(p.ref), device=labels.device).view(-1, 2).t().flatten()
    x = p.hidden[order]
    loss, _ = LigerFusedLinearDPOLoss(beta=BETA)(
        p.weight, x, labels[order], ref_input=x.detach(), ref_weight=p.weight.detach())
    return loss * (len(p.ref) // 2)


PEERS = {"trl chunked": trl_chunked, "torch chunked": torch_chunked, "liger": liger,
         "cut-cross-entropy": cut_cross_entropy}
CONTENDERS = {  # the first is the one that the others are compared with
    "score": {"srit": ours_logp, "eager float32": eager, "selective": selective,
              "trl chunked": trl_chunked,
              "torch.compile": compiled, "srit fused": ours_fused},
    "train": {"srit linear_nll": ours_nll, "srit linear_logp": ours_logp, "eager float32": eager,
              "selective": selective, "torch.compile": compiled, **PEERS},
    "frozen": {"srit linear_nll": ours_nll, "srit linear_logp": ours_logp, "eager float32": eager,
               "torch.compile": compiled, **PEERS},
    "dpo": {"srit linear_dpo": ours_dpo, "srit linear_logp": ours_two_pass,
            "trl": trl_dpo, "trl <= 1.13, all rows": trl_all_rows,
            "eager, completions": eager_completions, "liger dpo": liger_dpo},
}
PACKAGES = {**dict.fromkeys(("selective", "trl", "trl chunked", "trl <= 1.13, all rows"), "trl"),
            "liger": "liger_kernel", "liger dpo": "liger_kernel",
            "cut-cross-entropy": "cut_cross_entropy"}
GPU_ONLY = ("srit fused", "liger", "liger dpo", "cut-cross-entropy")

Function = Callable[[Problem], Tensor]


def contenders(stage: str, device: str) -> dict[str, Function]:
    """Those that can run here; prints the others."""
    found = {}
    for name, function in CONTENDERS[stage].items():
        if (name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None
                or name in GPU_ONLY and device != "cuda"
                or name == "torch chunked" and not hasattr(F, "linear_cross_entropy")):
            print(f"{stage}: {name} is left out: not installed, or not for this device")
        else:
            found[name] = function
    return found


def call(function: Function, p: Problem) -> list[Tensor]:
    """The value, and the gradients of what is trained."""
    if p.stage == "score":
        with torch.no_grad():
            return [function(p)]
    p.hidden.grad = p.weight.grad = None
    loss = function(p)
    loss.backward()
    return [loss.detach(), p.hidden.grad, *([p.weight.grad] if p.weight.requires_grad else [])]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check(stage: str, dtype: torch.dtype, device: str,
          found: dict[str, Function]) -> dict[str, Function]:
    """Those that agree with float64 at an odd shape; exits if one of ours does not."""
    p = make_problem(stage, 515, 64, 5003, dtype, device)
    wide = Problem(stage, p.hidden.detach().double(), p.weight.detach().double(), p.targets, p.rows,
                   p.cu_targets, p.ref)
    wide.hidden.requires_grad_(p.hidden.requires_grad)
    wide.weight.requires_grad_(p.weight.requires_grad)
    want = call(eager_completions if stage == "dpo" else eager, wide)
    passed = {}
    for name, function in found.items():
        if name == "liger dpo":  # without the cached reference its loss is another one
            passed[name] = function
            continue
        try:
            worst = max(map(relative_error, call(function, p), want))
        except Exception as error:
            if name.startswith("srit"):
                raise
            print(f"{stage} {dtype}: {name} is left out: {type(error).__name__}: {error}"[:200])
            continue
        if worst <= BOUNDS[dtype]:
            passed[name] = function
        elif name.startswith("srit"):
            raise SystemExit(f"{stage} {dtype}: {name} is off by {worst:.1e} from float64")
        else:
            print(f"{stage} {dtype}: {name} is left out: off by {worst:.1e} from float64")
    return passed


def timed(function: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(function: Callable[[], object], device: str) -> int:
    """Peak memory that one call adds.

    On the CPU from the kernel's high-water mark of the process, which can be reset. Freed memory that
    glibc keeps is returned first; the call could use it without being counted.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    function()
    return (status_kib("VmHWM") - before) >> 10


def status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def gemm_milliseconds(p: Problem, device: str, rounds: int) -> float:
    """The stage's bare GEMMs over all scored rows, from one chunk of them."""
    w = p.weight.detach()
    rows = min(p.scored, chunk_limit(w, len(w), None))
    x = p.hidden.detach().flatten(0, -2)[:rows].contiguous()
    z = torch.empty(rows, len(w), dtype=w.dtype, device=device)
    g, dx, dw = torch.randn_like(z), torch.empty_like(x), torch.empty_like(w)
    work = [lambda: torch.mm(x, w.t(), out=z), lambda: torch.mm(g, w, out=dx),
            lambda: torch.mm(g.t(), x, out=dw)][: GEMMS[p.stage]]
    total = 0.0
    for function in work:
        function()
        total += statistics.median(timed(function, device) for _ in range(rounds))
    return total * p.scored / rows


def measure(p: Problem, found: dict[str, Function], model: str, n: int, device: str,
            rounds: int) -> list[dict]:
    """Time and peak memory of every contender, one CSV row each."""
    torch._dynamo.reset()  # compile for this shape only
    peaks, times = {}, {name: [] for name in found}
    for name, function in found.items():
        try:
            call(function, p)  # compiles and warms up
            p.hidden.grad = p.weight.grad = None
            peaks[name] = peak_mib(lambda f=function: call(f, p), device)
        except torch.OutOfMemoryError:
            peaks[name] = None
        torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, function in found.items():
            if peaks[name] is not None:
                times[name].append(timed(lambda f=function: call(f, p), device))
    p.hidden.grad = p.weight.grad = None
    gemm = gemm_milliseconds(p, device, rounds)
    base = statistics.median(times[next(iter(found))])
    flops = 2 * GEMMS[p.stage] * p.scored * p.weight.numel()
    rows = []
    for name, values in times.items():
        row = {"stage": p.stage, "model": model, "n": n, "scored": p.scored,
               "d": p.weight.shape[1], "v": len(p.weight),
               "dtype": str(p.weight.dtype).removeprefix("torch."), "contender": name}
        if not values:
            rows.append(row | {"peak_mib": "out of memory"})
            continue
        p20, p80 = (sorted(values)[round(q * (len(values) - 1))] for q in (0.2, 0.8))
        p50 = statistics.median(values)
        rows.append(row | {
            "p20_ms": round(p20, 3), "p50_ms": round(p50, 3), "p80_ms": round(p80, 3),
            "tflops": round(flops / p50 / 1e9, 2), "percent_of_gemm": round(100 * gemm / p50, 1),
            "ratio_to_ours": round(p50 / base, 2), "peak_mib": peaks[name]})
    return rows


def show(rows: list[dict]) -> None:
    print("\n{stage}  {model}  N={scored}  {dtype}".format(**rows[0]))
    for row in rows:
        if "p50_ms" not in row:
            print(f"  {row['contender']:22} out of memory")
            continue
        print("  {contender:22} {p50_ms:10.2f} ms {ratio_to_ours:6.2f}x  {percent_of_gemm:6.1f} % of "
              "GEMM rate {peak_mib:7d} MiB".format(**row), flush=True)


def stamp_of_this_run() -> dict:
    """Taken before the first result is written: that would make the working tree dirty."""
    about = describe()
    stamp = {"device": about["machine"], "torch": torch.__version__, "commit": about["commit"]}
    if importlib.util.find_spec("triton"):
        import triton

        stamp["triton"] = triton.__version__
    return stamp


def fused_table(rows: list[dict], device_name: str) -> None:
    """Prints the entry of FUSED_UP_TO: the largest D at which path B wins, for N = 16384."""
    times = {(r["d"], r["contender"]): r["p50_ms"] for r in rows
             if r["stage"] == "score" and r["n"] == 16384 and "p50_ms" in r}
    wins = [d for d, name in times if name == "srit fused" and times[d, name] < times[d, "srit"]]
    print(f"\nFUSED_UP_TO: {{{device_name!r}: {max(wins, default=0)}}}")


def plot(path: Path, rows: list[dict]) -> None:
    """One figure per stage and dtype: time relative to ours, and peak memory."""
    plt = pyplot()
    for stage, dtype in dict.fromkeys((row["stage"], row["dtype"]) for row in rows):
        part = [row for row in rows if (row["stage"], row["dtype"]) == (stage, dtype) and row["p50_ms"]]
        shapes = list(dict.fromkeys((row["model"], row["n"]) for row in part))
        names = list(dict.fromkeys(row["contender"] for row in part))
        step = len(names) + 1
        figure, axes = plt.subplots(1, 2, figsize=(10, max(2.4, 0.3 * len(shapes) * step + 1.2)),
                                    sharey=True)
        for axis, column, form in ((axes[0], "ratio_to_ours", "%.2f"), (axes[1], "peak_mib", "%.0f")):
            for j, name in enumerate(names):
                own = [row for row in part if row["contender"] == name]
                bars = axis.barh([-shapes.index((row["model"], row["n"])) * step - j for row in own],
                                 [float(row[column]) for row in own], color=f"C{j}")
                axis.bar_label(bars, fmt=form, padding=3, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.12)
        axes[0].set_yticks([-i * step - j for i in range(len(shapes)) for j in range(len(names))],
                           names * len(shapes))
        for i, (model, n) in enumerate(shapes):
            axes[0].text(0, -i * step + 0.6, f"{model}, N = {n}", fontsize=9, fontweight="bold")
        axes[0].axvline(1, color="#666666", linewidth=0.8)
        axes[0].set_xlabel(f"time / {names[0]}")
        axes[1].set_xlabel("peak memory, MiB")
        figure.suptitle(f"{stage}, {dtype}, {part[0]['device']}, torch {part[0]['torch']}", fontsize=10)
        figure.tight_layout()
        target = path.with_name(f"{path.stem}_{stage}_{dtype}.svg")
        figure.savefig(target)
        plt.close(figure)
        print(target)


def table(rows: list[dict]) -> None:
    print("| stage | model, N | dtype | contender | ms | of ours | of bare GEMMs | peak MiB |")
    print("|---|---|---|---|--:|--:|--:|--:|")
    for row in rows:
        ms, share = float(row["p50_ms"] or "nan"), float(row["percent_of_gemm"] or "nan")
        print(f"| {row['stage']} | {row['model']}, {row['n']} | {row['dtype']} | {row['contender']} | "
              f"{ms:.{0 if ms > 100 else 1}f} | {row['ratio_to_ours']} | {share:.0f} % | "
              f"{row['peak_mib']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--stages", nargs="+", choices=list(GEMMS), default=list(GEMMS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS),
                        default=list(MODELS) if gpu else ["SmolLM2-135M"])
    parser.add_argument("--rows", nargs="+", type=int, metavar="N",
                        default=[16384, 4096, 65536] if gpu else [2048],
                        help="N, scored rows; dpo has as many prompt rows besides")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"],
                        default=["bfloat16"] if gpu else ["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5)
    parser.add_argument("--time_limit", type=float, default=float("inf"),
                        help="seconds; shapes that would start later are skipped")
    parser.add_argument("--output")
    parser.add_argument("--plot", metavar="CSV", help="only show a CSV: table and figures")
    args = parser.parse_args()
    if args.plot:
        with open(args.plot, newline="") as handle:
            rows = list(csv.DictReader(handle))
        table(rows)
        plot(Path(args.plot), rows)
        return
    device = "cuda" if gpu else "cpu"
    started, rows, stamp = time.monotonic(), [], stamp_of_this_run()
    slug = stamp["device"].replace(" ", "-") if gpu else "cpu"
    output = Path(args.output or Path(__file__).parent / f"results/bench_kernels_{slug}.csv")
    print(stamp["device"])
    found = {(stage, name): check(stage, getattr(torch, name), device, contenders(stage, device))
             for name in args.dtypes for stage in args.stages}
    for n in args.rows:
        for model in args.models:
            for stage, name in found:
                if time.monotonic() - started > args.time_limit:
                    print(f"time limit: {stage} {model} N={n} {name} skipped")
                    continue
                d, vocab = MODELS[model]
                problem = make_problem(stage, n, d, vocab, getattr(torch, name), device)
                new = measure(problem, found[stage, name], model, n, device, args.rounds)
                show(new)
                rows += new
                write_csv([row | stamp for row in rows], output)
    if gpu and "score" in args.stages:
        fused_table(rows, stamp["device"])
    print(output)


if __name__ == "__main__":
    main()
