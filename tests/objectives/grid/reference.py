"""``grid`` sample by sample and grid by grid, in loops: the oracle of its packed form."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_scale.data.examples import GRID_VOCABULARY, GridSequence, flatten_grid
from jepa_scale.data.grids.rules import frames
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.losses.sigreg import sigreg
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.grid.config import GridOptions
from jepa_scale.objectives.grid.objective import Grid
from jepa_scale.packing import PackedBatch, Segment, add_counts, pack, pack_sequence
from tests.data.grids.flood_fill import flood_fill
from tests.objectives.helpers import Copies

SMALL = dict(dim=8, object_heads=2, slots=5, vq_codes=6, queue=12, sigreg_slices=4)
DATA = SimpleNamespace(kind="grids")


def backbone(seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    return build_backbone(ModelOptions(**(options | keys)), GRID_VOCABULARY)


def make(model: Any, **options: Any) -> Grid:
    """An objective whose codes, moments and queue are in use already."""
    torch.manual_seed(1)
    objective = Grid(GridOptions(**(SMALL | options)), model, DATA)
    generator = torch.Generator().manual_seed(2)
    encoder = objective.encoder
    with torch.no_grad():
        encoder.standardize.observe(objective.contexts(model, *micro_batches(objective, sequences(6), [6]))[0].objects)
    encoder.standardize.update(torch.tensor(True), 0.5)
    encoder.standardize.average_mean += 0.1 * torch.randn(encoder.standardize.mean.shape, generator=generator)
    if encoder.quantizer is not None:
        for codes in (encoder.quantizer.codebook, encoder.quantizer.average_codebook):
            codes.copy_(torch.randn(codes.shape, generator=generator))
    if objective.queue is not None:
        filled = len(objective.queue.keys) // 2
        rows = torch.randn(filled, objective.queue.rows.shape[1], generator=generator)
        objective.queue.rows[:filled] = F.normalize(rows, dim=-1)
        objective.queue.keys[:filled] = torch.arange(filled) + 1000
    objective.teacher = Copies(objective, model)  # type: ignore[assignment]
    return objective


def sequences(count: int) -> list[GridSequence]:
    """Generated ones; among them shorter contexts, a grid without objects, one with more than there are slots for, and one
    target twice."""
    made = []
    for number in range(count):
        *context, target = frames(5, number, 4)
        made.append(GridSequence(tuple(context), target, f"rules.jsonl:{number}"))
    made[0] = replace(made[0], context=made[0].context[2:])
    made[1] = replace(made[1], context=made[1].context[1:])
    empty = np.zeros_like(made[2].context[2])
    made[2] = replace(made[2], context=(*made[2].context[:2], empty))
    board = np.indices((6, 6)).sum(axis=0).astype(np.int8) % 2 + 1
    made[3] = replace(made[3], target=board, context=(made[3].context[0], board, made[3].context[2]))
    if count > 5:
        made[5] = replace(made[5], target=made[4].target)
    return made


def micro_batches(
    objective: Grid, samples: list[GridSequence], sizes: list[int], step: int = 3, capacity: int | None = None
) -> list[PackedBatch]:
    """One step's micro-batches of these sizes."""
    batches, first = [], 0
    maker = objective.view_transform()
    for size in sizes:
        some = list(range(first, first + size))
        made = maker.many([samples[i] for i in some], [SampleRNG(0, 0, step, i) for i in some])  # type: ignore[attr-defined]
        like = maker(samples[0], SampleRNG(0, 0, step, 0))
        batches.append(pack(made, objective.sequences, step=step, max_samples=capacity or max(sizes), like=like))
        first += size
    totals = {name: torch.tensor(float(n)) for name, n in add_counts(batches).items()}
    return [replace(batch, totals=totals) for batch in batches]


def of_grid(objective: Grid, model: Any, grid: np.ndarray, teacher: bool = False) -> dict[str, Tensor]:
    """A grid by itself: its objects (n, d), what stands for them, and their boxes."""
    o = objective.options
    encoder = objective.teacher.copies["objective.encoder"] if teacher else objective.encoder  # type: ignore[attr-defined]
    found = flood_fill(grid.tolist(), o.connectivity, o.object_features)[: o.slots]
    boxes = []
    for thing in found:
        rows, columns = zip(*thing["cells"], strict=True)
        boxes.append([min(rows), min(columns), max(rows), max(columns)])
    n = len(found)
    if o.encoder == "objects":
        features = torch.tensor([thing["features"] for thing in found]).reshape(n, 23)
        seen = torch.zeros(1, o.slots, o.slots, dtype=torch.bool)
        for i in range(n):
            for j in range(n):
                seen[0, i, j] = gap(boxes[i], boxes[j]) <= o.reach
        objects = encoder.objects(features, torch.arange(n), seen)
    else:
        decoder = objective.teacher.copies["backbone"] if teacher else model  # type: ignore[attr-defined]
        states = decoder.hidden(pack_sequence([Segment(flatten_grid(grid), "x")]))
        width = grid.shape[1] + 1
        means = [states[[r * width + c for r, c in thing["cells"]]].mean(dim=0) for thing in found] + [states[-1]]
        objects = encoder.objects.norm(encoder.objects.project(torch.stack(means)))
    moments = [encoder.standardize.read(name) for name in ("mean", "deviation")]
    objects = (objects - moments[0]) / moments[1]
    table = objects
    if encoder.quantizer is not None:
        codes = encoder.quantizer.read("codebook")
        nearest = [int(((x - codes) ** 2).sum(dim=1).argmin()) for x in objects]
        table = codes[nearest]
    used = objects + (table - objects).detach()
    mean = used.mean(dim=0) if len(used) else torch.zeros(o.dim)
    return {"objects": objects, "used": used, "table": table, "mean": mean, "boxes": torch.tensor(boxes)}


def gap(a: Any, b: Any) -> int:
    """Cells between two boxes, or rather one more; 0 if they overlap."""
    return max(0, a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def of_sequence(objective: Grid, grids: list[Tensor], teacher: bool = False) -> tuple[Tensor, Tensor]:
    """State and projection from the grids' means."""
    encoder = objective.teacher.copies["objective.encoder"] if teacher else objective.encoder  # type: ignore[attr-defined]
    length = objective.options.context_length
    missing = length - len(grids)
    states = torch.stack([torch.zeros_like(grids[0])] * missing + grids)[None]
    present = (torch.arange(length) >= missing)[None]
    state, _ = encoder.temporal(states, present)
    return state[0], encoder.projector(state)[0]


def plain_terms(objective: Grid, model: Any, samples: list[GridSequence], step: int = 3) -> dict[str, Tensor]:
    """Every term of the loss of the whole batch, from its definition. Without invariances."""
    o, taught = objective.options, objective.options.target == "ema"
    queries, projections, last_alone, targets, apart, cross, own = [], [], [], [], [], [], []
    keys: list[bytes] = []
    for sample in samples:
        grids = list(sample.context[-o.context_length :])
        grids += [grids[-1]] * (o.pad_context * (o.context_length - len(grids)))
        context = [of_grid(objective, model, grid) for grid in grids]
        with torch.set_grad_enabled(not taught):
            target = of_grid(objective, model, sample.target, teacher=taught)
            targets.append(F.normalize(of_sequence(objective, [target["mean"]], teacher=taught)[1], dim=0))
        projections.append(of_sequence(objective, [grid["mean"] for grid in context])[1])
        queries.append(F.normalize(objective.predictor(projections[-1]), dim=0))
        last_alone.append(objective.encoder.projector(context[-1]["mean"]))
        keys.append(repr(sample.target.tolist()).encode())
        for grid in context:
            apart += [((x - c.detach()) ** 2).mean() for x, c in zip(grid["objects"], grid["table"], strict=True)]
        if o.relational == "gridjepa":
            matrices = torch.stack([distance_matrix(o, grid) for grid in context])
            mean = matrices.mean(dim=0)
            cross.append(((mean - distance_matrix(o, target)) ** 2).mean())
            own.append(((matrices - mean) ** 2).mean())
            continue
        for grid in context:
            pairs = [(i, j) for i in range(len(grid["boxes"])) for j in range(i + 1, len(grid["boxes"]))]
            own += [
                relation(grid["used"][i], grid["used"][j], o.relational)
                for i, j in pairs
                if gap(grid["boxes"][i].tolist(), grid["boxes"][j].tolist()) <= o.reach
            ]
        last = context[-1]
        cross += [
            relation(last["used"][i], target["used"][j], o.relational)
            for i in range(len(last["boxes"]))
            for j in range(len(target["boxes"]))
            if gap(last["boxes"][i].tolist(), target["boxes"][j].tolist()) <= o.reach
        ]
    pool: dict[Any, Tensor] = {}
    for key, target in zip(keys, targets, strict=True):
        pool.setdefault(key, target)
    if objective.queue is not None:
        for key, row in zip(objective.queue.keys.tolist(), objective.queue.rows, strict=True):
            if key >= 0:
                pool[key] = row
    names = list(pool)
    table = torch.stack(list(pool.values()))
    losses = [
        F.cross_entropy((table @ q / objective.temperature())[None], torch.tensor([names.index(k)]))
        for q, k in zip(queries, keys, strict=True)
    ]
    scale = np.log(len(pool)) if o.relational == "adjacent_cosine" else 1.0
    n = torch.tensor(float(len(samples)))
    terms = {"info_nce": torch.stack(losses).mean()}
    terms["relational_cross"], terms["relational_self"] = (scale * torch.stack(x).mean() for x in (cross, own))
    looks = []
    for rows in (torch.stack(projections), torch.stack(last_alone)):
        still = rows.detach()
        looks.append((rows - still.mean(dim=0)) / (still.std(dim=0, correction=0) + 1e-3))
    terms["sigreg"] = torch.stack([sigreg(rows, n, 0, step, o.sigreg_slices) for rows in looks]).mean()
    if o.vq_codes:
        terms["commitment"] = torch.stack(apart).mean()
    return terms


def relation(a: Tensor, b: Tensor, kind: str) -> Tensor:
    return 1 - F.cosine_similarity(a, b, dim=0) if kind == "adjacent_cosine" else ((a - b) ** 2).sum()


def distance_matrix(o: GridOptions, grid: dict[str, Tensor]) -> Tensor:
    """GridJEPA's matrix of a grid: squared distances of adjacent objects, 0 elsewhere, (slots, slots)."""
    boxes = grid["boxes"].tolist()
    near = [
        [i < len(boxes) and j < len(boxes) and gap(boxes[i], boxes[j]) <= o.reach for j in range(o.slots)]
        for i in range(o.slots)
    ]
    rows = F.pad(grid["used"][: len(boxes)], (0, 0, 0, o.slots - len(boxes)))
    return ((rows[:, None] - rows[None]) ** 2).sum(dim=-1) * torch.tensor(near)


def weighted(objective: Grid, terms: dict[str, Tensor]) -> Tensor:
    o = objective.options
    weights = {"info_nce": 1.0, "relational_cross": o.relational_weight, "relational_self": o.context_self_weight}
    weights |= {"sigreg": o.sigreg_weight, "commitment": o.vq_commitment}
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def step_of(objective: Grid, model: Any, batches: list[PackedBatch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Sums of what a step's micro-batches log, and the gradients of all parameters that are trained."""
    modules = torch.nn.ModuleList([model, objective])
    modules.zero_grad(set_to_none=True)
    gathered = []
    if len(batches) > 1:
        with torch.no_grad():
            gathered = [objective.gather(model, batch) for batch in batches]
    means: dict[str, float] = {}
    for micro, batch in enumerate(batches):
        loss = objective.loss(model, batch, gathered, micro)
        loss.total.backward()
        for name, value in loss.means.items():
            means[name] = means.get(name, 0.0) + float(value)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in modules.named_parameters()
        if p.requires_grad
    }
    return means, gradients
