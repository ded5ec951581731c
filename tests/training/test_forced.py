"""Forced tokens are read but not trained: no loss, no log-prob, no length counts them."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import demo, metrics, pair, tiny_checkpoint, write_rows

from srit.config import DPOConfig, SFTConfig
from srit.data.batches import collate, collate_examples, collate_pairs
from srit.data.examples import read_pairs, read_sft
from srit.kernels.preference_loss import LOSS_TYPES
from srit.models import load_model
from srit.models.lora import add_lora
from srit.runtime.jsonl import read_jsonl
from srit.text.tokenizer import load_tokenizer
from srit.train import dpo, sft

BETA, ALPHA = 0.3, 0.5


def marked_demo(i, a, b):
    row = demo(i, a, b)
    at = row["completion"].index("=") + 1
    return {**row, "completion_forced": [[at, at + 1 + len(row["answer"])]]}


def marked_pair(i, a, b):
    """In the rejected side all but one digit was forced."""
    row, text = pair(i, a, b), marked_demo(i, a, b)
    return {**row, "chosen_forced": text["completion_forced"],
            "rejected": [{"role": "assistant", "content": f"{a + b + 1}, so 5"}],
            "rejected_forced": [[0, len(f"{a + b + 1}")]]}


DEMOS = [marked_demo(i, i % 7 + 1, (i * 3) % 11) for i in range(6)]
PAIRS = [marked_pair(i, i % 7 + 1, (i * 3) % 11) for i in range(5)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), scale=2.0)


@pytest.fixture
def model(tiny):
    return load_model(str(tiny))[0].train()


@pytest.fixture
def pairs(tiny, tmp_path):
    file = write_rows(tmp_path / "read.jsonl", PAIRS)
    found = read_pairs([str(file)], load_tokenizer(tiny), 256)[0]
    for number, row in enumerate(found):
        row.ref_logps = (-30.0 - number, -25.0 + number)
    return found


def last_hidden(model):
    """A list that will hold the hidden states behind the final norm, which keep their gradient."""
    outputs = []

    def keep(_module, _inputs, output):
        if output.requires_grad:
            output.retain_grad()
            outputs.append(output)

    model.model.norm.register_forward_hook(keep)
    return outputs


def gradients(hidden, sides):
    """(those of positions that predict a forced token, those of positions that predict another one).

    hidden: of one stream with the sequences one after the other.
    """
    assert hidden.grad.shape[1] == sum(len(side.ids) for side in sides)
    forced, own, offset = [], [], 0
    for side in sides:
        for at in range(side.mask.index(True), len(side.ids)):
            (own if side.mask[at] else forced).append(hidden.grad[0, offset + at - 1])
        offset += len(side.ids)
    return torch.stack(forced), torch.stack(own)


def test_sft_gives_a_forced_token_no_gradient(model, tiny, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", DEMOS)
    examples, _ = read_sft([str(file)], load_tokenizer(tiny), 256)
    batch, outputs = collate_examples(examples), last_hidden(model)
    loss, _ = sft.compute_loss(model, batch, scale=1.0)
    loss.backward()
    forced, own = gradients(outputs[0], [e.tokens for e in examples])
    assert len(forced) >= len(DEMOS) and (forced == 0).all()
    assert (own != 0).any(1).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("adapter_off", [False, True])
def test_dpo_gives_a_forced_token_no_gradient(model, pairs, loss_type, adapter_off):
    """Also where the reference is the model with its adapter switched off."""
    if adapter_off:
        add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=None)
        for row in pairs:
            row.ref_logps = None
    sides = [side for row in pairs for side in (row.chosen, row.rejected)]
    batch, outputs = collate([[side] for side in sides]), last_hidden(model)
    if not adapter_off:
        batch.ref_logps = collate_pairs(pairs).ref_logps
    cfg = DPOConfig("m", ["f"], "o", loss_type=loss_type, beta=BETA, rpo_alpha=ALPHA,
                    label_smoothing=0.1 if loss_type == "robust" else 0.0)
    dpo.compute_loss(model, batch, cfg)[0].backward()
    forced, own = gradients(outputs[0], sides)
    assert len(forced) >= 2 * len(PAIRS) and (forced == 0).all()
    assert (own != 0).any(1).sum() > len(own) // 2  # hinge has no slope beyond its margin


def own_logps(model, side):
    """log-probs of the trained tokens of one sequence, from its full logits."""
    logps = model(torch.tensor([side.ids]))[0].log_softmax(-1)
    return torch.stack([logps[t - 1, side.ids[t]] for t, m in enumerate(side.mask) if m])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
def test_dpo_sums_and_lengths_are_those_of_trained_tokens(model, pairs, loss_type):
    """By hand, for pairs that share their prompt in one batch."""
    cfg = DPOConfig("m", ["f"], "o", loss_type=loss_type, beta=BETA, rpo_alpha=ALPHA)
    with torch.no_grad():
        _, sums = dpo.compute_loss(model, collate_pairs(pairs), cfg)
        expected = 0.0
        for row in pairs:
            chosen, rejected = own_logps(model, row.chosen), own_logps(model, row.rejected)
            assert len(chosen) == sum(row.chosen.mask) < len(row.chosen.ids)
            ratios = [chosen.sum() - row.ref_logps[0], rejected.sum() - row.ref_logps[1]]
            if loss_type != "sigmoid":
                ratios = [ratios[0] / len(chosen), ratios[1] / len(rejected)]
            margin = ratios[0] - ratios[1]
            ipo = (margin - 1 / (2 * BETA)) ** 2
            expected += ipo if loss_type == "ipo" else -F.logsigmoid(BETA * margin)
            expected -= ALPHA * chosen.mean()
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-5)
    logps = sum(own_logps(model, row.chosen).sum().item() for row in pairs)
    assert sums[dpo.METRICS.index("logps/chosen")].item() == pytest.approx(logps, rel=1e-5)


QUIET = dict(dtype="float32", device="cpu", max_length=256, logging_steps=1, max_steps=1,
             lr_scheduler_type="constant", warmup_ratio=0.0, learning_rate=1e-3)


def run(stage, config, tiny, tmp_path, name, rows, **settings):
    file = write_rows(tmp_path / f"{name}.jsonl", rows)
    stage.main(config(str(tiny), [str(file)], str(tmp_path / name), **{**QUIET, **settings}))
    return metrics(tmp_path / name)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"gradient_accumulation_steps": 3},
                                      {"max_tokens_per_batch": 256}])
def test_sft_is_a_mean_over_trained_tokens(model, tiny, tmp_path, settings):
    size = 2 if "gradient_accumulation_steps" in settings else 6
    (row,) = run(sft, SFTConfig, tiny, tmp_path, "out", DEMOS, per_device_train_batch_size=size,
                 **{"gradient_accumulation_steps": 6, **settings})
    examples, _ = read_sft([str(tmp_path / "out.jsonl")], load_tokenizer(tiny), 256)
    with torch.no_grad():
        logps = torch.cat([own_logps(model, example.tokens) for example in examples])
    assert len(logps) == sum(example.num_trained for example in examples)
    assert row["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [
    {}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    {"use_peft": True}, {"use_peft": True, "precompute_ref_log_probs": False}])
def test_step_zero_is_exactly_ln_2(tiny, tmp_path, settings, dtype):
    for row in run(dpo, DPOConfig, tiny, tmp_path, "out", PAIRS, max_steps=2, dtype=dtype,
                   **{**settings, "learning_rate": 0.0}):
        assert row["loss"] == torch.tensor(math.log(2)).item()
        assert row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0.0
        assert row["grad_norm"] > 0


def test_the_reference_cache_knows_the_marks(tiny, tmp_path):
    """The same tokens with other marks are another entry, with another sum."""
    plain = [{key: value for key, value in row.items() if not key.endswith("_forced")} for row in PAIRS]
    caches = []
    for name, rows in (("marked", PAIRS), ("plain", plain)):
        run(dpo, DPOConfig, tiny, tmp_path, name, rows)
        cache = read_jsonl(tmp_path / name / "ref_logps.jsonl")
        caches.append({row["key"]: row["logps"] for row in cache})
    marked, plain = caches
    assert len(marked) == len(plain) == len(PAIRS) and not marked.keys() & plain.keys()
    for fewer, more in zip(marked.values(), plain.values(), strict=True):
        assert fewer[0] > more[0] and fewer[1] > more[1]  # a part of the sum
