"""The sub-command ``jepa-scale plan``."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.format import text_table

if TYPE_CHECKING:
    from jepa_scale.plan.planner import RunPlan


def parser() -> argparse.ArgumentParser:
    plan = Parser(
        example="jepa-scale plan --config configs/jepa_8b.yaml --world-size 64 --gpu h100",
        prog="jepa-scale plan",
        description="Memory, communication and time of a run on machines that are not at hand.",
        parents=[logging_flags()],
    )
    plan.add_argument("--config", required=True, help="YAML file of the experiment")
    plan.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks (GPUs) of the run")
    plan.add_argument("--tp", type=int, metavar="T", help="tensor-parallel ranks (default: engine.tp)")
    plan.add_argument(
        "--replicas", type=int, metavar="R", help="FSDP2: replicas of the shards (default: engine.replicas)"
    )
    plan.add_argument("--activation-checkpointing", choices=["none", "full", "selective"],
                      help="what is computed again in the backward (default: engine.activation_checkpointing)")  # fmt: skip
    plan.add_argument(
        "--gpu",
        default="h100",
        help="h100, h200, a100, a100-40, b200, l40s, l4, t4, rtx3090, rtx4090 or rtx5090 (default: h100)",
    )
    plan.add_argument("--tokens", type=float, default=1e12, help="of the whole run, for its days (default: 1e12)")
    plan.add_argument("--vocab-size", type=int, metavar="V", help="number of token ids, if the config does not set it")
    plan.add_argument("--sample-tokens", type=int, metavar="L", help="tokens of a sample (default: data.max_length)")
    plan.add_argument(
        "--efficiency", type=float, default=1.0, help="share of the roofline that kernels reach (default: 1, the bound)"
    )
    plan.add_argument("--no-search", action="store_true", help="skip the search for the largest micro-batch")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan there, too")
    plan.add_argument("--set", dest="overrides", nargs="+", action="extend", default=[], metavar="section.key=value",
                      help="override keys of the config, as train takes them")  # fmt: skip
    plan.set_defaults(command=print_plan)
    return plan


def print_plan(args: argparse.Namespace) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed checks its JSON, and needs a GPU for that otherwise
    from jepa_scale.config.loading import load_config
    from jepa_scale.experiment import validate
    from jepa_scale.plan.hardware import find_gpu
    from jepa_scale.telemetry import quiet_libraries

    quiet_libraries()
    gpu = find_gpu(args.gpu)
    if not 0 < args.efficiency <= 1:
        raise InputError(f"--efficiency {args.efficiency}: must be above 0 and at most 1")
    for flag, value in (
        ("--tokens", args.tokens),
        ("--vocab-size", args.vocab_size),
        ("--sample-tokens", args.sample_tokens),
    ):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: must be at least 1")
    experiment = validate(load_config(args.config, args.overrides))
    from jepa_scale.plan.planner import Request, make_plan  # imports torch, which takes seconds

    request = Request(
        args.world_size, gpu, args.tp, args.replicas, args.activation_checkpointing, args.tokens, args.vocab_size,
        args.sample_tokens, args.efficiency, not args.no_search,
    )  # fmt: skip
    plan = make_plan(experiment, request)
    print(report(plan, args.gpu, args.efficiency))
    if args.json:
        try:
            args.json.write_text(json.dumps(as_dict(plan), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written: {error.strerror}") from None
    return 0


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as plain numbers: bytes, seconds, FLOPs."""
    values = {
        name: getattr(plan, name)
        for name in (
            "parameters", "teacher_parameters", "micro_tokens", "micro_samples", "accumulation", "start", "usable", "largest",
            "largest_samples", "step_tokens", "flops", "tokens", "tokens_per_day", "days", "fits", "fits_step", "fits_start", "slower",
        )
    }  # fmt: skip
    memory = {name: getattr(plan.memory, name) for name in ("state", "peak", "at_peak", "most")}
    time = None if plan.time is None else {**asdict(plan.time), "seconds": plan.time.seconds, "mfu": plan.time.mfu}
    traffic = [{**asdict(t), "sent": t.sent} for t in plan.traffic]
    return {
        "layout": str(plan.layout),
        **values,
        "memory": memory,
        "traffic": traffic,
        "time": time,
        "notes": plan.notes,
    }


def report(plan: RunPlan, gpu: str, efficiency: float) -> str:
    """Return the plan as text for the terminal."""
    from jepa_scale.plan.hardware import GIB
    from jepa_scale.plan.memory_tracker import KINDS
    from jepa_scale.plan.planner import LATENCY

    def gib(size: float) -> str:
        return f"{size / GIB:,.2f}"

    teacher = f", teacher {plan.teacher_parameters / 1e9:,.3f} billion" if plan.teacher_parameters else ""
    lines = [
        str(plan.layout),
        f"{plan.parameters / 1e9:,.3f} billion parameters{teacher}; micro-batches of {plan.micro_tokens:,} tokens "
        f"({plan.micro_samples:,} samples), {plan.accumulation:,} a rank and step; {plan.step_tokens:,} tokens a step",
        "",
    ]
    memory = plan.memory
    rows = [
        [kind, gib(memory.state.get(kind, 0)), gib(memory.at_peak.get(kind, 0)), gib(memory.most.get(kind, 0))]
        for kind in KINDS
    ]
    rows.append(["all", gib(sum(memory.state.values())), gib(memory.peak), ""])
    lines += [text_table(["GiB a rank", "between steps", "at the peak", "most"], rows), ""]
    assert plan.usable is not None and plan.time is not None
    verdict = "fits" if plan.fits_step else "does NOT fit"
    lines.append(f"{verdict} into the {gib(plan.usable)} GiB of {gpu} that may be used")
    if not plan.fits_start:
        lines.append(f"but building the engine takes {gib(plan.start)} GiB: gradients of zeros, or one whole parameter")
    if plan.largest is not None:
        found = (
            f"{plan.largest:,} tokens ({plan.largest_samples:,} samples)" if plan.largest else "none, not one sample"
        )
        lines.append(f"largest micro-batch that fits: {found}")
    if plan.traffic:
        rows = [
            [
                f"{t.kind}, {t.what}",
                f"{t.ranks:,}",
                f"{t.calls:,}",
                f"{t.size / GIB:,.3g}",
                f"{t.sent / GIB:,.3g}",
                "yes" if t.overlaps else "no",
            ]
            for t in plan.traffic
        ]
        header = ["communication of a step", "ranks", "calls", "GiB in all", "GiB a rank sends", "overlaps"]
        lines += ["", text_table(header, rows)]
    time = plan.time
    bound = "roofline" if efficiency == 1 else f"{efficiency:.0%} of the roofline"
    lines += [
        "",
        f"step, {bound}: at least {time.seconds:,.4g} s (compute {time.compute:,.4g}, communication that may overlap "
        f"{time.hidden:,.4g}, that cannot {time.exposed:,.4g}); MFU at most {time.mfu:.1%}; "
        f"{time.bound} is what it waits for",
        f"with half the bandwidth of the links {plan.slower['links']:,.4g} s; with {LATENCY * 1e6:.0f} µs for each collective "
        f"{plan.slower['latency']:,.4g} s",
        f"at most {plan.tokens_per_day:,.0f} tokens a day; {plan.tokens:,.3g} tokens take at least {plan.days:,.1f} days",
    ]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)
