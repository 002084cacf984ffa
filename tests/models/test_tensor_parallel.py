"""A decoder split over a team of ranks is the whole one: states, losses, logits, generated tokens, every gradient."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from jepa_scale.distributed.comm import ParallelContext, init_tp_group, tp_group
from jepa_scale.distributed.tp_group import TensorParallelGroup
from jepa_scale.models import head as lm_head
from jepa_scale.models.generation.batches import Prompts, greedy
from jepa_scale.models.head import statistics
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.models.tensor_parallel import layers as tensor_parallel
from jepa_scale.packing import PackedSequence, Segment, pack_sequence
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.models.test_backbone import FAMILIES as PACKED
from tests.models.test_token_rows import FAMILIES as SMALL

VOCABULARY = 37  # no multiple of the team
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {**SHAPE, "intermediate_size": 48, "head_dim": 8, "pad_token_id": 3}
SLIDING = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "native": SHAPE,
    "native_tied": {**SHAPE, "tie_word_embeddings": True, "output_bias": True},
    "native_pope": {**SHAPE, "position_embedding": "pope", "embedding_norm": True, "bridge_after": 2},
    "native_drop_path": {**SHAPE, "drop_path": 0.5},
    "llama": {"family": "huggingface", "config": {"model_type": "llama", **COMMON, "mlp_bias": True}},
    "qwen3": {"family": "huggingface", "config": {"model_type": "qwen3", **COMMON}},
    "gemma3": {"family": "huggingface", "config": {"model_type": "gemma3_text", **COMMON, **SLIDING}},
    "olmo2": {
        "family": "huggingface",
        "config": {"model_type": "olmo2", **{k: v for k, v in COMMON.items() if k != "head_dim"}},
    },
}


def build(family: str) -> Any:
    torch.manual_seed(0)
    whole = build_backbone(ModelOptions(**FAMILIES[family]), VOCABULARY)
    with torch.no_grad():
        for parameter in whole.parameters():  # not all alike: norms start as ones, phases as zeros
            parameter += 0.1 * torch.randn_like(parameter)
    return whole


def stream(lengths: tuple[int, ...] = (5, 2, 2, 4)) -> PackedSequence:
    generator = torch.Generator().manual_seed(1)
    segments = []
    for length in lengths:
        tokens = torch.randint(0, VOCABULARY, (length + 1,), generator=generator).tolist()
        segments.append(Segment(tokens[:-1], "a", labels=tokens[1:]))
    return pack_sequence(segments, seeds=list(range(7, 7 + len(lengths))))


def step(backbone: Any, packed: PackedSequence) -> dict[str, torch.Tensor]:
    """Whatever an objective may ask for, and the gradient of a loss of it all."""
    hidden, tapped = backbone.hidden_and_tap(packed, 1)
    losses = backbone.label_losses(hidden[packed.labelled], packed.labels[packed.labelled])
    last = backbone.last_hidden(packed, until=2)
    logits = backbone.logits(hidden[packed.last])
    frozen = backbone.logits(tapped[packed.last], frozen=True)
    normed = backbone.normed(tapped[packed.last])
    found = {"hidden": hidden, "tapped": tapped, "losses": losses, "last": last, "logits": logits, "frozen": frozen}
    found["normed"] = normed
    index = torch.tensor([0, 0, 2])
    found["kl"] = backbone.head_kl(hidden[:3], tapped[4:7], index)
    with patch.object(lm_head, "CHUNK_BYTES", 8 * VOCABULARY):
        found["kl in pieces"] = backbone.head_kl(hidden[:3], tapped[4:7], index)
    weights = torch.Generator().manual_seed(2)
    sum((x * torch.randn(x.shape, generator=weights)).sum() for x in found.values()).backward()
    return {name: value.detach() for name, value in found.items()}


def compare(ranks: ParallelContext, family: str) -> dict[str, float]:
    """Largest difference to the whole decoder of each thing, relative to its largest value."""
    whole = build(family)
    mine = copy.deepcopy(whole)
    ranks = init_tp_group(ranks, ranks.world_size)
    group = tp_group()
    assert group is not None
    splits = tensor_parallel.split(mine, TensorParallelGroup(group, ranks.rank, ranks.tp_size))
    mine = copy.deepcopy(mine)  # as a teacher's copy is made
    expected, got = step(whole, stream()), step(mine, stream())
    apart = {name: distance(got[name], expected[name]) for name in expected}
    for name, parameter in whole.named_parameters():
        grad, part = parameter.grad, dict(mine.named_parameters())[name]
        assert grad is not None
        if name in splits:
            dim, start, size = splits[name]
            assert size == grad.shape[dim] and part.shape[dim] < size
            grad = grad.narrow(dim, start, part.shape[dim])
        apart[name] = distance(part.grad, grad, parameter.grad.abs().max())
    with torch.no_grad():
        states = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
        apart["unembed"] = distance(mine.unembed(states), whole.unembed(states))
        prompts = Prompts.of([torch.tensor([5, 6, 7]).numpy(), torch.tensor([9]).numpy()])
        whole.eval(), mine.eval()
        said = []
        for backbone in (whole, mine):
            with backbone.unpacked() as decoder:
                said.append(greedy(decoder, prompts, (), 6).tokens)
    apart["generated"] = float((said[0] != said[1]).sum())
    assert len(splits) >= 3 * 7 + 1
    return apart


def distance(got: Any, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    assert got is not None and got.shape == expected.shape, (None if got is None else got.shape, expected.shape)
    return float((got - expected).abs().max() / ((expected.abs().max() if scale is None else scale) + 1e-12))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_team_computes_what_one_rank_does(family):
    for apart in run_ranks(compare, 2, family):
        assert max(apart.values()) < 2e-5, {name: value for name, value in apart.items() if value >= 2e-5}


def cross_entropies(ranks: ParallelContext) -> list[torch.Tensor]:
    ranks = init_tp_group(ranks, ranks.world_size)
    group = tp_group()
    assert group is not None
    tp = TensorParallelGroup(group, ranks.rank, ranks.tp_size)
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(9, VOCABULARY, generator=generator)).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (9,), generator=generator)
    weights = torch.randn(9, generator=generator)
    expected = F.cross_entropy(logits, targets, reduction="none")
    (grad,) = torch.autograd.grad((expected * weights).sum(), logits)
    part = tp.part(VOCABULARY)
    mine = logits.detach()[:, part].requires_grad_()
    got = tp.label_losses(*statistics(mine, targets - part.start))
    (own,) = torch.autograd.grad((got * weights).sum(), mine)
    nothing = tp.label_losses(*statistics(mine[:0], targets[:0]))
    assert nothing.shape == (0,)
    return [expected.detach() - got.detach(), own - grad[:, part]]


@pytest.mark.parametrize("size", [2, 3])
def test_cross_entropy_of_a_vocabulary_in_parts(size):
    for difference in (d for of_rank in run_ranks(cross_entropies, size) for d in of_rank):
        assert difference.abs().max() < 2e-5


@pytest.mark.parametrize(
    ("options", "size", "told"),
    [
        (SHAPE, 3, "engine.tp: 3 does not divide model.num_attention_heads, which is 4"),
        (SHAPE, 4, "engine.tp: 4 does not divide model.num_key_value_heads, which is 2"),
        ({**SHAPE, "intermediate_size": 33}, 2, "engine.tp: 2 does not divide model.intermediate_size, which is 33"),
        ({**SHAPE, "hidden_dropout": 0.1}, 2, "set the model's dropout to 0"),
        ({**SHAPE, "lora": {"rank": 2}}, 2, "engine.tp: tensor parallelism does not support model.lora"),
        (
            {"family": "huggingface", "config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}},
            2,
            "engine.tp: transformers has no tensor-parallel plan for GPT2LMHeadModel",
        ),
        (
            {
                "family": "huggingface",
                "packing": "padded",
                "config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
            },
            2,
            "engine.tp: tensor parallelism does not support model.packing: padded; set engine.tp=1",
        ),
        (
            {"family": "huggingface", "config": SMALL["lfm2"]},
            2,
            "engine.tp: tensor parallelism does not support recurrences and convolutions; set engine.tp=1",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(options, size, told):
    backbone = build_backbone(ModelOptions(**options), VOCABULARY)
    with pytest.raises(InputError) as error:
        tensor_parallel.check(backbone, size)
    assert told in str(error.value)


def test_embeddings_of_each_layer_are_not_split():
    config = {**PACKED["gemma4"], "vocab_size_per_layer_input": VOCABULARY}
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), VOCABULARY)
    with pytest.raises(InputError, match="engine.tp: tensor parallelism does not support embeddings of each layer"):
        tensor_parallel.check(backbone, 2)
