"""srit.generation.engine.generate on vLLM, for those who have it (extra: vllm).

Same requests, params, results and callbacks. The difference: vLLM's kernels sum in an order that
depends on the batch, so its texts are not reproducible bit for bit as those of our engine are.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path

from srit.generation.params import Request, Result, SamplingParams
from srit.models.load import read_config
from srit.runtime.files import InputError


class VLLM:
    """A checkpoint served by vLLM; `config` as in our Decoder.

    Args:
        path: a directory in Hugging Face layout. slots: sequences that decode together. cache_bytes:
        size of the KV cache; None leaves it to vLLM, which takes nearly all of the GPU. needs_text:
        whether there are stop strings.
    Raises InputError when vLLM is not installed or `path` is not a directory.
    """

    def __init__(self, path: Path, dtype: str, slots: int, cache_bytes: int | None,
                 needs_text: bool) -> None:
        if not path.is_dir():
            raise InputError(f"{path}: --engine vllm reads directories in Hugging Face layout; convert "
                             "with `srit convert`, or use --engine srit")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise InputError(f"--engine vllm: vLLM cannot be imported ({error}); install it with `pip "
                             "install 'srit[vllm]'`, or use --engine srit") from error
        more = {} if cache_bytes is None else {"kv_cache_memory_bytes": cache_bytes}
        if current_platform.is_cpu():  # between chunks it rewinds a seed's generator: an error on a CPU
            more["enable_chunked_prefill"] = False
        self.config = read_config(path)
        # Prompts and answers are token ids: only stop strings need vLLM's own tokenizer.
        self.engine = LLM(str(path), dtype=dtype, max_num_seqs=slots, enable_prefix_caching=True,
                          skip_tokenizer_init=not needs_text, trust_remote_code=False,
                          **more).llm_engine

    def generate(self, requests: Sequence[Request], params: SamplingParams, *,
                 stop_ids: Collection[int],
                 on_finish: Callable[[Request, Result], None] = lambda request, result: None,
                 should_stop: Callable[[], bool] = lambda: False,
                 **fixed: object) -> dict[Hashable, Result]:
        """As srit.generation.engine.generate; its other settings were fixed when the engine started.

        Raises InputError for params with the calculator.
        """
        if params.calculator:
            raise InputError("vLLM has no calculator; use srit.generation.engine.generate")
        import vllm
        from vllm.sampling_params import RequestOutputKind

        for number, request in enumerate(requests):
            self.engine.add_request(
                str(number), {"type": "token", "prompt_token_ids": list(request.prompt_ids)},
                vllm.SamplingParams(
                    temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
                    min_p=params.min_p, repetition_penalty=params.repetition_penalty,
                    seed=request.seed % 2**63, max_tokens=params.max_new_tokens,
                    stop=list(params.stop_strings), stop_token_ids=sorted(stop_ids), ignore_eos=True,
                    detokenize=bool(params.stop_strings), logprobs=0 if params.return_logps else None,
                    output_kind=RequestOutputKind.FINAL_ONLY))
        results: dict[Hashable, Result] = {}
        while self.engine.has_unfinished_requests():
            if should_stop():
                left = (n for n, request in enumerate(requests) if request.key not in results)
                self.engine.abort_request([str(n) for n in left])
                break
            for output in self.engine.step():
                request = requests[int(output.request_id)]
                result = _result(output.outputs[0], request, params.return_logps)
                results[request.key] = result
                on_finish(request, result)
        return results


def _result(output, request: Request, return_logps: bool) -> Result:
    """vLLM's output as a Result: without the stop token, but with the tokens of a stop string."""
    if output.finish_reason not in ("stop", "length"):
        raise InputError(f"{request.key}: vLLM gave up on the request ({output.finish_reason})")
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)] \
        if return_logps else None
    if isinstance(output.stop_reason, int):
        ids.pop()
    return Result(ids, output.finish_reason == "stop", logps)
