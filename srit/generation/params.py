"""What goes into generation and what comes out of it."""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from srit.config import GenerateConfig, check_sampling


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a completion ends. The defaults are greedy decoding.

    The fields are those of GenerateConfig, which explains them. Raises InputError for a value without
    meaning.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: Sequence[str] = ()
    return_logps: bool = False
    calculator: bool = False

    def __post_init__(self) -> None:
        check_sampling(self)

    @classmethod
    def from_config(cls, cfg: GenerateConfig) -> "SamplingParams":
        return cls(cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p,
                   cfg.repetition_penalty, cfg.stop_strings, cfg.return_logps, cfg.calculator)


@dataclass(frozen=True)
class Request:
    """One completion to generate; the model, the params and `seed` (`request_seed`) determine it."""

    key: Hashable
    prompt_ids: Sequence[int]
    seed: int = 0
    shared: int = 0  # leading tokens in common with other prompts; consecutive ones prefill them once


@dataclass(frozen=True)
class Result:
    """Generated tokens without the stop token.

    finished: a stop token or stop string ended them, not max_new_tokens. `ids` includes the tokens of
    a stop string. logps, on request: log π of every token of `ids` and of the stop token, by the model
    itself (temperature 1, no filter, no penalty); None for a token that the calculator forced. forced:
    (start, end) of what the calculator wrote, in characters of the decoded `ids`.
    """

    ids: list[int]
    finished: bool
    logps: list[float | None] | None = None
    forced: list[tuple[int, int]] = field(default_factory=list)


def request_seed(*parts: Any) -> int:
    """A 64-bit seed from (seed, question id, sample index, ...), the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")
