"""The sub-command ``jepa-scale convert``."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_scale.cli.flags import Parser, logging_flags
from jepa_scale.cli.signals import stopped_by_signals
from jepa_scale.utils.errors import InputError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EXPORT_ONLY = ("checkpoint", "dtype", "shard_size", "heads", "adapter", "tokenizer", "prompt", "no_verify")


class _Intermixed(Parser):
    """A parser that also accepts config overrides after flags."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """Return the parser of ``jepa-scale convert RUN --to hf --out DIR`` and
    ``jepa-scale convert DIR --from hf --config FILE --out RUN``."""
    convert = _Intermixed(
        example="jepa-scale convert runs/reversal --to hf --out exported/",
        prog="jepa-scale convert",
        description="A run's checkpoint to Hugging Face or sentence-transformers format, or a Hugging Face model into a run.",
        parents=[logging_flags()],
    )
    convert.add_argument(
        "source", type=Path, help="run directory (--to), or folder of a model or of an adapter of peft (--from)"
    )
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--to",
        choices=["hf", "sentence-transformers"],
        help="convert a run's checkpoint: a model of transformers, or an encoder of texts",
    )
    way.add_argument("--from", dest="origin", choices=["hf"], help="make a run that starts from a model")
    convert.add_argument(
        "--out", type=Path, required=True, help="folder to write into: new, or of a conversion that was stopped"
    )
    export = convert.add_argument_group("with --to")
    export.add_argument("--checkpoint", metavar="PATH|auto", help="which one (default: auto, the newest whole one)")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: float32)")
    export.add_argument("--shard-size", metavar="SIZE", help="of a file at most, e.g. 500MB (default: 2GB)")
    export.add_argument(
        "--heads",
        action="store_true",
        default=None,
        help="write the objective's own parameters, too, in their own file",
    )
    export.add_argument(
        "--adapter",
        action="store_true",
        default=None,
        help="of a LoRA run, write the adapters alone, as peft loads them (default: the merged model)",
    )
    export.add_argument("--tokenizer", metavar="DIR|none", help="folder or name of a tokenizer (default: the data's)")
    export.add_argument(
        "--prompt",
        action="append",
        metavar="NAME=TEXT",
        help="of a sentence encoder: text put before what is encoded under that name, e.g. query or document; repeatable",
    )
    export.add_argument(
        "--no-verify", action="store_true", default=None, help="don't compare the checkpoint's checksums first"
    )
    convert.add_argument("--no-progress", action="store_true", help="no progress bar")
    bring = convert.add_argument_group("with --from")
    bring.add_argument("--config", help="YAML file of the experiment; its model: is the model's")
    bring.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the config")
    convert.set_defaults(command=convert_any)
    return convert


def convert_any(args: argparse.Namespace) -> int:
    given = [name for name in _EXPORT_ONLY if getattr(args, name) is not None]
    if args.to:
        if args.config is not None or args.overrides:
            raise InputError("--config and overrides belong to --from hf: a run has its config")
        return export_run(args)
    if given:
        raise InputError(f"--{given[0].replace('_', '-')}: belongs to --to")
    if args.config is None:
        raise InputError("--from hf needs --config, the experiment that the model is to be trained in")
    return import_model(args)


def size(text: str) -> int:
    """Convert a size such as ``2GB`` to bytes.

    Raises:
        InputError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    if match is None or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise InputError(f"--shard-size {text}: must be a size such as 2GB, 500MB or 512MiB")
    return count


def prompts(given: list[str]) -> dict[str, str]:
    """Convert arguments ``NAME=TEXT`` to a mapping.

    Raises:
        InputError: one has no name or is given twice.
    """
    found: dict[str, str] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not (name and equals):
            raise InputError(f"--prompt {each}: must be NAME=TEXT, such as 'query=search for: '")
        if name in found:
            raise InputError(f"--prompt {each}: {name} is given twice; remove one")
        found[name] = text
    return found


def export_run(args: argparse.Namespace) -> int:
    from jepa_scale.telemetry import quiet_libraries
    from jepa_scale.telemetry.records import config_of

    config_of(args.source)
    shard_bytes = None if args.shard_size is None else size(args.shard_size)
    quiet_libraries()
    from jepa_scale.convert.to_hf import ExportOptions, export

    chosen: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("to", "checkpoint", "dtype", "heads", "adapter", "tokenizer")
        if getattr(args, name) is not None
    }
    if shard_bytes is not None:
        chosen["shard_bytes"] = shard_bytes
    if args.prompt is not None:
        chosen["prompts"] = prompts(args.prompt)
    options = ExportOptions(**chosen, verify=not args.no_verify, progress=not args.no_progress)
    begin = time.monotonic()
    try:
        with stopped_by_signals():
            made = export(args.source, args.out, options)
    except OSError as error:
        raise InputError(
            f"{error.filename or args.out}: {error.strerror}; start the same command again when that is mended"
        ) from None
    seconds = time.monotonic() - begin
    files = f"{made.files} file{'s' if made.files != 1 else ''}"
    kept = f", {made.kept} of them there already" if made.kept else ""
    what = f"LoRA adapters of {made.class_name}" if options.adapter else made.class_name
    print(f"{made.checkpoint} → {args.out}: {what}, {made.nbytes:,} bytes in {files}{kept}, {seconds:,.1f} s")
    if options.heads and not made.heads:
        print("the objective has no parameters of its own: no file of heads")
    return 0


def import_model(args: argparse.Namespace) -> int:
    from jepa_scale.telemetry import quiet_libraries

    quiet_libraries()
    from jepa_scale.config.loading import load_config
    from jepa_scale.experiment import validate

    experiment = validate(load_config(args.config, args.overrides))
    run = experiment.run.model_copy(update={"dir": str(args.out.parent), "name": args.out.name})
    experiment = replace(experiment, run=run)

    import torch
    from transformers.utils import logging

    from jepa_scale.convert.from_adapter import is_adapter, load_adapter
    from jepa_scale.convert.from_hf import load_decoder, load_heads, write_checkpoint
    from jepa_scale.data import load_data
    from jepa_scale.distributed.comm import ParallelContext
    from jepa_scale.models.frozen.base import base_of
    from jepa_scale.models.loading import build_backbone
    from jepa_scale.objectives.base import JepaModel
    from jepa_scale.telemetry import prepare_run_dir
    from jepa_scale.telemetry.records import CONFIG_FILE
    from jepa_scale.training.build import create_sampler
    from jepa_scale.utils.io import write_atomic

    adapts = is_adapter(args.source)
    if experiment.model.load_in_4bit and not adapts:
        raise InputError(
            f"model.load_in_4bit: a run's frozen weights come from model.pretrained; give {args.source} as that instead of converting it"
        )
    if args.no_progress:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    data = load_data(experiment.data)
    torch.manual_seed(experiment.run.seed)  # as in training: heads without a file start alike
    backbone = build_backbone(experiment.model, data.vocab_size)
    objective = experiment.objective.build(backbone, data)
    module = JepaModel(backbone, objective)
    if adapts:
        base = base_of(backbone.decoder, experiment.model)
        load_adapter(backbone.decoder, args.source, experiment.model)
    else:
        base = None  # the weights need not be those of model.pretrained
        load_decoder(backbone.decoder, args.source)
    heads = load_heads(module, args.source)

    sampler = create_sampler(experiment, data, objective, ParallelContext(0, 1, 0, torch.device("cpu"), "python"))
    prepare_run_dir(args.out, resume=False)
    state = {"data": sampler.state(0), "tokens": 0, "seconds": 0.0}
    checkpoint = write_checkpoint(
        args.out / "checkpoints", module, state, experiment.optim, experiment.resolved(), base
    )
    write_atomic(args.out / CONFIG_FILE, experiment.to_yaml())
    own = sum(1 for _ in objective.parameters())
    heads_note = (
        "" if not own else ", the objective's parameters too" if heads else ", the objective freshly initialised"
    )
    what = f"LoRA adapters on {experiment.model.pretrained}" if adapts else type(backbone.decoder).__name__
    print(f"{args.source} → {checkpoint}: {what}{heads_note}")
    print(f"go on with: jepa-scale train --config {args.out / CONFIG_FILE} --resume auto")
    return 0
