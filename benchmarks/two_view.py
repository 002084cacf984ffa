"""A training step of two_view against those of LLM-JEPA's published code, and against next-token prediction alone.

    python benchmarks/two_view.py --threads 2 --json benchmarks/results/two_view.json

All variants train in one process, each a copy of the same model with an optimizer of its own, on the same rows of
NL-RX-SYNTH (``$JEPA_SCALE_DATA/nl_rx_synth``; without it on made rows of about the same lengths, which the JSON says), and
take turns, in another order each round; the first round does not count. A step is forward, backward and AdamW, in fp32;
batches are made beforehand for all alike, and no engine is between.

* ``padded``: three rows a sample (conversation; question with k predictor tokens; answer), padded to 512 tokens, one dense
  forward of transformers with its padding mask, the LM head at every place;
* ``padded_to_longest``: the same, padded to the longest row of the batch alone;
* ``additive_mask``: two rows a sample, padded to 512: the conversation; question and answer side by side, kept apart by
  a dense additive mask;
* ``ours``: ``two_view``, packed;
* ``ours_shared_prefix``: the same with ``objective.shared_prefix``;
* ``lm``: packed, without the JEPA term.

The padded rows are made from our views, token by token, and predict the same labels, so that all do the same work: losses and
gradient norms are compared before anything is timed. (Published, the predictor tokens are rows of the vocabulary; here they
are the objective's own everywhere.)

``ratio/ours/padded``, ``…/padded_to_longest`` and ``…/additive_mask`` are how many times as many samples a second ``ours``
does; ``ratio/ours/lm`` and ``ratio/ours_shared_prefix/lm`` are times of a step over that of ``lm``. All are medians of the
ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.rows import as_table, row, write  # noqa: E402
from jepa_scale.config.schema import OptimConfig  # noqa: E402
from jepa_scale.data import load_data, parse_data  # noqa: E402
from jepa_scale.data.sampling.rng import SampleRNG  # noqa: E402
from jepa_scale.distributed.comm import ParallelContext  # noqa: E402
from jepa_scale.losses.distance import cosine  # noqa: E402
from jepa_scale.models.loading import build_backbone  # noqa: E402
from jepa_scale.models.options import ModelOptions  # noqa: E402
from jepa_scale.objectives.base import JepaModel  # noqa: E402
from jepa_scale.objectives.two_view.objective import TwoView, TwoViewOptions  # noqa: E402
from jepa_scale.optim import build_optimizer, parameter_groups  # noqa: E402
from jepa_scale.packing import IGNORE, Segment, pack  # noqa: E402
from jepa_scale.telemetry import quiet_libraries  # noqa: E402
from jepa_scale.telemetry.environment import describe_environment  # noqa: E402

WIDTH = 512
"""What upstream pads to unless told otherwise."""
TOLERANCE = 1e-4
DENSE = ("padded", "padded_to_longest", "additive_mask")
PACKED: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours_shared_prefix": {"shared_prefix": True},
    "lm": {"jepa_weight": 0.0, "predictor_tokens": 0},
}
RATIOS = [("ours", other) for other in DENSE] + [("ours", "lm"), ("ours_shared_prefix", "lm")]


# ------------------------------------------------------------------------------------------------------ rows


def made_rows(count: int) -> list[dict[str, Any]]:
    """Conversations as long as NL-RX-SYNTH's: questions of 12.2 ± 2.3 words, answers of 26 ± 7.4 characters."""
    rng = random.Random(0)
    words = ["lines", "with", "a", "the", "string", "or", "letter", "before", "'dog'", "more", "times", "lower-case"]
    pieces = ["[AEIOUaeiou]", "[a-z]", "[A-Z]", "[0-9]", "(dog)", "(truck)", "\\b", ".*", "(.)", "&", "|", "~", "{3,}"]
    rows = []
    for _ in range(count):
        asked = " ".join(rng.choices(words, k=min(21, max(4, round(rng.gauss(12.2, 2.3))))))
        answer, wanted = "", max(3, rng.gauss(26, 7.4))
        while len(answer) < wanted - 2:
            answer += rng.choice(pieces)
        said = [("system", "Convert natural language to regular expression."), ("user", asked), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return rows


def load(vocab_size: int, scratch: Path) -> tuple[Any, str]:
    """The data, and where they are from."""
    root = os.environ.get("JEPA_SCALE_DATA", "")
    keys = {"source": "chat", "tokenizer": "bpe", "vocab_size": vocab_size, "max_length": WIDTH}
    if root and (Path(root).expanduser() / "nl_rx_synth" / "train.jsonl").is_file():
        return load_data(parse_data({**keys, "path": "nl_rx_synth"})), "NL-RX-SYNTH"
    file = scratch / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in made_rows(4000)), encoding="utf-8")
    return load_data(
        parse_data({**keys, "path": str(file), "cache": str(scratch / "cache")})
    ), "made rows of NL-RX-SYNTH's lengths"


class Rows(NamedTuple):
    """Padded rows, (R, W) each, and for each of the n pairs where its views are read."""

    ids: Tensor
    labels: Tensor  # not shifted, as transformers takes them
    attention: Tensor  # (R, W), or additive (R, 1, W, W)
    predictor: Tensor  # number of the predictor token there, −1 = none
    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]


def pad(samples: list[list[Segment]], width: int, side_by_side: bool) -> Rows:
    """Each sample's conversation, question and answer as padded rows.

    Args:
        width: 0 = as the longest row needs.
        side_by_side: question and answer in one row.
    """
    n = len(samples)
    texts, sources, targets = (list(part) for part in zip(*samples, strict=True))
    rows = [[s] for s in texts]
    views = zip(sources, targets, strict=True)
    rows += [[s, t] for s, t in views] if side_by_side else [[s] for s in sources + targets]
    longest = max(sum(len(s.tokens) for s in row) for row in rows) + 1  # the last token of all is predicted, too
    width = width or longest
    assert longest <= width, f"a row of {longest} tokens"
    ids, labels, predictor, owner = (np.full((len(rows), width), fill) for fill in (0, IGNORE, -1, -1))
    begins = np.zeros((len(rows), 2), np.int64)
    for r, parts in enumerate(rows):
        at = 0
        for number, part in enumerate(parts):
            end = at + len(part.tokens)
            begins[r, number] = at
            ids[r, at:end], owner[r, at:end] = part.tokens, number
            places = np.asarray(part.positions.get("predictor", []), np.int64)
            predictor[r, at + places] = np.arange(len(places))
            if part.labels is not None:
                labels[r, at + 1 : end + 1] = part.labels
            at = end
    attention = torch.from_numpy((owner >= 0).astype(np.int64))
    if side_by_side:
        # padding sees padding: a row of −∞ alone would be NaN
        same = torch.from_numpy(owner[:, :, None] == owner[:, None, :]).tril()
        attention = torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)[:, None]
    one = np.arange(n)
    source, target = (n + one, n + one if side_by_side else 2 * n + one)
    read = [np.array([s.positions[name][0] for s in of]) for name, of in (("source", sources), ("target", targets))]
    read[1] = read[1] + (begins[n:, 1] if side_by_side else 0)
    tensors = [torch.from_numpy(x) for x in (source, read[0], target, read[1])]
    return Rows(
        *(torch.from_numpy(x) for x in (ids, labels)),
        attention,
        torch.from_numpy(predictor),
        (tensors[0], tensors[1]),
        (tensors[2], tensors[3]),
    )


# ------------------------------------------------------------------------------------------------------ steps


def dense_loss(model: JepaModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """The next-token loss and the mean distance, the way upstream computes them; the decoder's attention is the ordinary."""
    decoder, table = model.backbone.decoder, model.objective.predictors
    embeds = decoder.get_input_embeddings()(rows.ids)
    if table is not None:
        embeds = torch.where((rows.predictor >= 0)[..., None], table(rows.predictor.clamp(min=0)), embeds)
    out = decoder(
        inputs_embeds=embeds,
        attention_mask=rows.attention,
        labels=rows.labels,
        output_hidden_states=True,
        use_cache=False,
    )
    states = out.hidden_states[-1]
    return out.loss, cosine(states[rows.source], states[rows.target]).mean()


class Variant(NamedTuple):
    """``loss(number of the batch)`` → what is back-propagated, and (lm_loss, jepa_loss)."""

    model: JepaModel
    optimizer: torch.optim.Optimizer
    loss: Callable[[int], tuple[Tensor, tuple[Tensor, Tensor]]]
    tokens: list[int]


def build_variants(args: argparse.Namespace, data: Any, device: torch.device) -> dict[str, Variant]:
    torch.manual_seed(0)
    shape = {
        "model_type": "llama",
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
    }
    backbone = build_backbone(ModelOptions(family="huggingface", config=shape), data.vocab_size)
    objectives = {}
    for name, keys in PACKED.items():
        torch.manual_seed(1)  # the same predictor tokens
        objectives[name] = TwoView(TwoViewOptions(**{"predictor_tokens": args.predictors, **keys}), backbone, data)

    numbers = np.random.default_rng(0).permutation(len(data.train))[: args.batches * args.batch_size]
    batches = [[data.train[int(i)] for i in some] for some in numbers.reshape(args.batches, args.batch_size)]

    def views_of(name: str, examples: list[Any]) -> list[Any]:
        make = objectives[name].view_transform()
        return [make(example, SampleRNG(0, 0, 0, i)) for i, example in enumerate(examples)]

    def packed(name: str) -> Variant:
        model = JepaModel(copy.deepcopy(backbone), objectives[name]).to(device)
        made = []
        for examples in batches:
            batch = pack(views_of(name, examples))
            assert name == "lm" or batch.counts["pairs"] == len(examples), "a row without a question or an answer"
            totals = {key: torch.tensor(float(count), device=device) for key, count in batch.counts.items()}
            made.append(replace(batch.to(device), totals=totals))

        def loss(number: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            found = model("loss", made[number], [], 0)
            return found.total, (found.means["lm_loss"], found.means["jepa_loss"])

        return Variant(model, optimizer_of(model), loss, [batch.num_tokens for batch in made])

    def dense(name: str) -> Variant:
        model = JepaModel(copy.deepcopy(backbone), copy.deepcopy(objectives["ours"])).to(device)
        model.backbone.decoder.set_attn_implementation("sdpa")
        width = 0 if name == "padded_to_longest" else WIDTH
        segments = [[view.segments for view in views_of("ours", examples)] for examples in batches]
        made = [to(pad(some, width, name == "additive_mask"), device) for some in segments]

        def loss(number: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            lm, jepa = dense_loss(model, made[number])
            return lm + jepa, (lm.detach(), jepa.detach())

        return Variant(model, optimizer_of(model), loss, [rows.ids.numel() for rows in made])

    return {name: dense(name) for name in DENSE} | {name: packed(name) for name in PACKED}


def to(rows: Rows, device: torch.device) -> Rows:
    return Rows(*(tuple(t.to(device) for t in x) if isinstance(x, tuple) else x.to(device) for x in rows))


def optimizer_of(model: JepaModel) -> torch.optim.Optimizer:
    options = OptimConfig(lr=1e-4)
    return build_optimizer(parameter_groups(model, options, ("objective.",)), options)


def check(variants: dict[str, Variant], batches: int) -> None:
    """All compute the same: else nothing is timed.

    Raises:
        SystemExit: naming the variant, the batch and both values.
    """
    for number in range(batches):
        found: dict[str, dict[str, float]] = {}
        for name, variant in variants.items():
            total, (lm, jepa) = variant.loss(number)
            total.backward()
            gradients = [p.grad for p in variant.model.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            variant.optimizer.zero_grad()
            found[name] = {"lm_loss": float(lm), "jepa_loss": float(jepa), "gradient norm": float(norm)}
        for name, values in found.items():
            # a shared prefix sees the system's words, and lm has no second term
            same = ("lm_loss",) if name in ("ours_shared_prefix", "lm") else tuple(values)
            for key in same:
                ours = found["ours"][key]
                if not abs(values[key] - ours) <= TOLERANCE * max(1.0, abs(ours)):
                    sys.exit(f"{name}, batch {number}: {key} {values[key]:.6f}, ours {ours:.6f}; not the same work")


def step(variant: Variant, number: int, device: torch.device) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    total, _ = variant.loss(number)
    total.backward()
    variant.optimizer.step()
    variant.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=784)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=512, help="of the tokenizer trained on the rows")
    parser.add_argument("--predictors", type=int, default=1, help="k, predictor tokens")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in a step")
    parser.add_argument("--batches", type=int, default=4, help="different batches, one a round, again and again")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    quiet_libraries()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        data, origin = load(args.vocab_size, Path(scratch))
        variants = build_variants(args, data, device)
    parameters = sum(p.numel() for p in variants["ours"].model.backbone.parameters())
    print(f"{origin}; Llama of {parameters:,} parameters; {args.batch_size} samples a step", flush=True)
    check(variants, args.batches)

    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(args.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = step(variants[name], turn % args.batches, device)
            if turn:
                times[name].append(seconds)

    rows: list[dict[str, Any]] = []
    for name, seconds_of in times.items():
        rows.append(row(f"step/{name}", [1000 * s for s in seconds_of], "ms"))
    for name, seconds_of in times.items():
        rows.append(row(f"throughput/{name}", [args.batch_size / s for s in seconds_of], "samples/s"))
    for name, variant in variants.items():
        rows.append(row(f"tokens/{name}", [float(n) for n in variant.tokens], "tokens/step"))
    for name, other in RATIOS:
        pairs = list(zip(times[name], times[other], strict=True))
        rows.append(row(f"ratio/{name}/{other}", [a / b if other == "lm" else b / a for a, b in pairs], ""))
    print(as_table(rows))
    if args.json:
        ranks = ParallelContext(0, 1, 0, device, "python")
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        facts = {"data": origin, "mean_tokens": float(data.train.mean_size), "parameters": parameters}
        write(args.json, {**describe_environment(ranks, "none", "fp32"), **facts, "settings": settings}, rows)


if __name__ == "__main__":
    main()
