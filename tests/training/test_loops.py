"""The two loops: what they compute, that they resume exactly, and what they refuse."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import demo, metrics, pair, tiny_checkpoint, write_rows

from srit.config import DPOConfig, SFTConfig
from srit.data.batches import Example
from srit.data.examples import read_sft
from srit.models import load_model
from srit.runtime import shutdown
from srit.runtime.files import InputError
from srit.runtime.outcome import Diverged, Failed, Finished, Stopped
from srit.text.prompts import Rendered, question_messages, render
from srit.text.tokenizer import load_tokenizer
from srit.train import dpo, sft
from srit.training import reference
from srit.training.checkpoint import TrainState
from srit.training.metrics import MetricsLog
from srit.training.optimizer import make_adamw, optimizer_step
from srit.training.saving import BestWeights

DEMOS = [demo(i, i % 7 + 1, (i * 3) % 11) for i in range(13)]
PAIRS = [pair(i, i % 7 + 1, (i * 3) % 11) for i in range(7)]
QUIET = dict(dtype="float32", device="cpu", max_length=256, logging_steps=1,
             lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), scale=2.0)


def run_sft(tiny, tmp_path, name, rows=DEMOS, **settings):
    file = write_rows(tmp_path / f"{name}.jsonl", rows)
    cfg = SFTConfig(str(tiny), [str(file)], str(tmp_path / name), **{**QUIET, **settings})
    sft.main(cfg)
    return tmp_path / name


def run_dpo(tiny, tmp_path, name, rows=PAIRS, **settings):
    file = write_rows(tmp_path / f"{name}.jsonl", rows)
    cfg = DPOConfig(str(tiny), [str(file)], str(tmp_path / name), **{**QUIET, **settings})
    dpo.main(cfg)
    return tmp_path / name


def weights(directory):
    return load_file(directory / "model.safetensors")


def assert_same_weights(a, b, tolerance=0.0):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def test_accumulation_changes_nothing(tiny, tmp_path):
    """Unequal lengths, N not divisible by the batch: 8 x 1 and 1 x 8 are the same step."""
    whole = run_sft(tiny, tmp_path, "whole", max_steps=2, per_device_train_batch_size=8)
    parts = run_sft(tiny, tmp_path, "parts", max_steps=2, per_device_train_batch_size=1,
                    gradient_accumulation_steps=8)
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["num_tokens"] == b["num_tokens"]
    assert_same_weights(whole, parts, 2e-5)


def test_packing_does_not_leak(tiny, tmp_path):
    """The whole data set in one step, one example a row or packed: same loss, same gradient."""
    plain = run_sft(tiny, tmp_path, "plain", max_steps=1, per_device_train_batch_size=13)
    packed = run_sft(tiny, tmp_path, "packed", max_steps=1, per_device_train_batch_size=13,
                     packing=True)
    a, b = metrics(plain)[0], metrics(packed)[0]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_prompt_tokens_are_not_trained(tiny, tmp_path):
    """The loss is the mean over completion tokens, computed here from full logits."""
    out = run_sft(tiny, tmp_path, "one", rows=DEMOS[:1], max_steps=1)
    model, _ = load_model(str(tiny))
    tokenizer = load_tokenizer(str(tiny))
    row = render(tokenizer, question_messages(DEMOS[0], "cot"), DEMOS[0]["completion"])
    logps = model(torch.tensor([row.ids])).log_softmax(-1)[0]
    trained = [-logps[t - 1, row.ids[t]].item() for t, m in enumerate(row.mask) if m]
    assert len(trained) < len(row.ids)
    assert metrics(out)[0]["loss"] == pytest.approx(sum(trained) / len(trained), rel=1e-5)


@pytest.mark.parametrize("settings", [
    {}, {"packing": True, "max_length": 160}, {"use_peft": True, "lora_dropout": 0.2}])
def test_sft_resume_is_bitwise(tiny, tmp_path, settings):
    common = dict(per_device_train_batch_size=2, max_steps=7, save_steps=2, **settings)
    straight = run_sft(tiny, tmp_path, "straight", **common)
    file = str(tmp_path / "straight.jsonl")
    cut = tmp_path / "cut"
    sft.main(SFTConfig(str(tiny), [file], str(cut), **{**QUIET, **common, "max_steps": 5}))
    sft.main(SFTConfig(str(tiny), [file], str(cut), **{**QUIET, **common}))
    assert_same_weights(straight, cut)
    a, b = metrics(straight), metrics(cut)
    assert [r["step"] for r in b] == list(range(1, 8))
    for row in a + b:
        row.pop("tokens_per_second")
    assert a == b


@pytest.mark.parametrize("settings", [{}, {"use_peft": True, "precompute_ref_log_probs": False}])
def test_dpo_resume_is_bitwise(tiny, tmp_path, settings):
    common = dict(per_device_train_batch_size=2, max_steps=6, save_steps=3, **settings)
    straight = run_dpo(tiny, tmp_path, "straight", **common)
    file = str(tmp_path / "straight.jsonl")
    cut = tmp_path / "cut"
    dpo.main(DPOConfig(str(tiny), [file], str(cut), **{**QUIET, **common, "max_steps": 3}))
    dpo.main(DPOConfig(str(tiny), [file], str(cut), **{**QUIET, **common}))
    assert_same_weights(straight, cut)
    a, b = metrics(straight), metrics(cut)
    for row in a + b:
        row.pop("tokens_per_second")
    assert a == b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [
    {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 4, "use_peft": True},
    {"per_device_train_batch_size": 4, "use_peft": True, "precompute_ref_log_probs": False},
    {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
    {"per_device_train_batch_size": 4, "gradient_checkpointing": True, "checkpoint_policy": "mlp"}])
def test_step_zero_is_exactly_ln_2(tiny, tmp_path, settings, dtype):
    """Policy == reference, in every layout: loss ln 2 and rewards 0, to the last bit."""
    out = run_dpo(tiny, tmp_path, "out", max_steps=3, dtype=dtype, **{**settings,
                  "learning_rate": 0.0})
    for row in metrics(out):
        assert row["loss"] == torch.tensor(2.0).log().item()
        assert row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0.0
        assert row["rewards/accuracies"] == 0.0
        assert row["grad_norm"] > 0


def test_metrics_are_named_for_what_they_hold(tiny, tmp_path):
    """After steps that push towards the chosen side the names say so; logps are sums."""
    out = run_dpo(tiny, tmp_path, "out", max_steps=8, per_device_train_batch_size=7,
                  eval_file=[str(write_rows(tmp_path / "eval.jsonl", PAIRS))])
    first, last = metrics(out)[0], metrics(out)[-1]
    assert last["loss"] < math.log(2)
    assert last["rewards/margins"] > 0
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], abs=1e-5)
    assert last["rewards/accuracies"] == 1.0
    assert first["logps/chosen"] < first["logps/rejected"] < 0  # the longer text, the lower its sum
    assert last["eval_loss"] < first["loss"]
    assert len({row["step"] for row in metrics(out)}) == len(metrics(out))


def test_rpo_alpha_adds_the_mean_nll_of_the_chosen(tiny, tmp_path):
    plain = metrics(run_dpo(tiny, tmp_path, "plain", rows=PAIRS[:1], max_steps=1))[0]
    mixed = metrics(run_dpo(tiny, tmp_path, "mixed", rows=PAIRS[:1], max_steps=1,
                            rpo_alpha=0.5))[0]
    chosen = render(load_tokenizer(str(tiny)), PAIRS[0]["prompt"], PAIRS[0]["chosen"])
    nll = -plain["logps/chosen"] / sum(chosen.mask)
    assert mixed["loss"] - plain["loss"] == pytest.approx(0.5 * nll, rel=1e-5)


def test_a_base_that_an_adapter_keeps_frozen_is_in_the_compute_dtype(tiny, tmp_path):
    """Everything that is trained, and every weight without an adapter, is float32."""
    for peft, expected in ((True, torch.bfloat16), (False, torch.float32)):
        out = run_sft(tiny, tmp_path, f"{peft}", max_steps=2, dtype="bfloat16", use_peft=peft)
        assert {tensor.dtype for tensor in weights(out).values()} == {expected}
    adapter = load_file(tmp_path / "True" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_lora_exports_base_and_adapter_merged(tiny, tmp_path):
    """What the next stage loads is the instructed model, not the base."""
    out = run_sft(tiny, tmp_path, "out", max_steps=3, use_peft=True, lora_r=4, learning_rate=1e-2)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    before, after = weights(tiny), weights(out)
    assert before.keys() == after.keys()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_one_step_moves_the_norm_weights(tiny, tmp_path):
    """fp32 master weights: even lr 1e-6 on a weight of 1.0 is not rounded away under bf16."""
    out = run_sft(tiny, tmp_path, "out", max_steps=1, dtype="bfloat16", learning_rate=1e-6)
    name = "model.layers.0.input_layernorm.weight"
    assert weights(out)[name].dtype == torch.float32
    assert not torch.equal(weights(tiny)[name], weights(out)[name])


def test_best_checkpoint_is_the_one_with_the_lowest_eval_loss(tiny, tmp_path):
    """With a rate that overshoots, the last weights are not the best; the export is the best."""
    file = str(write_rows(tmp_path / "eval.jsonl", DEMOS[:4]))
    out = run_sft(tiny, tmp_path, "out", max_steps=6, eval_steps=1, eval_file=[file],
                  learning_rate=0.3, per_device_train_batch_size=4)
    losses = {row["step"]: row["eval_loss"] for row in metrics(out)}
    run = json.loads((out / "run.json").read_text())
    assert run["best_step"] == min(losses, key=losses.get)
    examples, _ = read_sft([file], load_tokenizer(str(out)), 256)
    model, _ = load_model(str(out))
    cfg = SFTConfig(str(out), [file], "o")
    assert sft.evaluate(model, examples, cfg, torch.device("cpu"))["eval_loss"] == pytest.approx(
        min(losses.values()), rel=1e-5)


def test_output_dir_of_another_run_is_left_alone(tiny, tmp_path):
    out = run_sft(tiny, tmp_path, "out", max_steps=1)
    before = (out / "model.safetensors").read_bytes()
    file = [str(write_rows(tmp_path / "again.jsonl", DEMOS))]
    (out / "run.json").write_text((out / "run.json").read_text().replace("out.jsonl",
                                                                         "again.jsonl"))
    again = {**QUIET, "max_steps": 1}
    with pytest.raises(Finished):
        sft.main(SFTConfig(str(tiny), file, str(out), **again))
    with pytest.raises(InputError, match="another run: learning_rate was 0.001, now 0.5"):
        sft.main(SFTConfig(str(tiny), file, str(out), **{**again, "learning_rate": 0.5}))
    with pytest.raises(InputError, match="already holds a run of stage 'sft'"):
        run_dpo(tiny, tmp_path, "out", max_steps=1)
    assert (out / "model.safetensors").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="holds model.safetensors but no run.json"):
        sft.main(SFTConfig(str(tiny), file, str(foreign), **again))
    assert (foreign / "model.safetensors").read_bytes() == b"mine"
    (foreign / "model.safetensors").unlink()
    (foreign / ".mine.old").mkdir()
    (foreign / ".mine.tmp").write_bytes(b"mine")
    sft.main(SFTConfig(str(tiny), file, str(foreign), **again))
    assert (foreign / ".mine.old").is_dir() and (foreign / ".mine.tmp").read_bytes() == b"mine"
    sft.main(SFTConfig(str(tiny), file, str(out), **{**again, "learning_rate": 0.5},
                       overwrite_output_dir=True))


@pytest.mark.parametrize("rows,message", [
    ([{**DEMOS[0], "completion": "The answer is 99."}], "answer differs from the ground truth"),
    ([DEMOS[0], {"id": "x", "task": "math", "question": "?"}], r":2: the row has no field 'answer'"),
    ([{k: v for k, v in DEMOS[0].items() if k != "completion"}], "no field 'completion'"),
    ([{**DEMOS[0], "completion": " "}], "empty completion"),
    ([{"prompt": "a", "completion": " "}], "empty completion"),
    ([{**DEMOS[0], "question": "long " * 300}], "longer than max_length 256"),
    ([{"prompt": "a"}], r":1: the row has no field 'completion'"),
    ([{"messages": [{"role": "user", "content": "hi"}]}], r":1: "),
])
def test_bad_demonstrations(tiny, tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        run_sft(tiny, tmp_path, "out", rows=rows, max_steps=1)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("rows,message", [
    ([{k: v for k, v in PAIRS[0].items() if k != "rejected"}], ":1: the row has no field 'rejected'"),
    ([{**PAIRS[0], "chosen": "", "rejected": "x", "prompt": "p"}], "empty completion"),
    ([{**PAIRS[0], "chosen": [{"role": "assistant", "content": " "}]}], "empty completion"),
    ([{**PAIRS[0], "rejected": PAIRS[0]["chosen"]}], "chosen and rejected are the same"),
    ([{"prompt": "word " * 300, "chosen": "a", "rejected": "b"}], "prompt longer than max_length"),
    ([{"prompt": "w", "chosen": "a " * 300, "rejected": "b"}], "completion beyond max_length"),
])
def test_bad_pairs(tiny, tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        run_dpo(tiny, tmp_path, "out", rows=rows, max_steps=1)


def test_plain_trl_rows_train_too(tiny, tmp_path):
    rows = [{"prompt": "Tom has", "chosen": " 7 apples.", "rejected": " 8."}]
    assert metrics(run_dpo(tiny, tmp_path, "strings", rows=rows, max_steps=1))
    implicit = [{"chosen": PAIRS[0]["prompt"] + PAIRS[0]["chosen"],
                 "rejected": PAIRS[0]["prompt"] + PAIRS[0]["rejected"]}]
    explicit = metrics(run_dpo(tiny, tmp_path, "explicit", rows=PAIRS[:1], max_steps=1))
    found = metrics(run_dpo(tiny, tmp_path, "implicit", rows=implicit, max_steps=1))
    assert found[0]["logps/chosen"] == explicit[0]["logps/chosen"]
    sft_rows = [{"prompt": "Tom has", "completion": " 7 apples."},
                {"messages": PAIRS[0]["prompt"] + PAIRS[0]["chosen"]}]
    assert metrics(run_sft(tiny, tmp_path, "sft", rows=sft_rows, max_steps=1))


def test_non_finite_loss_names_the_rows(tiny, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: .* not finite; rows of this step: .*q\d.*"
                                         r"4 steps were skipped for this, --max_skipped_steps is 3"):
        run_sft(tiny, tmp_path, "out", max_steps=20, learning_rate=1e30, max_grad_norm=0.0,
                max_skipped_steps=3)


def test_a_step_that_is_not_finite_changes_no_weight(tiny, tmp_path):
    """The log counts such steps and names their rows, up to max_skipped_steps."""
    model, _ = load_model(str(tiny))
    optimizer = make_adamw(model, SFTConfig(str(tiny), ["f"], str(tmp_path)))
    state = TrainState(step=2, total_steps=100)
    log = MetricsLog(tmp_path, state, max_skipped_steps=1)
    before = [p.detach().clone() for p in model.parameters()]
    rows = [Example(name, Rendered([1, 2], [False, True], "")) for name in "ab"]
    for bad in (float("nan"), float("inf"), 1.0):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.model.norm.weight.grad[0] = bad
        norm, finite = optimizer_step(model, optimizer, 1e-3, 1.0, loss=torch.tensor(0.5))
        state.advance(rows)
        log.add({"loss": torch.tensor(0.5)}, norm, 1, rows, finite)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (bad != 1.0)
    with pytest.raises(Diverged, match="step 4: .*not finite; rows of this step: a, b"):
        log.pending()
    assert log.pending()["weight"] == 1.0 and state.skipped_steps == 2


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_token_budget(tiny, tmp_path, stage):
    """Every row is trained once, in fewer and unequal passes; a budget below one row says so."""
    train = run_sft if stage == "sft" else run_dpo
    one = metrics(train(tiny, tmp_path, "rows", num_train_epochs=1, per_device_train_batch_size=100,
                        shuffle_dataset=False))
    packed = metrics(train(tiny, tmp_path, "budget", num_train_epochs=1, max_tokens_per_batch=400,
                           gradient_accumulation_steps=100, shuffle_dataset=False))
    assert len(one) == len(packed) == 1
    for name in ("loss", "grad_norm", "num_tokens"):
        assert packed[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    with pytest.raises(InputError, match="--max_tokens_per_batch 9 is less than the longest row's"):
        train(tiny, tmp_path, "small", max_tokens_per_batch=9)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("what", ["model", "rows"])
def test_inputs_replaced_between_stop_and_resume_are_refused(tiny, tmp_path, stage, what):
    """Weights or rows under the same names, but not what the run began with."""
    model = shutil.copytree(tiny, tmp_path / "model")
    run = run_sft if stage == "sft" else run_dpo
    settings = {"save_steps": 2, "per_device_train_batch_size": 2}
    run(model, tmp_path, "out", max_steps=2, **settings)
    rows = DEMOS if stage == "sft" else PAIRS
    if what == "model":
        tiny_checkpoint(model, seed=5)
    with pytest.raises(InputError, match="a run of other inputs: .* has changed"):
        run(model, tmp_path, "out", rows=rows[1:] if what == "rows" else rows, max_steps=4, **settings)


def test_a_checkpoint_named_by_hand_must_be_of_the_same_inputs(tiny, tmp_path):
    run_sft(tiny, tmp_path, "a", max_steps=2, save_steps=2)
    with pytest.raises(InputError, match="was trained on other files, or from another model"):
        run_sft(tiny, tmp_path, "b", rows=DEMOS[1:], max_steps=4,
                resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_checkpoint_named_by_hand_must_be_of_the_same_settings(tiny, tmp_path):
    run_sft(tiny, tmp_path, "a", max_steps=2, save_steps=2)
    again = dict(max_steps=4, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    file = [str(tmp_path / "a.jsonl")]
    with pytest.raises(InputError, match="checkpoint-2: was trained with other settings: learning_rate "
                                         "was 0.001, now 0.01; resume with those"):
        sft.main(SFTConfig(str(tiny), file, str(tmp_path / "b"),
                           **{**QUIET, **again, "learning_rate": 0.01}))
    sft.main(SFTConfig(str(tiny), file, str(tmp_path / "c"), **QUIET, **again, save_steps=1))


@pytest.mark.parametrize("there", [True, False])
def test_the_best_weights_come_along_with_a_checkpoint_from_elsewhere(tiny, tmp_path, capsys, there):
    """Without them the best weights are sought anew; with them, the first ones stay the best."""
    file = str(write_rows(tmp_path / "eval.jsonl", DEMOS[:4]))
    settings = dict(QUIET, eval_steps=1, eval_file=[file], learning_rate=3.0, save_steps=3,
                    per_device_train_batch_size=4)
    a = run_sft(tiny, tmp_path, "a", max_steps=3, **settings)
    (best,) = a.glob("best-*")
    if not there:
        shutil.rmtree(best)
    b = tmp_path / "b"
    sft.main(SFTConfig(str(tiny), [str(tmp_path / "a.jsonl")], str(b), max_steps=5,
                       resume_from_checkpoint=str(a / "checkpoint-3"), **settings))
    losses = {row["step"]: row["eval_loss"] for row in metrics(a) + metrics(b)}
    step = json.loads((b / "run.json").read_text())["best_step"]
    assert step == min(losses if there else [4, 5], key=losses.get)
    assert ("are sought from step 3 on" in capsys.readouterr().out) != there
    if there:
        assert best.name == f"best-{step}"
        assert_same_weights(a, b)


def test_a_stop_says_how_a_checkpoint_named_by_hand_goes_on(tiny, tmp_path):
    out = run_sft(tiny, tmp_path, "out", max_steps=2, save_steps=2)
    with shutdown.listening(max_time=1e-9), pytest.raises(
            Stopped, match="the same command without --resume_from_checkpoint goes on from there"):
        run_sft(tiny, tmp_path, "out", max_steps=4,
                resume_from_checkpoint=str(out / "checkpoint-2"))


def test_the_reference_cache_is_reused_unless_it_was_changed(tiny, tmp_path, monkeypatch, capsys):
    """A line that is not as it was written is scored again; so is a pair that has changed."""
    one_by_one = dict(per_device_train_batch_size=1, gradient_accumulation_steps=7, max_steps=1)
    out = run_dpo(tiny, tmp_path, "out", **one_by_one)
    scored, token_logps = [], reference.token_logps
    monkeypatch.setattr(reference, "token_logps", lambda *a: scored.append(1) or token_logps(*a))

    def again(rows=PAIRS):
        for name in ("run.json", "metrics.jsonl", "model.safetensors"):
            (out / name).unlink()
        scored.clear()
        row = metrics(run_dpo(tiny, tmp_path, "out", rows=rows, **one_by_one))[0]
        assert row["rewards/chosen"] == 0.0 and row["loss"] == torch.tensor(2.0).log().item()
        return len(scored)

    assert again() == 0
    lines = [json.loads(line) for line in (out / "ref_logps.jsonl").read_text().splitlines()]
    lines[2]["logps"][0] -= 900.0
    (out / "ref_logps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ke')
    assert again() == 1 and "2 damaged lines" in capsys.readouterr().out
    (out / "ref_logps.jsonl").write_text("")
    assert again() == len(PAIRS)
    assert again([{**PAIRS[0], "chosen": [{"role": "assistant", "content": "new"}]}, *PAIRS[1:]]) == 1


def test_scoring_the_reference_stops_and_goes_on(tiny, tmp_path, monkeypatch):
    straight = run_dpo(tiny, tmp_path, "straight", max_steps=4, per_device_train_batch_size=1)
    scored, token_logps = [], reference.token_logps
    monkeypatch.setattr(reference, "token_logps", lambda *a: scored.append(1) or token_logps(*a))
    for _ in range(4):  # time is up after every batch of the reference, then after every step
        with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
            run_dpo(tiny, tmp_path, "out", max_steps=4, per_device_train_batch_size=1)
    assert len(scored) == 4 and not (tmp_path / "out" / "metrics.jsonl").exists()
    out = run_dpo(tiny, tmp_path, "out", max_steps=4, per_device_train_batch_size=1)
    assert len(scored) == 4
    assert_same_weights(straight, out)


def test_damaged_or_missing_best_weights_are_set_aside(tiny, tmp_path, capsys):
    file = str(write_rows(tmp_path / "eval.jsonl", DEMOS[:4]))
    settings = dict(eval_steps=1, eval_file=[file], learning_rate=0.3, save_steps=6,
                    per_device_train_batch_size=4)
    out = run_sft(tiny, tmp_path, "out", max_steps=6, **settings)
    (best,) = out.glob("best-*")
    data = bytearray((best / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (best / "model.safetensors").write_bytes(data)
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true',
                                                                         '"finished": false'))
    run_sft(tiny, tmp_path, "out", max_steps=6, **settings)
    assert "exporting the last weights instead" in capsys.readouterr().out
    assert (out / f"damaged-{best.name}").is_dir()
    assert json.loads((out / "run.json").read_text())["best_step"] is None


def test_a_first_evaluation_of_nan_is_not_the_best(tiny, tmp_path):
    state = TrainState(step=1)
    best = BestWeights(SFTConfig(str(tiny), ["f"], str(tmp_path)), None, None)
    best.keep(float("nan"), state)
    assert state.best_step is None and not list(tmp_path.iterdir())


def test_resuming_an_older_step_keeps_what_it_writes_next(tiny, tmp_path, capsys):
    settings = dict(save_steps=2, save_total_limit=2, per_device_train_batch_size=2)
    straight = run_sft(tiny, tmp_path, "straight", max_steps=8, **settings)
    out = run_sft(tiny, tmp_path, "out", max_steps=4, **settings)
    run_sft(tiny, tmp_path, "out", max_steps=8, resume_from_checkpoint=str(out / "checkpoint-2"),
            **settings)
    assert "superseded-checkpoint-4" in capsys.readouterr().out
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert_same_weights(straight, out)


def test_a_damaged_older_checkpoint_is_set_aside_in_rotation(tiny, tmp_path):
    settings = dict(save_steps=2, save_total_limit=3, per_device_train_batch_size=2)
    out = run_sft(tiny, tmp_path, "out", max_steps=4, **settings)
    (out / "checkpoint-2" / "trainer_state.json").write_text("{")
    run_sft(tiny, tmp_path, "out", max_steps=6, **settings)
    assert (out / "damaged-checkpoint-2").is_dir() and (out / "checkpoint-6").is_dir()


def test_a_finished_run_says_so(tiny, tmp_path):
    run_sft(tiny, tmp_path, "out", max_steps=1)
    with pytest.raises(Finished, match="this run is finished; train longer with"):
        run_sft(tiny, tmp_path, "out", max_steps=1)
    with open(tmp_path / "out" / "model.safetensors", "ab") as handle:
        handle.write(b"x")
    with pytest.raises(InputError, match="model.safetensors is not as it was written; bring it back"):
        run_sft(tiny, tmp_path, "out", max_steps=1)
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is gone; bring it back"):
        run_sft(tiny, tmp_path, "out", max_steps=1)


def test_fewer_steps_than_were_trained_are_refused(tiny, tmp_path):
    out = run_sft(tiny, tmp_path, "out", max_steps=4, save_steps=2)
    before = (out / "run.json").read_text()
    with pytest.raises(InputError, match="finished, after 4 steps; --max_steps or .* ask for 3"):
        run_sft(tiny, tmp_path, "out", max_steps=3)
    assert (out / "run.json").read_text() == before
    (out / "run.json").write_text(before.replace('"finished": true', '"finished": false'))
    with pytest.raises(InputError, match="checkpoint-4: is further than the 3 steps that --max_steps"):
        run_sft(tiny, tmp_path, "out", max_steps=3)


def test_other_settings_that_come_to_as_many_steps_are_recorded(tiny, tmp_path):
    """A report compares them with the recipe."""
    out = run_sft(tiny, tmp_path, "out", max_steps=2)
    with pytest.raises(Finished):
        run_sft(tiny, tmp_path, "out", max_steps=2, num_train_epochs=9.0)
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["num_train_epochs"] == 9.0 and run["finished"] and run["steps"] == 2


def test_a_date_that_is_that_of_the_run_goes_on(tiny, tmp_path):
    settings = dict(max_steps=2, save_steps=1)
    with shutdown.listening(max_time=1e-9), pytest.raises(Stopped):
        run_sft(tiny, tmp_path, "out", **settings)
    date = json.loads((tmp_path / "out" / "run.json").read_text())["date"]
    run_sft(tiny, tmp_path, "out", date=date, **settings)


def test_a_run_whose_directory_was_deleted_writes_no_more_into_it(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def start_afresh(log, *values):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    monkeypatch.setattr(MetricsLog, "write", start_afresh)
    with pytest.raises(Failed, match="out was deleted while this run wrote to it"):
        run_sft(tiny, tmp_path, "out", max_steps=3)
    assert not list(out.iterdir())


def test_a_finished_run_that_may_not_go_on_stays_finished(tiny, tmp_path):
    run_sft(tiny, tmp_path, "out", max_steps=2, save_steps=2)
    with pytest.raises(InputError, match="a step was 8 rows, pairs or bins, and would now be 4"):
        run_sft(tiny, tmp_path, "out", max_steps=4, per_device_train_batch_size=4)
    with pytest.raises(Finished):
        run_sft(tiny, tmp_path, "out", max_steps=2)


def test_an_input_inside_the_output_directory_is_refused(tiny, tmp_path):
    out = run_sft(tiny, tmp_path, "out", max_steps=2, save_steps=2)
    file = [str(tmp_path / "out.jsonl")]
    with pytest.raises(InputError, match="is an input and lies in --output_dir"):
        sft.main(SFTConfig(str(out / "checkpoint-2"), file, str(out), overwrite_output_dir=True,
                           **{**QUIET, "max_steps": 1}))
    assert (out / "checkpoint-2").is_dir() and (out / "model.safetensors").is_file()


def test_a_run_that_fails_before_its_inputs_are_read_claims_nothing(tiny, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        sft.main(SFTConfig(str(tiny), [str(tmp_path / "none.jsonl")], str(tmp_path / "out"), **QUIET))
    assert not (tmp_path / "out").exists()
