"""Means of consecutive groups of rows, and rows of a split gathered by name."""

import torch

from jepa_scale.objectives.grouping import gather_rows, group_means


def test_means_of_groups_are_those_of_their_rows_and_zero_without_rows():
    rows = torch.randn(6, 3).bfloat16()
    means = group_means(rows, torch.tensor([2, 0, 1, 3]))
    expected = [rows[:2].float().mean(dim=0), torch.zeros(3), rows[2].float(), rows[3:].float().mean(dim=0)]
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, torch.stack(expected))
    assert group_means(rows[:0], torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def test_rows_are_gathered_in_the_order_of_the_batches():
    mine, every = gather_rows({"x": torch.tensor([[float(i)]]), "key": torch.tensor([i])} for i in range(3))
    for found in (mine, every):
        assert found["x"].tolist() == [[0.0], [1.0], [2.0]] and found["key"].tolist() == [0, 1, 2]
    assert gather_rows([]) == ({}, {})
