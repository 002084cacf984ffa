"""A step of ``span`` on packed views against the same on dense ones: nine rows of full length a text, each under a mask.

    python benchmarks/span_views.py --json benchmarks/results/span_views.json
    python benchmarks/span_views.py --device cuda --hidden-size 768 --layers 12 --heads 12 --length 512

Both have the same weights, masks, losses, predictor and optimizer; before anything is timed, losses and the gradient's norm
must agree. All texts are equally long, so that the dense rows have no padding: what is saved is the masked tokens alone, and,
in the predictor's last block, what nobody reads. ``lm`` is next-token prediction on the same texts, once.

Steps are timed in turns, in one process. Memory is what the forward keeps for the backward, counted without parameters, and on
CUDA the peak of what was allocated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.schema import OptimConfig  # noqa: E402
from jepa_scale.data.examples import Document  # noqa: E402
from jepa_scale.data.sampling.rng import SampleRNG  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.models.decoder import position_table  # noqa: E402
from jepa_scale.models.loading import build_backbone  # noqa: E402
from jepa_scale.models.options import ModelOptions  # noqa: E402
from jepa_scale.objectives.base import JepaModel, lm_loss  # noqa: E402
from jepa_scale.objectives.lm import lm_views  # noqa: E402
from jepa_scale.objectives.span.config import SpanOptions  # noqa: E402
from jepa_scale.objectives.span.objective import Encoded, Span  # noqa: E402
from jepa_scale.optim import build_optimizer, parameter_groups  # noqa: E402
from jepa_scale.packing import PackedBatch, pack  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

VOCABULARY = 2048
TOLERANCE = 1e-3
Losses = tuple[Tensor, dict[str, Tensor]]


@dataclass
class Variant:
    """One way to do the step."""

    module: JepaModel
    loss: Callable[[int], Losses]  # number of the batch → total and terms
    tokens: list[int]  # of each batch

    def __post_init__(self) -> None:
        options = OptimConfig(lr=1e-4)
        self.optimizer = build_optimizer(parameter_groups(self.module, options, ("objective.",)), options)


def model(args: argparse.Namespace, device: torch.device) -> JepaModel:
    torch.manual_seed(0)
    keys = dict(hidden_size=args.hidden_size, num_hidden_layers=args.layers, num_attention_heads=args.heads)
    backbone = build_backbone(ModelOptions(**keys, position_embedding=args.position), VOCABULARY)
    data: Any = SimpleNamespace(kind="text", special={"eos": 0}, train=SimpleNamespace(max_size=args.length + 1))
    options = SpanOptions(predictor_layers=args.predictor_layers)
    return JepaModel(backbone, Span(options, backbone, data)).to(device)


class Dense:
    """The nine views of each text as rows of its full length; keys that are masked are hidden by an additive mask."""

    def __init__(self, module: JepaModel, batch: PackedBatch, views: list[Any], device: torch.device) -> None:
        self.module, self.batch = module, batch
        wholes = [view.segments[0] for view in views]
        seen = [[s for s in view.segments if s.role in ("global", "local")] for view in views]
        n, length = len(wholes[0].tokens), len(wholes[0].tokens)
        masked = np.ones((len(views), len(seen[0]) + 1, n), dtype=bool)
        for i, segments in enumerate(seen):
            masked[i, 0] = False
            for v, segment in enumerate(segments, 1):
                masked[i, v, segment.position_ids] = False
        self.masked = torch.from_numpy(masked).to(device)  # (B, 9, n); the first row is the whole text
        ids = torch.from_numpy(np.stack([whole.tokens for whole in wholes])).to(device)
        self.ids = ids[:, None].expand(-1, masked.shape[1], -1).flatten(0, 1)
        self.positions = torch.arange(length, device=device)
        hidden = self.masked.flatten(0, 1)[:, None, :] & ~torch.eye(n, dtype=torch.bool, device=device)
        hidden = hidden | torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
        self.mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)[:, None]
        order = torch.arange(n, device=device)
        self.last = torch.where(self.masked, -1, order).amax(dim=-1)  # (B, 9)
        # spans of all views, in the packed batch's order: where they are in the view's row and in the whole text
        rows, texts, span_positions = [], [], []
        for i in range(len(views)):
            for v in range(1, masked.shape[1]):
                at = np.flatnonzero(masked[i, v])
                rows.append(np.full(len(at), i * (masked.shape[1] - 1) + v - 1))
                texts.append(np.full(len(at), i))
                span_positions.append(at)
        self.rows, self.texts, self.span_positions = (
            torch.from_numpy(np.concatenate(x)).to(device) for x in (rows, texts, span_positions)
        )
        chosen = [np.asarray(whole.positions["chosen"]) for whole in wholes]
        self.chosen_texts = torch.from_numpy(np.concatenate([np.full(len(c), i) for i, c in enumerate(chosen)])).to(
            device
        )
        self.chosen = torch.from_numpy(np.concatenate(chosen)).to(device)

    def __call__(self) -> Encoded:
        backbone, predictor, options = (
            self.module.backbone,
            self.module.objective.predictor,
            self.module.objective.options,
        )
        found: list[Tensor] = []
        handle = backbone.layers[-1].register_forward_hook(lambda _, args, out: found.append(out))
        with backbone.unpacked() as decoder:
            out = decoder.base_model(
                input_ids=self.ids, position_ids=self.positions[None], attention_mask=self.mask, use_cache=False
            )
        handle.remove()
        b, views, n = self.masked.shape
        hidden, raw = (x.unflatten(0, (b, views)) for x in (out.last_hidden_state, found[0]))
        d = hidden.shape[-1]
        at_last = self.last[..., None, None].expand(-1, -1, 1, d)
        pooled = hidden.gather(2, at_last)[:, 1:, 0]
        first = raw.gather(2, at_last)[:, 1 : 1 + options.global_views, 0]
        means = [first.mean(dim=1), self._means(raw[:, 0], self.texts, self.span_positions, "span_length")]
        means.append(self._means(raw[:, 0], self.chosen_texts, self.chosen, "chosen_length"))
        center, spans, chosen = backbone.norm(torch.cat(means)).split([len(part) for part in means])
        x = torch.where(self.masked[:, 1:, :, None], predictor.mask_embedding(self.positions), hidden[:, 1:]).flatten(
            0, 1
        )
        table = position_table(predictor.config, self.positions[None].expand(len(x), -1), x.dtype)
        implementation, predictor.config._attn_implementation = predictor.config._attn_implementation, "sdpa"
        for layer in predictor.layers:
            x = layer(x, rotary=table)
        predictor.config._attn_implementation = implementation
        predicted = predictor.norm(self._means(x, self.rows, self.span_positions, "span_length"))
        return Encoded(out.last_hidden_state, pooled, center, predicted, spans, chosen, predicted[:0])

    def _means(self, states: Tensor, rows: Tensor, positions: Tensor, name: str) -> Tensor:
        lengths = self.batch.rows[name]
        owner = torch.repeat_interleave(
            torch.arange(len(lengths), device=rows.device), lengths, output_size=len(positions)
        )
        sums = states.new_zeros(len(lengths), states.shape[-1]).index_add(0, owner, states[rows, positions])
        return sums / lengths[:, None]


def build_variants(args: argparse.Namespace, device: torch.device) -> dict[str, Variant]:
    ours, dense, plain = (model(args, device) for _ in range(3))
    make = ours.objective.view_transform()
    rng = np.random.default_rng(0)
    packed, rows, texts = [], [], []
    for number in range(args.batches):
        documents = [Document(np.append(r, 0)) for r in rng.integers(1, VOCABULARY, (args.batch_size, args.length))]
        views = [make(x, SampleRNG(0, 0, number, i)) for i, x in enumerate(documents)]
        batch = with_totals(pack(views, ours.objective.sequences, step=number)).to(device)
        packed.append(batch)
        rows.append(Dense(dense, batch, views, device))
        texts.append(with_totals(pack([lm_views(x, SampleRNG(0, 0, number, 0)) for x in documents])).to(device))

    def losses(module: JepaModel, encoded: Encoded, batch: PackedBatch) -> Losses:
        terms = module.objective.terms(encoded, batch, [], 0)
        weight = module.objective.options.sigreg_weight
        rec, spread = (terms["seq_rec"] + terms["span_rec"]), (terms["seq_sigreg"] + terms["span_sigreg"])
        return ((1 - weight) * rec + weight * spread) / 2, terms

    def of_ours(number: int) -> Losses:
        return losses(ours, ours.objective.encode_views(ours.backbone, packed[number]), packed[number])

    def of_dense(number: int) -> Losses:
        return losses(dense, rows[number](), packed[number])

    def of_lm(number: int) -> Losses:
        return lm_loss(plain.backbone, plain.backbone.hidden(texts[number].sequences["main"]), texts[number]), {}

    main = [batch.sequences["main"].num_tokens for batch in packed]
    return {
        "ours": Variant(ours, of_ours, main),
        "dense": Variant(dense, of_dense, [args.batch_size * 9 * args.length] * args.batches),
        "lm": Variant(plain, of_lm, [args.batch_size * args.length] * args.batches),
    }


def with_totals(batch: PackedBatch) -> PackedBatch:
    return replace(batch, totals={name: torch.tensor(float(n)) for name, n in batch.counts.items()})


def check(variants: dict[str, Variant], batches: int) -> None:
    """Both compute the same, else nothing is timed.

    Raises:
        SystemExit: naming what differs.
    """
    for number in range(batches):
        found = []
        for name in ("ours", "dense"):
            total, terms = variants[name].loss(number)
            total.backward()
            norm = nn.utils.get_total_norm([p.grad for p in variants[name].module.parameters() if p.grad is not None])
            variants[name].optimizer.zero_grad()
            found.append({**{k: float(v) for k, v in terms.items()}, "gradient norm": float(norm)})
        for key, value in found[0].items():
            if not abs(value - found[1][key]) <= TOLERANCE * max(1.0, abs(value)):
                sys.exit(f"batch {number}: {key} is {value:.6f}, dense {found[1][key]:.6f}; not the same work")


def kept_for_backward(variant: Variant, number: int) -> float:
    """MiB that the forward keeps, each storage once, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in variant.module.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # else an address could be used twice

    def pack_hook(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        total, _ = variant.loss(number)
    del total
    return sum(sizes.values()) / 2**20


def step(variant: Variant, number: int, device: torch.device) -> float:
    """Seconds; on a CPU those of the processor, which other work on the machine changes less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    total, _ = variant.loss(number)
    total.backward()
    variant.optimizer.step()
    variant.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--position", default="pope", choices=("pope", "rope"))
    parser.add_argument("--predictor-layers", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--batch-size", type=int, default=4, help="texts in a step")
    parser.add_argument("--batches", type=int, default=2, help="different batches, one a round, again and again")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    quiet_libraries()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    device = torch.device(args.device)
    variants = build_variants(args, device)
    check(variants, args.batches)

    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(args.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = step(variants[name], turn % args.batches, device)
            if turn:
                times[name].append(seconds)
    rows = [row(f"step/{name}", [1000 * s for s in seconds], "ms") for name, seconds in times.items()]
    memory: dict[str, list[float]] = {}
    for name, variant in variants.items():
        memory[name] = [kept_for_backward(variant, number) for number in range(args.batches)]
        rows.append(row(f"memory/{name}", memory[name], "MiB"))
        rows.append(row(f"tokens/{name}", [float(n) for n in variant.tokens], "tokens/step"))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(variant, 0, device)
            rows.append(row(f"peak/{name}", [torch.cuda.max_memory_allocated() / 2**20], "MiB"))
    for other in ("dense", "lm"):
        a, b = ("dense", "ours") if other == "dense" else ("ours", "lm")
        values = [x / y for x, y in zip(times[a], times[b], strict=True)]
        rows.append(row(f"ratio/ours/{other}", values, "times faster" if other == "dense" else "times as long"))
    saved = [x / y for x, y in zip(memory["dense"], memory["ours"], strict=True)]
    rows.append(row("ratio/memory/ours/dense", saved, "times less"))
    print(as_table(rows))
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        ranks = ParallelContext(0, 1, 0, device, "python")
        write(args.json, {**describe_environment(ranks, "none", "fp32"), "settings": settings}, rows)


if __name__ == "__main__":
    main()
