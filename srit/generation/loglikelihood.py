"""Multiple choice without generation: which option does the model find likeliest?

This is how lm-evaluation-harness scores such sets, beside the generation of an answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from srit.kernels import linear_logp
from srit.models import Decoder, KVCache
from srit.text.tokenizer import Tokenizer


@torch.inference_mode()
def completion_logps(model: Decoder, cache: KVCache, prompt: Sequence[int],
                     completions: Sequence[Sequence[int]]) -> Tensor:
    """log π(completion | prompt) of each completion, summed over its tokens, (C,) float32.

    The prompt is read once, in slot 0 of `cache`, and copied for the others.
    """
    device, C = model.head_weight.device, len(completions)
    cache.lengths.zero_()
    shared = len(prompt) - 1  # the last prompt token predicts the first of the completion
    if shared:
        model.hidden(torch.tensor([prompt[:-1]], device=device), cache=cache)
        for slot in range(1, C):
            cache.copy(0, slot, 0, shared)
        cache.lengths[:C] = shared
    width = max(map(len, completions))
    fed = [[prompt[-1], *c[:-1], *[0] * (width - len(c))] for c in completions]
    hidden = model.hidden(torch.tensor(fed, device=device), cache=cache)  # (C, width, D)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    real = torch.arange(width, device=device) < lengths[:, None]  # (C, width)
    targets = torch.tensor([token for c in completions for token in c], device=device)
    logps = torch.zeros(C, width, device=device)
    logps[real] = linear_logp(hidden[real], model.head_weight, targets)
    return logps.sum(-1)


def score_options(model: Decoder, tokenizer: Tokenizer, cache: KVCache, prompt: Sequence[int],
                  choices: dict[str, str]) -> dict[str, dict[str, float]]:
    """Log-probability of every option as answer: {"letter": {A: ...}, "text": {A: ...}}."""
    forms = {"letter": list(choices), "text": list(choices.values())}
    completions = [tokenizer.encode(text) for form in forms.values() for text in form]
    logps = completion_logps(model, cache, prompt, completions).tolist()
    return {form: dict(zip(choices, logps[at * len(choices) :], strict=False))
            for at, form in enumerate(forms)}


def best(logps: dict[str, float], choices: dict[str, str] | None = None) -> str:
    """The likeliest option; with `choices` its log-probability is divided by the text's length."""
    weight = {key: len(text) for key, text in (choices or dict.fromkeys(logps, "x")).items()}
    return max(logps, key=lambda key: logps[key] / max(1, weight[key]))
