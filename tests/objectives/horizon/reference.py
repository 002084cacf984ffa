"""Small data, a teacher and a plain reference for `horizon`: fp64, one sequence at a time, no packing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.data.examples import Conversation, Document, Turn
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.horizon.config import HorizonOptions
from jepa_scale.objectives.horizon.objective import Horizon
from jepa_scale.packing import IGNORE, PackedBatch
from tests.objectives import helpers
from tests.objectives.helpers import Copies, alone

VOCABULARY, LONGEST = 40, 24
HORIZONS = [2, 5, 9]
GPT2 = dict(n_embd=16, n_layer=3, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
MODELS: dict[str, dict[str, Any]] = {
    "native": {},
    "tied": dict(tie_word_embeddings=True, output_bias=True),
    "bridge": dict(bridge_after=2, bridge_grad_barrier=True),
}


def model(name: str = "native", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if name == "gpt2":
        options = ModelOptions(family="huggingface", config=dict(model_type="gpt2", initializer_range=0.3, **GPT2))
    else:
        shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.3)
        options = ModelOptions(**shape, **MODELS[name])
    return build_backbone(options, VOCABULARY)


def make(backbone: Any, **options: Any) -> Horizon:
    torch.manual_seed(1)
    keys = dict(tap_layer=2, horizons=HORIZONS, horizon_probs=[0.5, 0.3, 0.2], pairs_per_sequence=6, latent_dim=6)
    objective = Horizon(HorizonOptions(**{**keys, **options}), backbone, SimpleNamespace(train=Sizes(LONGEST)))
    objective.teacher = Copies(objective, backbone)  # type: ignore[assignment]
    return objective


@dataclass(frozen=True)
class Sizes:
    max_size: int


def documents(*lengths: int) -> list[Any]:
    rng = np.random.default_rng(4)
    return [Document(rng.integers(0, VOCABULARY, n)) for n in lengths]


def conversation(n: int, *spoken: tuple[int, int]) -> Conversation:
    """n tokens, of which the assistant said those in the spans."""
    tokens = np.random.default_rng(n).integers(0, VOCABULARY, n)
    return Conversation(tokens, tuple(Turn("assistant", *span) for span in spoken), [])


def micro_batches(objective: Horizon, *parts: list[Any], step: int = 0) -> list[PackedBatch]:
    """A step's micro-batches; the samples are numbered through."""
    return helpers.micro_batches(objective, documents(LONGEST)[0], *parts, step=step)


def gradients(*modules: torch.nn.Module) -> dict[str, Tensor | None]:
    found = {}
    for i, module in enumerate(modules):
        found |= {f"{i}.{n}": None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}
        module.zero_grad(set_to_none=True)
    return found


@dataclass
class Pairs:
    """Of all samples, in order: everything about each pair."""

    anchor: Tensor
    predicted: Tensor
    target: Tensor
    horizon: Tensor
    place: list[tuple[int, int]]
    teacher_logits: Tensor
    student_logits: Tensor | None
    counts: Tensor
    lm: Tensor


def doubled(backbone: Any, objective: Horizon) -> tuple[Any, Horizon]:
    """Copies in fp64."""
    backbone, in_fp64 = copy.deepcopy(backbone).double(), copy.deepcopy(objective).double()
    for part in in_fp64.teacher.copies.values():  # type: ignore[attr-defined]
        part.double()
    return backbone, in_fp64


def every_pair(backbone: Any, objective: Horizon, samples: list[Any], step: int = 0) -> Pairs:
    """Sample by sample and pair by pair."""
    o, copies = objective.options, objective.teacher.copies  # type: ignore[attr-defined]
    head = backbone.decoder.get_output_embeddings()
    still = {name: p.detach() for name, p in head.named_parameters()}
    found: dict[str, list[Any]] = {name: [] for name in Pairs.__dataclass_fields__}
    for number, sample in enumerate(samples):
        (segment,) = (views := objective.view_transform()(sample, SampleRNG(0, 0, step, number))).segments
        tokens, labels = (np.asarray(x, np.int64)[:-1] for x in sample.lm_sequence())
        hidden, states = alone(backbone, tokens.tolist()), alone(backbone, tokens.tolist(), objective.tap)
        logits = backbone.logits(hidden)
        theirs = states.detach()
        if o.teacher == "backbone":
            with torch.no_grad():
                theirs = alone(copies["backbone"], tokens.tolist())
        for t, label in enumerate(labels.tolist()):
            if label != IGNORE:
                found["lm"].append(-torch.log_softmax(logits[t], -1)[label])
        for horizon, anchor in zip(views.rows["horizon"].tolist(), segment.positions["anchor"].tolist(), strict=True):
            target = anchor + o.horizons[horizon]
            latent = objective.encoder(states[anchor].detach() if o.detach else states[anchor])
            if o.target_layer is None:
                predicted = objective.predictor(torch.cat([latent, objective.horizon_embedding.weight[horizon]]))
                with torch.no_grad():
                    found["target"].append(copies["objective.encoder"](theirs[target]))
            else:
                predicted = objective.predictor(latent)
                found["target"].append(alone(backbone, tokens.tolist(), o.target_layer)[target].detach())
            found["anchor"].append(latent)
            found["predicted"].append(predicted)
            found["horizon"].append(torch.tensor(horizon))
            found["place"].append((number, target))
            found["teacher_logits"].append(logits[target].detach())
            found["counts"].append(torch.tensor(labels[target] != IGNORE))
            if objective.latent_to_hidden is not None:
                rows = objective.latent_to_hidden(predicted.detach() if o.kl_barrier else predicted)[None]
                frozen = o.kl_freeze_head or o.detach
                student = torch.func.functional_call(head, still, (rows,)) if frozen else head(rows)
                found["student_logits"].append(student[0])
    stacked = {name: torch.stack(x) for name, x in found.items() if name != "place" and x}
    empty = {name: None if name == "student_logits" else torch.zeros(0) for name in found if name not in stacked}
    return Pairs(**{**empty, **stacked, "place": found["place"]})


def jepa_loss(objective: Horizon, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of predictions and targets, and its terms, from the papers' formulas."""
    o, a, b = objective.options, pairs.predicted, pairs.target
    n, d = a.shape
    beside = ~torch.eye(d, dtype=torch.bool)
    if o.loss == "barlow":
        a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (a, b))
        c = a.T @ b / n
        terms = {"align": (1 - c.diagonal()).square().mean(), "off_diagonal": c[beside].square().mean()}
        return o.align_scale * terms["align"] + o.off_diag_scale * terms["off_diagonal"], terms
    if o.loss == "vicreg":
        terms = {
            "invariance": F.mse_loss(a, b),
            "variance": torch.relu(1 - (a.var(0) + 1e-4).sqrt()).mean(),
            "covariance": torch.cov(a.T)[beside].square().sum() / d,
        }
        weights = (o.invariance_weight, o.variance_weight, o.covariance_weight)
        return sum(w * x for w, x in zip(weights, terms.values(), strict=True)), terms
    if o.loss == "cosine":
        return (1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)).mean(), {}
    x = (a - b).abs()
    return torch.where(x < 1, x.square() / 2, x - 0.5).mean(), {}


def future_terms(objective: Horizon, pairs: Pairs) -> dict[str, Tensor]:
    """Means over the pairs that count."""
    t, counts = objective.options.kl_temperature, pairs.counts
    assert pairs.student_logits is not None
    p, q = (pairs.teacher_logits[counts] / t).softmax(-1), (pairs.student_logits[counts] / t).softmax(-1)
    ce, entropy = -(p * q.log()).sum(-1).mean(), -(p * p.log()).sum(-1).mean()
    return {"ce_future": ce, "teacher_entropy": entropy, "kl_future": ce - entropy}


def reference(
    backbone: Any, objective: Horizon, samples: list[Any], weights: tuple[float, float, float]
) -> dict[str, Tensor]:
    """The loss and its terms in fp64; ``loss`` has gradient. ``weights``: of next-token prediction, of the loss of latents
    and of the future KL."""
    pairs = every_pair(backbone, objective, samples)
    jepa, terms = jepa_loss(objective, pairs)
    lm = pairs.lm.mean()
    total = weights[0] * lm + weights[1] * jepa
    if objective.latent_to_hidden is not None:
        terms |= future_terms(objective, pairs)
        total = total + weights[2] * objective.options.kl_temperature**2 * terms["kl_future"]
    return {"loss": total, "lm_loss": lm, "jepa_loss": jepa, **terms}
