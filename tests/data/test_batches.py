"""Token streams: the shift between tokens and targets, and shared prefixes."""

import pytest
import torch

from srit.data.batches import Pair, collate, collate_pairs, common_prefix
from srit.text.prompts import Rendered


def rendered(ids, mask):
    return Rendered(ids=ids, mask=[bool(m) for m in mask], text="")


def test_collate_shifts_once():
    batch = collate([[rendered([5, 6, 7, 8], [0, 0, 1, 1])], [rendered([9, 10, 11], [0, 1, 1])]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.predict_positions.tolist() == [1, 2, 4, 5]  # the token before each trained one
    assert batch.targets.tolist() == [7, 8, 10, 11]
    assert batch.cu_targets.tolist() == [0, 2, 4]


def test_a_group_shares_its_prefix():
    """Prompt 1 2 3; both completions begin with 4, whose predecessor is in the stream once."""
    chosen = rendered([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
    rejected = rendered([1, 2, 3, 4, 7], [0, 0, 0, 1, 1])
    batch = collate([[rendered([9, 8], [0, 1])], [chosen, rejected]])
    assert batch.input_ids.tolist() == [[9, 8, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 4]]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 8, 9]
    assert batch.parents.tolist() == [-1, -1, 1, 1]
    assert batch.predict_positions.tolist() == [0, 4, 5, 6, 4, 5]
    assert batch.targets.tolist() == [8, 4, 5, 6, 4, 7]
    assert batch.cu_targets.tolist() == [0, 1, 4, 6]
    assert batch.num_tokens == 13


@pytest.mark.parametrize(
    ("ids", "shared"),
    [([[1, 2, 3]], 0), ([[1, 2], [1, 3]], 1), ([[5, 2], [1, 2]], 0), ([[1, 2], [1, 2, 3]], 1),
     ([[1], [1, 2]], 0), ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 4]], 2)],
)
def test_a_common_prefix_leaves_every_sequence_a_token(ids, shared):
    assert common_prefix([rendered(x, [1] * len(x)) for x in ids]) == shared


def test_trained_positions_are_the_completion():
    """The first answer token and the turn end are trained, the last prompt token is not."""
    prompt, completion = [1, 2, 3], [4, 5, 6]
    batch = collate([[rendered(prompt + completion, [0] * 3 + [1] * 3)]])
    assert batch.targets.tolist() == completion
    assert batch.input_ids[0, batch.predict_positions].tolist() == [3, 4, 5]


def test_first_token_of_a_sequence_has_no_predecessor():
    batch = collate([[rendered([1, 2], [0, 1])], [rendered([3, 4], [1, 1])]])
    assert batch.targets.tolist() == [2, 4]


def test_pairs_bring_their_reference_logps():
    sides = rendered([1, 2, 3], [0, 1, 1]), rendered([1, 4], [0, 1])
    known, unknown = Pair("a", *sides, ref_logps=(-1.5, -2.5)), Pair("b", *sides)
    assert collate_pairs([known, known]).ref_logps.tolist() == [-1.5, -2.5, -1.5, -2.5]
    assert collate_pairs([known, unknown]).ref_logps is None


def test_batch_moves_whole():
    batch = collate([[rendered([1, 2], [0, 1])]]).to(torch.device("cpu"))
    assert batch.targets.tolist() == [2]
