"""The sampling engine: the right tokens and distribution, whatever else is in the batch."""

import itertools
import math
import random
from dataclasses import fields

import pytest
import torch
from tiny import CONFIG, skip_without_int8, tiny_checkpoint

from srit.config import SampleConfig
from srit.data.batches import shared_prefix
from srit.generation import engine
from srit.generation.params import Request, Result, SamplingParams, request_seed
from srit.kernels import linear_logp
from srit.models import Decoder, ModelConfig
from srit.models.paged_cache import PagedCache
from srit.runtime.files import InputError

V = CONFIG["vocab_size"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(dtype=torch.float32, scale=0.25, config=CONFIG) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ModelConfig.from_dict(config), compute_dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, 0, scale)
        elif "norm" in name:
            torch.nn.init.ones_(parameter)
    return model.to(dtype).eval()


def prompts(n: int, shared: int = 5) -> list[tuple[int, ...]]:
    """Prompts of different lengths with the first `shared` tokens in common."""
    generator = torch.Generator().manual_seed(1)
    head = tuple(range(10, 10 + shared))
    return [head + tuple(torch.randint(20, V, (1 + 7 * i % 23,), generator=generator).tolist())
            for i in range(n)]


def spell(ids) -> str:
    """Two letters a token, so that a string of three spans tokens."""
    return "".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in ids)


def requests(n: int = 10, samples: int = 2) -> list[Request]:
    return [Request((i, s), ids, request_seed(0, i, s))
            for i, ids in enumerate(prompts(n)) for s in range(samples)]


def generate(model: Decoder, some: list[Request], **settings) -> dict[object, Result]:
    """engine.generate with the fields of SamplingParams among the settings."""
    names = {field.name for field in fields(SamplingParams)} & settings.keys()
    params = SamplingParams(**{name: settings.pop(name) for name in names})
    return engine.generate(model, some, params, **settings)


@torch.no_grad()
def greedy_by_full_forward(model, ids, stop_ids, max_new_tokens):
    ids, start = list(ids), len(ids)
    while len(ids) < start + max_new_tokens:
        token = int(model(torch.tensor([ids], device=model.model.norm.weight.device))[0, -1].argmax())
        if token in stop_ids:
            return ids[start:], True
        ids.append(token)
    return ids[start:], False


def test_greedy_is_the_argmax_of_the_full_forward():
    model, stop = tiny_model(), set(range(3, 9))
    results = generate(model, requests(), stop_ids=stop, max_new_tokens=16, slots=4)
    for request in requests():
        ids, finished = greedy_by_full_forward(model, request.prompt_ids, stop, 16)
        assert (results[request.key].ids, results[request.key].finished) == (ids, finished)


def test_the_triton_kernel_gives_the_same_texts(monkeypatch):
    monkeypatch.setenv("SRIT_KERNELS", "triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, stop, some = tiny_model().to(device), set(range(3, 9)), requests(3)
    results = generate(model, some, stop_ids=stop, max_new_tokens=4, slots=4)
    for request in some:
        ids, finished = greedy_by_full_forward(model, request.prompt_ids, stop, 4)
        assert (results[request.key].ids, results[request.key].finished) == (ids, finished)
    settings = {"stop_ids": stop, "max_new_tokens": 4, "temperature": 1.0}
    assert (generate(model, some, slots=4, **settings)
            == generate(model, some[::-1], slots=2, **settings))


@pytest.mark.parametrize("dtype, packed", [
    (torch.float32, None), (torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "int8"),
    (torch.bfloat16, "int8")], ids=str)
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0},
                                      {"temperature": 0.7, "top_k": 20},
                                      {"temperature": 1.3, "top_p": 0.9},
                                      {"temperature": 1.0, "min_p": 0.05, "return_logps": True,
                                       "repetition_penalty": 1.2, "stop_strings": ["ga", "da"],
                                       "decode": lambda ids: spell(ids)}], ids=lambda s: " ".join(s))
def test_a_text_depends_on_nothing_but_its_own_request(dtype, packed, sampling):
    model, all_requests = tiny_model(dtype), requests(9, 3)
    if packed == "int8":
        skip_without_int8(dtype)
    if packed:
        model.pack_weights(packed)
    settings = {"stop_ids": range(3, 20), "max_new_tokens": 20,
                "prefix": shared_prefix(prompts(9)), "readers_per_prompt": 3, **sampling}
    expected = generate(model, all_requests, slots=8, **settings)
    assert 0 < sum(r.finished for r in expected.values()) < len(expected)
    for slots, some in ((1, all_requests[:4]), (5, all_requests[::-1]), (64, all_requests),
                        (8, all_requests[1::2])):
        results = generate(model, some, slots=slots, **settings)
        assert results == {r.key: expected[r.key] for r in some}


@pytest.mark.parametrize("dtype, packed", [(torch.float32, "none"), (torch.bfloat16, "none"),
                                           (torch.bfloat16, "int8")], ids=str)
def test_a_text_does_not_depend_on_its_neighbours_in_products_of_real_size(dtype, packed):
    """CPUs with AMX sum bfloat16 products of up to 32 rows in another order than those of more."""
    if packed == "int8":
        skip_without_int8(dtype)
    model = tiny_model(dtype, 0.05, CONFIG | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "head_dim": 64,
        "num_attention_heads": 9, "num_key_value_heads": 3})
    model.pack_weights(packed)
    some = [Request(i, ids, request_seed(0, i, 0)) for i, ids in enumerate(prompts(44))]
    settings = {"stop_ids": (), "max_new_tokens": 4, "prefix": 5, "readers_per_prompt": 1,
                "temperature": 1.0, "return_logps": True}
    expected = generate(model, some, slots=44, **settings)
    for slots, few in ((1, some[:1]), (9, some[20:])):
        assert generate(model, few, slots=slots, **settings) == {r.key: expected[r.key] for r in few}


def cache_bytes(pages: int, longest: int, layers: int = 2) -> int:
    """Size of a cache with `pages` pages, two reserved ones and the staging slot of the prefill."""
    token = 2 * layers * 2 * 8 * 4  # keys and values, layers, heads, head_dim, bytes
    return token * (32 * (2 + pages) + -(-longest // 32) * 32)


def test_a_cache_that_is_too_small_is_an_error():
    model, settings = tiny_model(), {"stop_ids": [], "max_new_tokens": 70}
    longest, least = max(map(len, prompts(9))), 1 + 3  # a page for the prompt, three for 70 tokens
    results = generate(model, requests(9, 1), cache_bytes=cache_bytes(least, longest), **settings)
    assert len(results) == 9
    with pytest.raises(InputError, match="no room for a sequence of 97 .* raise --max_cache_memory"):
        generate(model, requests(9, 1), cache_bytes=cache_bytes(least, longest) - 1, **settings)


def fuzz_case(seed: int, model: Decoder) -> int:
    """With random prompts, samples, orders, stops, slots and cache sizes, each text is as if alone.

    Returns how many rows were preempted for lack of pages.
    """
    pick = random.Random(seed)
    samples, heads = pick.randint(1, 5), [[pick.randrange(20, V) for _ in range(pick.randint(0, 40))]
                                          for _ in range(3)]
    texts = []
    for head in heads:
        tails = [[pick.randrange(20, V) for _ in range(pick.randint(1, 40))]
                 for _ in range(pick.randint(1, 4))]
        texts += [(tuple(head + tail), len(head) if pick.random() < 0.7 else 0) for tail in tails]
    wanted = [Request((i, s), ids, request_seed(seed, i, s), shared)
              for i, (ids, shared) in enumerate(texts) for s in range(samples)]
    common = {"prefix": shared_prefix([ids for ids, _ in texts]),
              "readers_per_prompt": pick.randint(1, samples),  # fewer: several copies of a prompt
              "stop_ids": range(3, 3 + pick.choice([0, 1, 4, 16])),
              "max_new_tokens": pick.choice([1, 33, 70, 100]),
              "temperature": pick.choice([0.0, 0.8, 1.5]), "top_k": pick.choice([0, 0, 15]),
              "top_p": pick.choice([1.0, 0.8]), "repetition_penalty": pick.choice([1.0, 1.3]),
              "stop_strings": pick.choice([[], ["ga", "da"]]), "decode": spell, "return_logps": True}
    alone = {r.key: generate(model, [r], slots=1, **common)[r.key] for r in wanted}
    removed, remove, preempted = [], PagedCache.remove_row, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedCache, "remove_row", lambda *a: (removed.append(a), remove(*a)))
        for _ in range(3):
            pick.shuffle(wanted)
            some, finished = wanted[: pick.randint(1, len(wanted))], []
            longest = max(len(r.prompt_ids) for r in some)
            least = -(-(longest - 1) // 32) - (-common["max_new_tokens"] // 32)
            pages = pick.choice([least, least + 1, least + pick.randint(0, 20), 200])
            results = generate(model, some, slots=pick.randint(1, 24),
                               cache_bytes=cache_bytes(pages, longest, layers=1), **common,
                               on_finish=lambda r, _, finished=finished: finished.append(r.key))
            assert results == {r.key: alone[r.key] for r in some}, seed
            assert sorted(finished) == sorted(r.key for r in some), seed
            preempted += len(removed) - len(some)
            removed.clear()
    return preempted


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("cases", [8, pytest.param(400, marks=pytest.mark.fuzz)])
def test_any_order_size_and_stop_gives_the_text_of_the_request_alone(cases, window):
    config = CONFIG | {"num_hidden_layers": 1} | (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
         "sliding_window": window} if window else {})
    model = tiny_model(config=config)
    model.pack_weights()
    assert sum(fuzz_case(seed, model) for seed in range(cases)) > 0  # some rows were preempted


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch):
    model = tiny_model()
    settings = {"stop_ids": [], "max_new_tokens": 8}
    expected = generate(model, requests(5, 1), **settings)
    monkeypatch.setitem(engine.PREFILL_TOKENS, "cpu", 5)
    widths, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden",
                        lambda ids, **k: widths.append(ids.shape[1]) or hidden(ids, **k))
    assert generate(model, requests(5, 1), **settings) == expected
    assert max(widths) == 5


def test_should_stop_ends_between_two_steps():
    finished = []
    results = generate(tiny_model(), requests(9, 3), stop_ids=range(3, 20), max_new_tokens=20, slots=4,
                       on_finish=lambda request, _: finished.append(request.key),
                       should_stop=lambda: len(finished) >= 3)
    assert 3 <= len(results) < 27 and set(finished) == set(results)


def test_samples_and_seeds_differ():
    results = generate(tiny_model(scale=0.1), requests(3, 3), stop_ids=[3], max_new_tokens=12,
                       temperature=1.0)
    assert len({tuple(r.ids) for r in results.values()}) == 9
    assert len({request_seed(*parts) for parts in itertools.product((0, 1), "ab", (0, 1))}) == 8
    assert request_seed(0, "q1", 0, "cot") == 8100037901448468537  # on every machine, for ever


def test_every_stop_id_ends_a_text_and_is_not_part_of_it():
    model, request = tiny_model(), requests(1, 1)
    free = generate(model, request, stop_ids=[], max_new_tokens=12)[0, 0]
    assert len(free.ids) == 12 and not free.finished
    for stop in set(free.ids):
        first = free.ids.index(stop)
        cut = generate(model, request, stop_ids={stop, 10**6}, max_new_tokens=12)[0, 0]
        assert cut.ids == free.ids[:first] and cut.finished


def test_stop_at_the_last_allowed_token_is_finished():
    model, request = tiny_model(), requests(1, 1)
    free = generate(model, request, stop_ids=[], max_new_tokens=1)[0, 0]
    stopped = generate(model, request, stop_ids=free.ids, max_new_tokens=1)[0, 0]
    assert stopped.ids == [] and stopped.finished


@pytest.mark.parametrize("slots", [1, 8])
def test_a_stop_string_ends_a_text_where_it_is_complete(slots):
    model, settings = tiny_model(), {"stop_ids": [3], "max_new_tokens": 16, "slots": slots,
                                     "temperature": 1.0}
    free = generate(model, requests(), **settings)
    texts = {key: spell(result.ids) for key, result in free.items()}
    for strings in (["qx"], [texts[0, 0][3:6]], [texts[1, 1][2:7], texts[2, 0][5], "é"]):
        cut = generate(model, requests(), stop_strings=strings, decode=spell, **settings)
        for key, result in free.items():
            n = next((n for n in range(len(result.ids) + 1)
                      if any(s in spell(result.ids[:n]) for s in strings)), None)
            assert cut[key].ids == result.ids[:n]
            assert cut[key].finished == (result.finished or n is not None)
    assert any(cut[key] != free[key] for key in free)


def test_logps_are_those_of_the_training_path():
    """Whatever was filtered or penalised, they are the model's own, including the stop token's."""
    model = tiny_model()
    results = generate(model, requests(), stop_ids=range(3, 9), max_new_tokens=16, slots=8,
                       temperature=1.5, top_p=0.9, repetition_penalty=1.3, return_logps=True)
    assert 0 < sum(result.finished for result in results.values()) < len(results)
    for request in requests():
        result, start = results[request.key], len(request.prompt_ids)
        assert len(result.logps) == len(result.ids) + result.finished
        ids = torch.tensor([[*request.prompt_ids, *result.ids]])
        hidden = model.hidden(ids[:, :-1])[0, start - 1 :]
        known = linear_logp(hidden, model.head_weight, ids[0, start:])
        torch.testing.assert_close(torch.tensor(result.logps[: len(result.ids)]), known,
                                   rtol=1e-5, atol=1e-5)
        if result.finished:
            last = model(ids)[0, -1].log_softmax(-1)[3:9]
            assert (last - result.logps[-1]).abs().min() < 1e-5
    plain = generate(model, requests(1), stop_ids=[3], max_new_tokens=2)
    assert all(result.logps is None for result in plain.values())


def test_neutral_and_extreme_settings():
    model = tiny_model()

    def run(**sampling):
        return generate(model, requests(4, 1), stop_ids=[3], max_new_tokens=8, **sampling)

    greedy, sampled = run(temperature=0), run(temperature=1.0)
    assert run(temperature=0, top_k=3, top_p=0.5) == greedy
    for extreme in ({"temperature": 1e-30}, {"temperature": 1.0, "top_k": 1},
                     {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 1.0, "min_p": 1.0}):
        assert run(**extreme) == greedy
    assert run(temperature=1.0, top_k=0, top_p=1.0) == sampled
    assert run(temperature=1.0, top_k=V + 5) == sampled


@pytest.mark.parametrize("setting, value", [("temperature", -1.0), ("temperature", math.nan),
                                            ("temperature", math.inf), ("top_k", -1),
                                            ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan),
                                            ("min_p", -0.1), ("min_p", 1.1), ("min_p", math.nan),
                                            ("repetition_penalty", 0.0),
                                            ("repetition_penalty", math.nan),
                                            ("stop_strings", ["a", ""]),
                                            ("max_new_tokens", 0)])
def test_meaningless_settings_are_named(setting, value):
    with pytest.raises(InputError, match=f"--{setting} .*: must be "):
        SamplingParams(**{setting: value})
    with pytest.raises(InputError, match=f"--{setting} .*: must be "):
        SampleConfig("m", "o", train_file=["q.jsonl"], **{setting: value})


def test_prompts_that_cannot_run_are_errors():
    model = tiny_model()
    positions = model.config.max_position_embeddings
    fits = Request("fits", [7] * (positions - 3))
    assert len(generate(model, [fits], stop_ids=[], max_new_tokens=3)["fits"].ids) == 3
    with pytest.raises(InputError, match="long.*exceed"):
        generate(model, [Request("long", [7] * (positions - 2))], stop_ids=[], max_new_tokens=3)
    with pytest.raises(InputError, match="blank.*no tokens"):
        generate(model, [Request("blank", [])], stop_ids=[], max_new_tokens=3)
    assert generate(model, [], stop_ids=[], max_new_tokens=3) == {}


def test_broken_weights_are_an_error_not_a_text():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        generate(model, requests(1), stop_ids=[], max_new_tokens=2)


def test_samples_share_their_prompt_and_all_share_the_prefix(monkeypatch):
    model, fed, heads = tiny_model(), [], []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda ids, **k: fed.append(ids.shape) or hidden(ids, **k))
    monkeypatch.setattr(model, "logits", lambda h: heads.append(h.shape) or logits(h))
    generate(model, requests(6, 4), stop_ids=[], max_new_tokens=4, slots=8)
    prefilled = sum(shape.numel() for shape in fed if shape[1] > 1 or shape[0] == 1)
    assert prefilled == 5 + sum(len(p) - 1 - 5 for p in prompts(6))
    assert all(len(shape) == 2 for shape in heads)  # (rows, D): never a whole sequence


def test_shared_prefix_leaves_every_prompt_a_token():
    assert shared_prefix([(1, 2, 3), (1, 2, 4), (1, 2)]) == 1
    assert shared_prefix([(1, 2, 3)]) == 2
    assert shared_prefix([(1, 2), (3, 4)]) == 0


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_equals_transformers(tmp_path, penalty):
    transformers = pytest.importorskip("transformers")
    from srit.models import load_model

    tiny_checkpoint(tmp_path / "m", scale=3.0)
    ours, _ = load_model(tmp_path / "m")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    results = generate(ours, requests(6, 1), stop_ids=[2], max_new_tokens=24,
                       repetition_penalty=penalty)
    for request in requests(6, 1):
        out = theirs.generate(torch.tensor([request.prompt_ids]), max_new_tokens=24,
                              do_sample=False, eos_token_id=2, pad_token_id=0,
                              repetition_penalty=penalty)
        expected = out[0, len(request.prompt_ids) :].tolist()
        got = results[request.key]
        assert got.ids + [2] * got.finished == expected
