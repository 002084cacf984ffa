import torch

from jepa_scale.objectives.grid.temporal_attention import TemporalAttention, temporal


def state_of(module):
    return lambda states, present: module(states, present)[0]


def test_the_order_of_the_context_counts_for_attention_and_not_for_the_mean():
    torch.manual_seed(0)
    states, everything = torch.randn(4, 3, 8), torch.ones(4, 3, dtype=torch.bool)
    backwards = states.flip(1)
    attention, mean = state_of(temporal("attention", 3)), state_of(temporal("mean", 3))
    torch.testing.assert_close(mean(states, everything), mean(backwards, everything))
    torch.testing.assert_close(mean(states, everything), states.mean(dim=1))
    change = (attention(states, everything) - attention(backwards, everything)).norm() / attention(
        states, everything
    ).norm()
    assert change > 0.05
    assert not list(temporal("mean", 3).parameters())


def test_attention_is_a_weighted_sum_in_each_channel():
    """As GridJEPA has it, for whole sequences: softmax over time of Linear(L, L) applied to each channel's values."""
    torch.manual_seed(1)
    module, states = TemporalAttention(3), torch.randn(2, 3, 5)
    got, weights = module(states, torch.ones(2, 3, dtype=torch.bool))
    weight, bias = module.score.weight, module.score.bias
    for n in range(2):
        for channel in range(5):
            x = states[n, :, channel]
            torch.testing.assert_close(got[n, channel], ((weight @ x + bias).softmax(0) * x).sum())
    torch.testing.assert_close(
        weights[0], torch.stack([(weight @ x + bias).softmax(0) for x in states[0].T]).mean(dim=0)
    )
    got.sum().backward()
    assert module.score.weight.grad.abs().sum() > 0


def test_absent_grids_count_for_nothing():
    torch.manual_seed(2)
    states, present = torch.randn(2, 3, 4), torch.tensor([[False, True, True], [False, False, True]])
    other = torch.where(present[..., None], states, torch.randn(2, 3, 4) * 100)
    for kind in ("attention", "mean"):
        module = state_of(temporal(kind, 3))
        torch.testing.assert_close(module(states, present), module(other, present))
        torch.testing.assert_close(module(states, present)[1], states[1, 2])  # one grid is itself
    torch.testing.assert_close(temporal("mean", 3)(states, present)[0][0], states[0, 1:].mean(dim=0))


def test_the_weights_of_the_places_sum_to_one_and_absent_ones_have_none():
    present = torch.tensor([[False, True, True], [False, False, True]])
    for kind in ("attention", "mean"):
        weights = temporal(kind, 3)(torch.randn(2, 3, 4), present)[1]
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
        assert (weights[~present] == 0).all() and not weights.requires_grad
