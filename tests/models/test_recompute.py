"""Activation checkpointing changes what is kept, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.models.recompute import recompute
from jepa_scale.packing import Segment, pack_sequence

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "native": {**SHAPE, "hidden_dropout": 0.3, "drop_path": 0.5},
    "llama": {"family": "huggingface", "config": {"model_type": "llama", **SHAPE, "intermediate_size": 48}},
    "gpt2": {"family": "huggingface", "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4}},
}


def step(family: str, how: str) -> tuple[torch.Tensor, list[Any], int]:
    """Loss, gradients, and bytes that autograd keeps for the backward pass, parameters left out."""
    torch.manual_seed(0)
    backbone = build_backbone(ModelOptions(**FAMILIES[family]), 50)
    recompute(backbone.layers, how)
    packed = pack_sequence([Segment(list(range(n)), "a", labels=list(range(n))) for n in (40, 9, 9)], seeds=[1, 2, 3])
    parameters = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = backbone.hidden_and_tap(packed, 2)
        loss = backbone.label_losses(hidden[0][packed.labelled], packed.labels[packed.labelled]).sum()
        loss = loss + hidden[1].square().sum()
    loss.backward()
    names = [name for name, _ in backbone.named_parameters()]
    return loss.detach(), [names, *(p.grad for p in backbone.parameters())], sum(kept.values())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_loss_and_gradients_are_the_same_bit_for_bit(family):
    expected = step(family, "none")
    for how in ("selective", "full"):
        loss, grads, _ = step(family, how)
        assert torch.equal(loss, expected[0]), how
        assert grads[0] == expected[1][0]
        for name, a, b in zip(grads[0], grads[1:], expected[1][1:], strict=True):
            assert torch.equal(a, b), (how, name)


def test_less_is_kept():
    none, selective, full = (step("llama", how)[2] for how in ("none", "selective", "full"))
    # Hooks do not see what a selective checkpoint keeps in its own cache: it is counted by the peaks of a run (benchmarks/plan.py).
    assert full < 0.4 * none and selective <= full


def test_nothing_is_recomputed_without_gradient():
    backbone = build_backbone(ModelOptions(**FAMILIES["native"]), 50).eval()
    packed = pack_sequence([Segment([1, 2, 3], "a")])
    calls = []
    with torch.no_grad():
        expected = backbone.hidden(packed)
        recompute(backbone.layers, "full")
        backbone.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(backbone.hidden(packed), expected)
    assert len(calls) == 1
