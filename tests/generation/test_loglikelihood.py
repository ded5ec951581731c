"""Scores of given completions, against the plain forward."""

import pytest
import torch
from tiny import tiny_checkpoint

from srit.generation.loglikelihood import best_option, completion_logps
from srit.models import KVCache, load_model


def test_option_scores_are_those_of_the_plain_forward(tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path, scale=2.0))
    prompt, completions = [5, 6, 7, 8, 9], [[10], [11, 12, 13], [14, 15]]
    cache = KVCache(model.config, 4, 16)
    for _ in range(2):  # the cache is used again
        got = completion_logps(model, cache, prompt, completions)
        for value, completion in zip(got, completions, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([prompt + completion]))[0].log_softmax(-1)
            expected = sum(logp[len(prompt) - 1 + i, t] for i, t in enumerate(completion))
            assert float(value) == pytest.approx(float(expected), abs=1e-4)


def test_best_option():
    logps = {"A": -3.0, "B": -4.0}
    assert best_option(logps) == "A"
    assert best_option(logps, {"A": "xy", "B": "wxyz"}) == "B"  # -1.5 and -1 a character
