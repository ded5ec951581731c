"""From logits to tokens: the filtered distribution, extreme draws, and stop strings."""

import math

import pytest
import torch

from srit.generation.params import SamplingParams
from srit.generation.sampler import StopStrings, sample


def uniforms(n: int) -> torch.Tensor:
    words = torch.randint(2**32, (n,), generator=torch.Generator().manual_seed(0))
    return words.double() / 2**32


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Standard deviations above the mean of a χ² variable with len(counts) - 1 degrees of freedom."""
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p, min_p", [
    (0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (5, 0.8, 0.0), (0, 1.0, 0.3), (5, 1.0, 0.3),
    (0, 0.8, 0.3), (0, 0.9, 0.05)])
def test_tokens_follow_the_filtered_softmax(temperature, top_k, top_p, min_p):
    n, logits = 20_000, torch.linspace(-2, 2, 12)[torch.randperm(12)]
    probs = (logits / temperature).double().softmax(-1)
    order = probs.argsort(descending=True).tolist()
    kept = order[:top_k] if top_k else order
    mass, nucleus = 0.0, []
    for token in kept:
        if mass >= top_p:
            break
        nucleus.append(token)
        mass += float(probs[token] / probs[kept].sum())
    nucleus = [token for token in nucleus if probs[token] >= min_p * probs.max()]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = sample(logits.expand(n, -1), uniforms(n), params)
    assert set(tokens.tolist()) == set(nucleus)
    expected = probs[nucleus] / probs[nucleus].sum() * n
    counts = torch.bincount(tokens, minlength=12)[nucleus]
    assert chi_square(counts, expected) < 4


def test_a_nucleus_wider_than_the_tokens_tried_first():
    n, size = 4_000, 1_000
    flat, peaked = torch.zeros(size), torch.zeros(size).index_fill(0, torch.tensor([7]), 50.0)
    logits = torch.stack([flat, peaked]).repeat(n // 2, 1)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    tokens = sample(logits, uniforms(n), params)
    assert (tokens[1::2] == 7).all()
    assert 750 < len(set(tokens[::2].tolist())) <= 901
    alone = torch.stack([sample(row[None], u[None], params)[0]
                         for row, u in zip(logits[:64], uniforms(n)[:64], strict=True)])
    assert torch.equal(alone, tokens[:64])


def test_extreme_uniforms_stay_inside_the_support():
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]])
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.99), (3, 0.5)):
        params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
        for u in (0.0, 1 - 2.0**-32):
            token = sample(logits, torch.tensor([u], dtype=torch.float64), params)
            assert int(token) in (0, 2)


def test_a_token_that_is_part_of_a_character_may_end_a_stop_string():
    """A byte alone decodes to U+FFFD; the stop string is complete with its last byte."""
    def decode(ids):
        return bytes(i % 256 for i in ids).decode("utf-8", errors="replace")

    strings = StopStrings(["né"], decode, 256, torch.device("cpu"))
    n, first, second = "né".encode()
    assert strings.may_end[second] and not strings.may_end[ord("x")]
    assert not strings.found_in([n, first]) and strings.found_in([n, first, second])
