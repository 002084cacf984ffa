"""The routers' balance loss is that of transformers, over the global batch however it is divided."""

from dataclasses import replace

import pytest
import torch

from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.packing import Segment, pack, pack_sequence
from tests.objectives.helpers import DATA

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(num_local_experts=4, num_experts_per_tok=2)
FACTS = [DATA.train[i] for i in range(0, 40, 5)]


def make(model_type="mixtral", **keys):
    torch.manual_seed(0)
    config = {"model_type": model_type, "output_router_logits": True, **SIZES, **keys}
    backbone = build_backbone(ModelOptions(family="huggingface", config=config), DATA.vocab_size)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    return backbone.eval()


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe", "phimoe", "gpt_oss", "granitemoe"])
def test_one_sequence_has_the_loss_of_transformers(model_type):
    keys = {"head_dim": 8} if model_type == "gpt_oss" else {}
    backbone = make(model_type, router_aux_loss_coef=0.7, **keys)
    balance = backbone.router_loss
    assert (balance.coefficient, balance.experts, balance.chosen) == (0.7, 4, 2)
    ids = torch.arange(3, 20)
    with backbone.routers_recorded() as logits:
        backbone.hidden(pack_sequence([Segment(ids.tolist(), "a")]))
    with backbone.unpacked() as decoder:
        decoder.set_attn_implementation("eager")
        theirs = decoder(ids[None], labels=ids[None])
    torch.testing.assert_close(balance.share(logits, balance.counts(logits)), theirs.aux_loss, atol=1e-5, rtol=1e-5)


def test_a_family_has_none_unless_its_config_asks():
    assert make(output_router_logits=False).router_loss is None
    assert make(router_aux_loss_coef=0.0).router_loss is None


def packed(objective, facts, total):
    batch = pack([objective.view_transform()(f, SampleRNG(0, 0, 0, i)) for i, f in enumerate(facts)])
    return replace(batch, totals={"labels": torch.tensor(float(total))})


def run(parts):
    """Loss, balance loss and gradients of a step whose facts are divided into these micro-batches."""
    backbone = make(router_aux_loss_coef=0.5)
    model = JepaModel(backbone, LanguageModeling(LmOptions(), backbone, DATA))
    assert model.objective.balances_routers
    labels = sum(packed(model.objective, part, 1).counts["labels"] for part in parts)
    batches = [packed(model.objective, part, labels) for part in parts]
    gathered = []
    if len(batches) > 1:
        with torch.no_grad():
            gathered = [model("gather", batch) for batch in batches]
    losses = [model("loss", batch, gathered, micro) for micro, batch in enumerate(batches)]
    sum(loss.total for loss in losses).backward()
    means = {name: float(sum(loss.means[name] for loss in losses)) for name in losses[0].means}
    assert means["loss"] == pytest.approx(means["lm_loss"] + 0.5 * means["router_aux_loss"], rel=1e-5)
    return means, {name: p.grad for name, p in model.named_parameters()}


def test_micro_batches_change_neither_loss_nor_gradient():
    means, grads = run([FACTS])
    for parts in ([FACTS[:3], FACTS[3:]], [FACTS[:1], FACTS[1:2], FACTS[2:]]):
        found, theirs = run(parts)
        assert found == pytest.approx(means, rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(theirs[name], grad, atol=1e-6, rtol=1e-4)
