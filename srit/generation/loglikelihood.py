"""Multiple choice without generation: the option that the model finds likeliest.

lm-evaluation-harness scores such data sets in this way.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from srit.config import EvalConfig
from srit.generation.params import Result
from srit.generation.rollouts import Prompt, make_row
from srit.kernels import linear_logp
from srit.models import Decoder, KVCache
from srit.runtime import distributed
from srit.runtime.files import InputError
from srit.runtime.jsonl import write_jsonl
from srit.text.tokenizer import Tokenizer


def choose_options(model: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], path: Path,
                   cfg: EvalConfig) -> list[dict]:
    """The likeliest option of every question as graded rows, which rank 0 writes to `path`.

    Raises InputError for a question that is not multiple choice.
    """
    for prompt in prompts:
        if prompt.row["task"] != "choice":
            raise InputError(f"{prompt.file}: {prompt.row['id']!r} is a {prompt.row['task']} "
                             "question; --scoring options needs multiple choice")
    options = max(len(p.row["choices"]) for p in prompts)
    longest = max(len(p.ids) for p in prompts) + cfg.max_new_tokens
    device = model.head_weight.device
    cache = KVCache(model.config, 2 * options, longest, model.compute_dtype, device)
    # Each rank fills in its own questions; the sum over ranks has them all.
    logps = torch.zeros(len(prompts), 2, options, dtype=torch.float64, device=device)
    for at in range(distributed.rank(), len(prompts), distributed.world_size()):
        choices = prompts[at].row["choices"]
        scores = score_options(model, tokenizer, cache, prompts[at].ids, choices)
        for form, key in enumerate(("letter", "text")):
            logps[at, form, : len(choices)] = torch.tensor(list(scores[key].values()))
    rows = []
    for prompt, (letter, text) in zip(prompts, distributed.all_reduce_sum(logps).tolist(), strict=True):
        choices, answer = prompt.row["choices"], prompt.row["answer"]
        by_letter, by_text = (dict(zip(choices, part, strict=False)) for part in (letter, text))
        picked = best_option(by_letter)
        rows.append(make_row(prompt, 0, Result([], True), tokenizer, cfg) | {
            "text": picked, "extracted": picked, "correct": picked == answer,
            "correct_strict": picked == answer, "logp_letter": by_letter, "logp_text": by_text,
            "correct_text": best_option(by_text) == answer,
            "correct_text_norm": best_option(by_text, choices) == answer,
        })
    if distributed.rank() == 0:
        write_jsonl(path, rows)
    return rows


def score_options(model: Decoder, tokenizer: Tokenizer, cache: KVCache, prompt: Sequence[int],
                  choices: dict[str, str]) -> dict[str, dict[str, float]]:
    """Log-probability of every option as the answer: {"letter": {A: ...}, "text": {A: ...}}."""
    forms = {"letter": list(choices), "text": list(choices.values())}
    completions = [tokenizer.encode(text) for form in forms.values() for text in form]
    logps = completion_logps(model, cache, prompt, completions).tolist()
    return {form: dict(zip(choices, logps[at * len(choices) :], strict=False))
            for at, form in enumerate(forms)}


@torch.inference_mode()
def completion_logps(model: Decoder, cache: KVCache, prompt: Sequence[int],
                     completions: Sequence[Sequence[int]]) -> Tensor:
    """log π(completion | prompt) of each completion, summed over its tokens, (C,) float32.

    The prompt is prefilled once, in slot 0 of `cache`, and copied for the other completions.
    """
    device, C = model.head_weight.device, len(completions)
    cache.set_length(0)
    shared = len(prompt) - 1  # the last prompt token predicts the first of the completion
    if shared:
        model.hidden(torch.tensor([prompt[:-1]], device=device), cache=cache)
        cache.fork(C, shared)
    width = max(map(len, completions))
    fed = [[prompt[-1], *c[:-1], *[0] * (width - len(c))] for c in completions]
    hidden = model.hidden(torch.tensor(fed, device=device), cache=cache)  # (C, width, D)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    real = torch.arange(width, device=device) < lengths[:, None]  # (C, width)
    targets = torch.tensor([token for c in completions for token in c], device=device)
    logps = torch.zeros(C, width, device=device)
    logps[real] = linear_logp(hidden[real], model.head_weight, targets)
    return logps.sum(-1)


def best_option(logps: dict[str, float], choices: dict[str, str] | None = None) -> str:
    """The likeliest option; with `choices`, its log-probability is divided by the text's length."""
    length = {key: len(text) for key, text in (choices or dict.fromkeys(logps, "x")).items()}
    return max(logps, key=lambda key: logps[key] / max(1, length[key]))
