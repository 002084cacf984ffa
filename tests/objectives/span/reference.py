"""Small data and a plain reference for `span`: one text at a time, every view at full length under a dense mask."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.data.examples import Document
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.losses.sigreg import directions
from jepa_scale.models.decoder import position_table
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.base import JepaModel
from jepa_scale.objectives.span.config import SpanOptions
from jepa_scale.objectives.span.objective import Span
from jepa_scale.packing import PackedBatch, add_counts, pack

VOCABULARY, LONGEST, EOS = 40, 24, 0
DATA: Any = SimpleNamespace(
    kind="text", special={"eos": EOS}, vocab_size=VOCABULARY, train=SimpleNamespace(max_size=LONGEST)
)


def model(objective: dict[str, Any], seed: int = 0, **keys: Any) -> JepaModel:
    """In fp64, with norms that are not all ones."""
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    backbone = build_backbone(ModelOptions(**{**shape, **keys}), VOCABULARY)
    found = JepaModel(backbone, Span(SpanOptions(**{"sigreg_slices": 16, **objective}), backbone, DATA)).double()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" in name or "delta" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return found


def texts(*lengths: int) -> list[Document]:
    drawn = np.random.default_rng(5).integers(1, VOCABULARY, (len(lengths), LONGEST))
    return [Document(np.append(row[:n], EOS)) for row, n in zip(drawn, lengths, strict=True)]


def batches_of(objective: Span, examples: list[Document], micros: int = 1, step: int = 3) -> list[PackedBatch]:
    """The texts as ``micros`` micro-batches of one rank that are the whole global batch."""
    make = objective.view_transform()
    views = [make(example, SampleRNG(7, 0, step, i)) for i, example in enumerate(examples)]
    some = [views[i::micros] for i in range(micros)]
    packed = [pack(part, objective.sequences, step=step, seed=7, like=views[0]) for part in some]
    totals = {name: torch.tensor(float(n)) for name, n in add_counts(packed).items()}
    return [replace(batch, totals=totals) for batch in packed]


def run(module: JepaModel, batches: list[PackedBatch]) -> dict[str, Tensor]:
    """The step's loss and terms, gradients in the parameters, as the loop computes them."""
    objective = module.objective
    gathered = []
    if objective.needs_global_batch and len(batches) > 1:
        with torch.no_grad():
            gathered = [module("gather", batch) for batch in batches]
    sums: dict[str, Any] = {}
    for micro, batch in enumerate(batches):
        loss = module("loss", batch, gathered, micro)
        loss.total.backward()
        for name, value in loss.means.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def encode(backbone: Any, tokens: np.ndarray, positions: np.ndarray, masked: np.ndarray) -> tuple[Tensor, Tensor]:
    """(n, d) states after and before the final norm of a text whose ``masked`` tokens no other token sees."""
    n, raw = len(tokens), []
    hidden_key = torch.from_numpy(masked)[None, :] & ~torch.eye(n, dtype=torch.bool)
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(hidden_key, -torch.inf)
    mask = mask.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    handle = backbone.layers[-1].register_forward_hook(lambda _, args, out: raw.append(out))
    decoder = backbone.decoder
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        ids, places = (torch.from_numpy(x)[None] for x in (tokens, positions))
        out = decoder.base_model(input_ids=ids, position_ids=places, attention_mask=mask[None, None], use_cache=False)
    finally:
        decoder.set_attn_implementation(implementation)
        handle.remove()
    return out.last_hidden_state[0], raw[0][0]


def fill_in(predictor: Any, states: Tensor, positions: np.ndarray, masked: np.ndarray) -> Tensor:
    """(n, d), what the predictor makes of a view: dense attention of every token to every other one."""
    places = torch.from_numpy(positions)
    x = torch.where(torch.from_numpy(masked)[:, None], predictor.mask_embedding(places), states)[None]
    table = position_table(predictor.config, places[None], x.dtype)
    implementation, predictor.config._attn_implementation = predictor.config._attn_implementation, "eager"
    try:
        for layer in predictor.layers:
            x = layer(x, rotary=table)
    finally:
        predictor.config._attn_implementation = implementation
    return x[0]


def sigreg(rows: Tensor, step: int, o: SpanOptions, seed: int = 7) -> Tensor:
    toward = directions(rows.shape[1], seed, step, o.sigreg_slices).double()
    t = torch.linspace(-o.sigreg_limit, o.sigreg_limit, o.sigreg_knots, dtype=torch.float64)
    phi = torch.exp(1j * (rows @ toward.T)[..., None] * t).mean(dim=0)
    gauss = torch.exp(-t.square() / 2)
    return len(rows) * torch.trapezoid((phi - gauss).abs().square() * gauss, t, dim=-1).mean()


def reference(module: JepaModel, examples: list[Document], step: int = 3, teacher: Any = None) -> dict[str, Tensor]:
    """The losses of SpanJEPA as they are written, from the masks that the views were made with."""
    objective, backbone = module.objective, module.backbone
    o, make = objective.options, objective.view_transform()
    pooled, centers, predictions, spans, chosen, weights, token_losses = [], [], [], [], [], [], []
    of_targets = teacher or backbone
    for i, example in enumerate(examples):
        segments = make(example, SampleRNG(7, 0, step, i)).segments
        (whole,) = [s for s in segments if s.role == "sample"]
        tokens, positions = np.asarray(whole.tokens), np.asarray(whole.position_ids)
        nothing = np.zeros(len(tokens), dtype=bool)
        _, raw = encode(backbone, tokens, positions, nothing)
        raw_targets = encode(of_targets, tokens, positions, nothing)[1] if teacher else raw
        views, firsts, mine = [], [], []
        for view in segments:
            if view.role not in ("global", "local"):
                continue
            masked = ~np.isin(positions, view.position_ids)
            hidden, before = encode(backbone, tokens, positions, masked)
            last = int(np.flatnonzero(~masked)[-1])
            views.append(hidden[last])
            if view.role == "global":
                firsts.append((encode(of_targets, tokens, positions, masked)[1] if teacher else before)[last])
            filled = None if objective.predictor is None else fill_in(objective.predictor, hidden, positions, masked)
            if o.mlm_weight and masked.any():
                logits = backbone.logits(objective.predictor.norm(filled[torch.from_numpy(masked)]))
                labels = torch.from_numpy(tokens[masked])
                token_losses.append(F.cross_entropy(logits, labels, reduction="none"))
            at, before_view = 0, len(spans)
            while filled is not None and at < len(tokens):
                end = at
                while end < len(tokens) and masked[end] and (end == at or positions[end] == positions[end - 1] + 1):
                    end += 1
                if end > at:
                    predictions.append(objective.predictor.norm(filled[at:end].mean(dim=0)))
                    spans.append(of_targets.norm(raw_targets[at:end].mean(dim=0)))
                    mine.append(list(range(at, end)))
                at = max(end, at + 1)
            found = len(spans) - before_view
            weights += [1 / max(found, 1) / (o.global_views + o.local_views) / len(examples)] * found
        pooled.append(torch.stack(views))
        centers.append(of_targets.norm(torch.stack(firsts).mean(dim=0)))
        if mine:  # which one is the sampler's choice
            pick = list(whole.positions["chosen"])
            assert pick in mine
            chosen.append(backbone.norm(raw[pick].mean(dim=0)))
    rows, center = torch.stack(pooled), torch.stack(centers)
    if o.target != "trained":
        center, spans = center.detach(), [span.detach() for span in spans]
    if o.distance == "mse":
        seq_rec = (rows - center[:, None]).square().mean()
    else:
        seq_rec = (1 - F.cosine_similarity(rows, center[:, None], dim=-1)).mean()
    terms = {"seq_rec": seq_rec}
    λ, spread = o.sigreg_weight, o.sigreg_weight > 0
    if spread:
        terms["seq_sigreg"] = torch.stack([sigreg(rows[:, v], step, o) for v in range(rows.shape[1])]).mean()
    loss = (1 - λ) * seq_rec + λ * terms.get("seq_sigreg", 0)
    if objective.predictor is not None:
        squares = (torch.stack(predictions) - torch.stack(spans)).square().mean(dim=1)
        terms["span_rec"] = squares @ squares.new_tensor(weights) if o.span_mean == "views" else squares.mean()
        if spread:
            terms["span_sigreg"] = sigreg(torch.stack(chosen), step, o)
        loss = (loss + (1 - λ) * terms["span_rec"] + λ * terms.get("span_sigreg", 0)) / 2
    loss = o.jepa_weight * loss
    if o.mlm_weight:
        terms["mlm_loss"] = torch.cat(token_losses).mean()
        loss = loss + o.mlm_weight * terms["mlm_loss"]
    return {"loss": loss, **terms}
