"""The calculator inside sampling: with any tokenizer, in any batch, results are forced."""

import json
import random
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny import question, tiny_checkpoint, write_rows
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from srit.config import EvalConfig, SampleConfig
from srit.generation.calculator import Calculator, Forced
from srit.generation.engine import generate
from srit.generation.params import Request, SamplingParams, request_seed
from srit.generation.rollouts import generate_rollouts, read_prompts
from srit.generation.vllm import VLLM
from srit.models import Decoder, load_model
from srit.models.paged_cache import PagedCache
from srit.runtime.files import InputError
from srit.text.arithmetic import equations, result
from srit.text.gguf_tokenizer import SPLITS
from srit.text.tokenizer import load_tokenizer
from srit.train.eval import main as evaluate

TEXTS = ["52 - 28 =", "so that is (3 + 4) * 2 =", "5*12=", "$5 x 12 =", "1,200 + 34,000 =", "5 - 9 =",
         "3 bags * 4 apples =", "<<48/2=", "€2.50 * 3 =", "1/2 + 1/4 =", "7 × 3 = 21, 7 ÷ 2 =",
         "100% - 20% ="]


def byte_level(patterns: list[str]) -> Backend:
    """Byte-level BPE behind the splits of a family, which keep digits apart or in threes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(prefix: bool) -> Backend:
    """SentencePiece's BPE, digits apart. prefix: a space stands before every text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Replace(" ", "▁")]
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + spaces)
    backend.pre_tokenizer = pre_tokenizers.Sequence([  # no piece has a space within
        pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)])
    backend.decoder = decoders.Sequence(pieces + [decoders.Strip(" ", 1, 0)] * prefix)
    return backend


FAMILIES = {"llama2, mistral": lambda: sentencepiece(True), "gemma3": lambda: sentencepiece(False),
            "llama3": lambda: byte_level(SPLITS["llama3"]),
            "qwen2, qwen3": lambda: byte_level(SPLITS["qwen2"]),
            "smollm2": lambda: byte_level(SPLITS["smollm"]),
            "gpt2": lambda: byte_level(SPLITS["gpt-2"])}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Backend:
    backend = FAMILIES[request.param]()
    spm = isinstance(backend.decoder, decoders.Sequence)
    bytes_ = [f"<0x{n:02X}>" for n in range(256)] if spm else []
    numbers = [f"{a} + {b} = {a + b} and {a}*{b}={a * b}" for a in range(3, 99, 7) for b in (4, 260)]
    backend.train_from_iterator(TEXTS + numbers, trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False,
        initial_alphabet=[] if spm else pre_tokenizers.ByteLevel.alphabet()))
    if spm:  # bytes are pieces like others, not special tokens
        stored = json.loads(backend.to_str())
        stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] == "<unk>"]
        backend = Backend.from_str(json.dumps(stored))
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_results_join_the_text_as_the_tokenizer_would_have_it(family, text):
    def encode(words: str) -> list[int]:
        return family.encode(words, add_special_tokens=False).ids

    calculator = Calculator(encode, family.decode, family.get_vocab_size(), torch.device("cpu"))
    for before in ("", "So\n", "Tom has 3. "):
        for words in (before + text, before + text + " ", before + text + " $"):
            ids, row = encode(words), Forced()
            found = result(words)
            assert calculator.closes[ids[-1]] or words[-1] in " $"
            calculator.start(row, ids)
            assert family.decode([*ids, *row.waiting]) == words + (found or "")
            if found and encode(words + found)[:len(ids)] == ids:
                assert [*ids, *row.waiting] == encode(words + found)
            assert row.spans == ([(len(words), len(words) + len(found))] if found else [])
        apart = [i for letter in before + text for i in encode(letter)]  # a model may write so
        if family.decode(apart) == before + text:
            calculator.start(row := Forced(), apart)
            assert family.decode([*apart, *row.waiting]) == before + text + result(before + text)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_checkpoint(folder / "m", scale=2.0)
    write_rows(folder / "q.jsonl", [question(i, i + 2, 7 * i % 11 + 1) for i in range(6)])
    return folder


@pytest.fixture
def counting(world, monkeypatch):
    """(model, tokenizer) of a model that likes to write sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(world / "m")
    table, fed, hidden, logits = bias(tokenizer), [], Decoder.hidden, Decoder.logits
    monkeypatch.setattr(Decoder, "hidden", lambda self, ids, **cache: (
        fed.append(ids[:, -1]), hidden(self, ids, **cache))[1])
    monkeypatch.setattr(Decoder, "logits", lambda self, rows: logits(self, rows) + table[fed[-1]])
    yield load_model(world / "m")[0], tokenizer
    torch.set_num_threads(threads)


def bias(tokenizer) -> torch.Tensor:
    """(V, V): what is likelier behind a token: numbers, signs, "=", at times a point or the end."""
    texts = [tokenizer.decode([i]) for i in range(320)]
    behind = {r"\d": {r"\d": 10, "[+*-]": 11, "=": 11, "[.,]": 10}, "[+*-]": {"[1-9]": 12},
              "=": {r"\d": 12}, "[.,]": {r" \d": 11, r"\d": 11}, "": {r"[1-9]": 9}}
    table = torch.zeros(320, 320)
    for row, text in zip(table, texts, strict=True):
        found = next(likely for before, likely in behind.items() if re.search(before + r"\Z", text))
        for pattern, value in found.items():
            row[[i for i, after in enumerate(texts) if re.fullmatch(pattern, after)]] = value
        row[list(tokenizer.stop_ids)] = 8
    return table


def requests(n: int = 6, samples: int = 3) -> list[Request]:
    return [Request((i, s), tuple(range(20, 26 + i)), request_seed(0, i, s))
            for i in range(n) for s in range(samples)]


def run(counting, wanted, on=True, temperature=1.0, max_new_tokens=40, **settings):
    model, tokenizer = counting
    names = {field.name for field in fields(SamplingParams)} & settings.keys()
    params = SamplingParams(max_new_tokens, temperature, calculator=on,
                            **{name: settings.pop(name) for name in names})
    return generate(model, wanted, params, stop_ids=tokenizer.stop_ids, decode=tokenizer.decode,
                    encode=tokenizer.encode, prefix=5, readers_per_prompt=3, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_result_is_forced_and_no_number_goes_on(counting, temperature):
    decode, forced = counting[1].decode, 0
    for answer in run(counting, requests(12), temperature=temperature).values():
        text, stops = decode(answer.ids), {start: stop for start, stop in answer.forced}
        for at in (match.end() for match in re.finditer("=", text)):
            expected = result(text[:at])
            if expected is None or at == len(text):
                assert at not in stops
            else:
                assert text[at:stops[at]] == expected[:stops[at] - at] and (
                    stops[at] == len(text) or stops[at] == at + len(expected))
                assert not re.match(r"[.,/]?\d", text[stops[at]:])
        for equation in equations(text):
            judged = result(text[:equation.span[0] + len(equation.left)] + " =") is not None
            cut = any(start < equation.span[1] <= stop == len(text) for start, stop in stops.items())
            assert equation.holds or not judged or cut or equation.span[1] == len(text), text
        forced += len(stops)
    assert forced > 10


@pytest.mark.parametrize("behind, likely, token", [
    ("5", ["0", "c", " "], " "), ("5", ["c", "0", " "], "c"), ("5", [".", "0", " "], "."),
    ("5.", ["0", "c", " "], " "), ("5/", ["2", "h", " "], " "), ("5/", ["h", "2", " "], "h"),
    ("5. ", ["2", "h", " "], "2")])
def test_where_a_number_would_go_on_it_ends_and_no_word_begins(behind, likely, token):
    """A model that wants 155.00 must not write 155.ec; 5 cm and 5/hour are its choice."""
    letters = "0123456789.,/ ch="
    calculator = Calculator(lambda text: [letters.index(c) for c in text],
                            lambda ids: "".join(letters[i] for i in ids), len(letters),
                            torch.device("cpu"))
    row = Forced(open=True)
    for c in behind[1:]:
        calculator.advance(row, letters.index(c))
    logits = torch.zeros(1, len(letters))
    logits[0, [letters.index(c) for c in likely]] = torch.tensor([3.0, 2.0, 1.0])
    drawn = calculator.sample([row], logits, torch.tensor([0.5], dtype=torch.float64),
                              SamplingParams(9, 0.0), torch.zeros(1, len(letters), dtype=torch.bool))
    assert letters[drawn] == token


def test_draws_do_not_shift(counting):
    """Until its first result a text is as without the calculator."""
    plain, sums = run(counting, requests(), on=False), run(counting, requests())
    changed = 0
    for key, answer in sums.items():
        assert answer.ids == plain[key].ids or answer.forced
        if answer.forced:
            start = answer.forced[0][0]
            assert counting[1].decode(answer.ids)[:start] == counting[1].decode(plain[key].ids)[:start]
            changed += answer.ids != plain[key].ids
    assert changed > 3 and all(answer.forced == [] for answer in plain.values())


def test_a_text_depends_on_nothing_but_its_own_request(counting, monkeypatch):
    """In any order and cache size, preempted or not."""
    removed, remove, preempted = [], PagedCache.remove_row, 0
    monkeypatch.setattr(PagedCache, "remove_row", lambda *a: (removed.append(a), remove(*a)))
    pick, page = random.Random(0), 2 * 2 * 2 * 8 * 4 * 32
    for case in range(4):
        wanted = requests(samples=2)
        common = {"return_logps": True, "temperature": pick.choice([0.0, 1.0, 1.5]),
                  "repetition_penalty": pick.choice([1.0, 1.1]), "top_k": pick.choice([0, 15]),
                  "stop_strings": pick.choice([[], ["5"]]), "max_new_tokens": 70}
        alone = {r.key: run(counting, [r], slots=1, **common)[r.key] for r in wanted}
        assert any(answer.forced for answer in alone.values())
        removed.clear()
        for _ in range(2):
            pick.shuffle(wanted)
            some = wanted[: pick.randint(6, len(wanted))]
            results = run(counting, some, slots=pick.randint(2, 24),
                          cache_bytes=page * (3 + pick.choice([5, 8, 200])), **common)
            assert results == {r.key: alone[r.key] for r in some}, case
            preempted += len(removed) - len(some)
            removed.clear()
    assert preempted > 0


def test_logps_say_what_was_forced(counting):
    decode = counting[1].decode
    for answer in run(counting, requests(), return_logps=True).values():
        ends = [len(decode(answer.ids[:n + 1])) for n in range(len(answer.ids))]
        forced = [any(start < end <= stop for start, stop in answer.forced) for end in ends]
        assert [logp is None for logp in answer.logps] == forced + [False] * answer.finished


def rows_of(world, tokenizer, model, path, **settings) -> list[dict]:
    cfg = SampleConfig(str(world / "m"), "unused", train_file=[str(world / "q.jsonl")], num_samples=2,
                       temperature=1.0, max_new_tokens=40, calculator=True, **settings)
    prompts = read_prompts(cfg.train_file, ["cot"], tokenizer, None)
    return generate_rollouts(model, tokenizer, prompts, path, cfg)


def test_rows_have_their_forced_spans_and_a_resumed_run_the_same_bytes(world, counting, tmp_path):
    model, tokenizer = counting
    rows = rows_of(world, tokenizer, model, tmp_path / "a.jsonl")
    marked = [row for row in rows if "forced" in row]
    assert 0 < len(marked) < len(rows) and all(row["forced"] for row in marked)
    for row in marked:
        for start, stop in row["forced"]:
            expected = result(row["text"][:start])
            assert row["text"][start:stop] == expected[:stop - start]
    whole = (tmp_path / "a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[1::2]) + b'{"id": "q1", "torn')
    rows_of(world, tokenizer, model, tmp_path / "b.jsonl", per_device_batch_size=3)
    assert (tmp_path / "b.jsonl").read_bytes() == whole
    cut = rows_of(world, tokenizer, model, tmp_path / "c.jsonl", stop_strings=["5", "="])
    assert all(stop <= len(row["text"]) for row in cut for _, stop in row.get("forced", []))


def test_eval_with_and_without_in_files_of_their_own(world, counting, tmp_path, capsys):
    flags = {"output_dir": str(tmp_path / "o"), "eval_file": [str(world / "q.jsonl")], "device": "cpu",
             "dtype": "float32", "temperature": 1.0, "max_new_tokens": 40}
    evaluate(EvalConfig(str(world / "m"), calculator="both", **flags))
    results = [json.loads((tmp_path / "o" / name).read_text())
               for name in ("results.json", "results_calculator.json")]
    assert [result["calculator"] for result in results] == [False, True]
    assert "forced" not in (tmp_path / "o" / "generations.jsonl").read_text()
    sums = (tmp_path / "o" / "generations_calculator.jsonl").read_bytes()
    assert b'"forced": [[' in sums
    run = json.loads((tmp_path / "o" / "run.json").read_text())
    assert run["config"]["calculator"] == "both" and len(run["outputs"]) == 4
    assert capsys.readouterr().out.count("with the calculator:") == 1
    flags["output_dir"] = str(tmp_path / "p")
    evaluate(EvalConfig(str(world / "m"), calculator=True, **flags))
    assert (tmp_path / "p" / "generations.jsonl").read_bytes() == sums


@pytest.mark.parametrize("setting", [{"engine": "vllm"}, {"scoring": "options"}])
def test_where_there_is_no_calculator(setting):
    with pytest.raises(InputError, match="must be .* with"):
        EvalConfig("m", "o", eval_file=["q.jsonl"], calculator="both", **setting)
    with pytest.raises(InputError, match="vLLM has no calculator"):
        VLLM.generate(None, [], SamplingParams(calculator=True), stop_ids=[2])


def test_it_needs_both_ways_of_the_tokenizer(counting):
    with pytest.raises(ValueError, match="`decode` and `encode`"):
        generate(counting[0], requests(1), SamplingParams(calculator=True), stop_ids=[2])


def test_the_example_for_transformers_gives_the_same_greedy_texts(world, counting, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import transformers_calculator

    table = bias(counting[1])

    class LikingSums(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + table[input_ids[:, -1]]

    wanted = requests(5, 1)
    ours = run(counting, wanted, temperature=0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "m", dtype=torch.float32)
    width = max(len(request.prompt_ids) for request in wanted)
    ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in wanted])
    processor = transformers_calculator.CalculatorProcessor(tokenizer, 320, width)
    out = model.generate(ids, attention_mask=(torch.arange(width) >= width - torch.tensor(
        [[len(r.prompt_ids)] for r in wanted])).long(), max_new_tokens=40, do_sample=False,
        eos_token_id=sorted(counting[1].stop_ids), pad_token_id=0,
        logits_processor=[LikingSums(), processor])[:, width:].tolist()
    for request, theirs in zip(wanted, out, strict=True):
        answer = ours[request.key]
        assert theirs[:len(answer.ids)] == answer.ids
    assert any(answer.forced for answer in ours.values())
