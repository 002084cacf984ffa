"""Bytes of tensors without data, as long as they live."""

import torch

from jepa_scale.plan.memory_tracker import MemoryTracker, Watch


def test_a_storage_counts_once_and_as_long_as_it_lives():
    tracker = MemoryTracker()
    with Watch(tracker):
        x = torch.empty(10, 4, device="meta")
        assert tracker.total == 160
        view = x.t()
        assert tracker.total == 160
        del x
        assert tracker.total == 160  # the view needs it
        del view
        assert tracker.total == 0
        y = torch.empty(5, device="meta") + torch.empty(5, device="meta")
        assert (tracker.total, tracker.peak) == (20, 160)
        del y
    assert tracker.at_peak == {"activations": 160}


def test_what_was_there_before_is_not_counted_and_neither_are_its_views():
    weight = torch.empty(8, 4, device="meta", requires_grad=True)
    x = torch.empty(2, 4, device="meta")
    tracker = MemoryTracker()
    with Watch(tracker):
        y = x @ weight.t()
        assert tracker.total == 2 * 8 * 4
        y.sum().backward()
        del y
        assert tracker.total == 8 * 4 * 4  # the gradient
    assert tracker.peak == 8 * 4 * 4 + 2 * 8 * 4 + 4 + 4  # beside it the product, the sum and the gradient of the sum


def test_autograd_keeps_what_a_backward_needs():
    x = torch.empty(6, device="meta", requires_grad=True)
    tracker = MemoryTracker()
    with Watch(tracker):
        y = x.exp().sin()  # exp keeps its output, and sin its input, the same; y itself
        assert tracker.total == 2 * 24
        loss = y.sum()
        del y
        assert tracker.total == 24 + 4
        loss.backward()


def test_costs_of_operators():
    a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 5, device="meta")
    watch = Watch(MemoryTracker())
    with watch:
        (a @ b).t()
    assert [(op.flops, op.bytes) for op in watch.ops] == [(2 * 2 * 3 * 5, 4 * (6 + 15 + 10))]


def test_kinds_change_and_logits_are_known_by_their_width():
    tracker = MemoryTracker()
    watch = Watch(tracker, vocab=7)
    with watch:
        logits, x = torch.empty(3, 7, device="meta"), torch.empty(3, 6, device="meta")
        assert tracker.live == {"buffers": 84, "activations": 72}
        watch.become(x, "gradients")
        assert tracker.live["gradients"] == 72 and tracker.live["activations"] == 0
        del logits, x
    assert tracker.total == 0 and tracker.most["gradients"] == 72
