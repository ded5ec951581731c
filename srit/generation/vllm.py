"""The interface of srit.sampling.generate on vLLM, for those who have it (extra: vllm).

Same requests, settings, results and calls back. What differs: vLLM's kernels sum in an order that
depends on the batch, so a text is not the same bits from run to run as it is with our own engine.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from pathlib import Path

from srit.generation.engine import Request, Result, check_sampling
from srit.models.load import read_config
from srit.runtime.files import InputError


class VLLM:
    """A checkpoint served by vLLM; `config` as in our own Decoder.

    Args:
        path: a directory in Hugging Face layout. slots: sequences decoded together. cache_bytes: for
        keys and values; None leaves it to vLLM, which takes nearly all of the GPU.
    Raises InputError when vLLM is not installed or the path is no such directory.
    """

    def __init__(self, path: Path, dtype: str, slots: int, cache_bytes: int | None,
                 needs_text: bool) -> None:
        if not path.is_dir():
            raise InputError(f"{path}: --engine vllm reads directories in Hugging Face layout; convert "
                             "with `srit convert`, or use --engine srit")
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"--engine vllm: vLLM cannot be imported ({error}); install it with `pip "
                             "install 'srit[vllm]'`, or use --engine srit") from error
        memory = {} if cache_bytes is None else {"kv_cache_memory_bytes": cache_bytes}
        self.config = read_config(path)
        # Only stop strings need vLLM's own tokenizer: prompts are ids, and so are answers.
        self.engine = LLM(str(path), dtype=dtype, max_num_seqs=slots, enable_prefix_caching=True,
                          skip_tokenizer_init=not needs_text, trust_remote_code=False,
                          **memory).llm_engine

    def generate(self, requests: Sequence[Request], *, stop_ids: Collection[int],
                 max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
                 min_p: float = 0.0, repetition_penalty: float = 1.0, stop_strings: Sequence[str] = (),
                 return_logps: bool = False,
                 on_finish: Callable[[Request, Result], None] = lambda request, result: None,
                 should_stop: Callable[[], bool] = lambda: False,
                 **settled: object) -> dict[Hashable, Result]:
        """As srit.sampling.generate, whose other settings were settled with the engine's start."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens)
        for number, request in enumerate(requests):
            self.engine.add_request(
                str(number), {"prompt_token_ids": list(request.prompt_ids)},
                SamplingParams(
                    temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                    repetition_penalty=repetition_penalty, seed=request.seed % 2**63,
                    max_tokens=max_new_tokens, stop=list(stop_strings),
                    stop_token_ids=sorted(stop_ids), ignore_eos=True, detokenize=bool(stop_strings),
                    logprobs=0 if return_logps else None,
                    output_kind=RequestOutputKind.FINAL_ONLY))
        results: dict[Hashable, Result] = {}
        while self.engine.has_unfinished_requests():
            if should_stop():
                left = (n for n, request in enumerate(requests) if request.key not in results)
                self.engine.abort_request([str(n) for n in left])
                break
            for output in self.engine.step():
                request = requests[int(output.request_id)]
                results[request.key] = result = _result(output.outputs[0], request, return_logps)
                on_finish(request, result)
        return results


def _result(output, request: Request, return_logps: bool) -> Result:
    """vLLM's answer as ours: without the stop token, but with a stop string's tokens."""
    if output.finish_reason not in ("stop", "length"):
        raise InputError(f"{request.key}: vLLM gave up on the request ({output.finish_reason})")
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)] \
        if return_logps else None
    if isinstance(output.stop_reason, int):
        ids.pop()
    return Result(ids, output.finish_reason == "stop", logps)
