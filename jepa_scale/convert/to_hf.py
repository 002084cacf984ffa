"""Conversion of a run's checkpoint to a folder that transformers or sentence-transformers loads.

Tensors are read one by one from the sharded checkpoint and written one by one to files of bounded size. This needs no
GPU and no process group, and less memory than two files and a tensor, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from jepa_scale import __version__
from jepa_scale.checkpoint import find, store
from jepa_scale.checkpoint.manifest import FILE, TENSORS, Manifest
from jepa_scale.config.loading import load_config, trained_with
from jepa_scale.config.parsing import parse_section
from jepa_scale.config.schema import Config
from jepa_scale.convert.adapter import CONFIG_FILE as ADAPTER_CONFIG
from jepa_scale.convert.adapter import adapter_config, adapter_plan, check_adapter
from jepa_scale.convert.base import left_out
from jepa_scale.convert.card import Card, Form
from jepa_scale.convert.folder import Folder, Journal, read_journal
from jepa_scale.convert.merge import plain_sources
from jepa_scale.convert.plan import HEADS_FILE, MODEL, ConversionPlan, Unit, groups, make_plan, outputs_of
from jepa_scale.convert.sentence_encoder import module_files, tokenizer_of_texts
from jepa_scale.convert.skeleton import PREFIX, Skeleton, make_skeleton
from jepa_scale.convert.tensor_file import Entry, write_tensors
from jepa_scale.convert.tokenizer import Tokenizer, data_tokenizer, named_tokenizer
from jepa_scale.data import parse_data
from jepa_scale.experiment import ChosenObjective, parse_objective
from jepa_scale.models.families.structure import position_limit
from jepa_scale.models.options import ModelOptions
from jepa_scale.telemetry.records import config_of, read_rows, read_summary, summarize
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.lock import JOB_LOCK, locked
from jepa_scale.utils.splits import TRAIN, split_key

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export: ``checkpoint`` is a path or name, or ``auto`` for that of the resumed export, else the newest.

    dtype, shard_bytes: dtype of the weights, and largest number of tensor bytes in a file.
    heads: write the objective's own parameters, too.
    adapter: write the adapters of a LoRA run alone, in peft's format, instead of the merged model.
    tokenizer: folder of the tokenizer; None = the data's, ``"none"`` = no tokenizer.
    to: ``hf``, a model of transformers, or ``sentence-transformers``, an encoder of texts.
    prompts: of a sentence encoder: name → text that is put before a text.
    verify: compare the checkpoint's checksums first. progress: show a bar.
    """

    checkpoint: str = "auto"
    dtype: str = "float32"
    shard_bytes: int = 2_000_000_000
    heads: bool = False
    adapter: bool = False
    tokenizer: str | None = None
    to: Literal["hf", "sentence-transformers"] = "hf"
    prompts: Mapping[str, str] = field(default_factory=dict)
    verify: bool = True
    progress: bool = True


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of a conversion.

    Attributes:
        checkpoint: the converted checkpoint. class_name: class of the model, or of the adapters' base model.
        files: number of files with tensors. nbytes: size of all tensors.
        kept: number of files kept from a killed conversion. heads: whether there is a file of the objective's parameters.
    """

    checkpoint: Path
    class_name: str
    files: int
    nbytes: int
    kept: int
    heads: bool


def export(run: Path, out: Path, options: ExportOptions = ExportOptions()) -> Exported:
    """Convert a checkpoint of ``run`` into the folder ``out``, or resume a killed conversion.

    Raises:
        InputError: the run or its checkpoint can't be used, the objective has no such form, or the folder holds something else.
    """
    begun = read_journal(out)
    config = load_config(config_of(run))
    checkpoint = _chosen(run, options, begun, out)
    manifest = Manifest.read(checkpoint)
    config = trained_with(config, manifest.config)
    objective = parse_objective(config.objective)
    form = form_of(objective, options)
    model_options = parse_section(ModelOptions, config.model, "model")
    if options.adapter:
        check_adapter(model_options)

    shapes = store.shapes(checkpoint / TENSORS)
    base = left_out(model_options, shapes, manifest.state, checkpoint, values=not options.adapter)
    shapes |= {name: (tensor.shape, tensor.dtype) for name, tensor in base.items()}
    try:
        sources = plain_sources(shapes, MODEL + PREFIX, model_options.lora)
        named = {name.removeprefix(MODEL): tuple(source.shape) for name, source in sources.items()}
        skeleton = make_skeleton(model_options, named)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    most_tokens = position_limit(skeleton.model.config)
    if form == "sentence_encoder":
        skeleton = skeleton.without_head()
    if options.adapter:
        plan = adapter_plan(skeleton.model, sources, shapes, DTYPES[options.dtype], options.heads)
    else:
        plan = make_plan(
            skeleton.model, sources, shapes, DTYPES[options.dtype], options.shard_bytes, options.heads, skeleton.prefix
        )
    tokenizer = (
        data_tokenizer(parse_data(config.data)) if options.tokenizer is None else named_tokenizer(options.tokenizer)
    )
    if tokenizer.size > skeleton.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.size:,} ids, the model's embedding {skeleton.vocab_size:,} rows; "
            "give the tokenizer that the model was trained with by --tokenizer"
        )
    if form == "sentence_encoder":
        tokenizer = tokenizer_of_texts(tokenizer, most_tokens)
    if options.adapter:
        small: dict[str, str | bytes] = dict(tokenizer.files)
        small[ADAPTER_CONFIG] = adapter_config(skeleton.model, model_options, sources, shapes)
    else:
        small = _small_files(skeleton, plan, tokenizer, options)
    if form == "sentence_encoder":
        small |= module_files(objective.cls.pooling, skeleton.model.config.hidden_size, most_tokens, options.prompts)
    elif form == "causal_lm" and not options.adapter:
        small["generation_config.json"] = skeleton.generation_config(tokenizer.special, model_options).to_json_string()

    out.mkdir(parents=True, exist_ok=True)
    with locked(out / JOB_LOCK, wait=0):
        folder = Folder(out, _journal(checkpoint, manifest, plan, sorted(small), options))
        _write_tensors(folder, plan, skeleton.model, Tensors(checkpoint / TENSORS, base), options)
        for name, content in small.items():
            folder.put(name, content)
        card = _card(run, config, manifest, skeleton, plan, tokenizer, options, form, objective.cls.pooling)
        folder.put("README.md", card.text())
        folder.finish()
    return Exported(
        checkpoint,
        ("SentenceTransformer of " if form == "sentence_encoder" else "") + skeleton.class_name,
        len(plan.files),
        plan.out_bytes,
        len(folder.kept & plan.all_files().keys()),
        bool(plan.heads),
    )


def _chosen(run: Path, options: ExportOptions, begun: Journal | None, out: Path) -> Path:
    """Return the undamaged checkpoint to convert: for ``auto`` the one that ``out`` was begun with, else the newest.

    Raises:
        InputError: there is none, or it is damaged.
    """
    asked: str | Path = options.checkpoint
    if asked == "auto" and begun is not None:
        asked = run / "checkpoints" / begun.checkpoint
        if not asked.is_dir():
            raise InputError(
                f"{out}: is a conversion of {begun.checkpoint}, which {run} no longer has; choose another folder, or remove "
                "this one"
            )
    found = find(run, asked, options.verify, alone=True)
    if found is None:
        raise InputError(f"{run}: has no checkpoint to convert; choose another run")
    return found


def _write_tensors(
    folder: Folder, plan: ConversionPlan, model: PreTrainedModel, tensors: Tensors, options: ExportOptions
) -> None:
    bar = tqdm(
        total=plan.out_bytes,
        desc="convert",
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not options.progress,
    )
    with bar:
        for name, units in plan.all_files().items():
            if name in folder.kept:
                bar.update(sum(unit.out_bytes for unit in units))
                continue
            entries: list[Entry] = [entry for unit in units for entry in unit.entries]

            def make(path: Path, units: Sequence[Unit] = units, entries: list[Entry] = entries) -> dict[str, Any]:
                return write_tensors(path, entries, _read(tensors, units, model, options.shard_bytes // 2, bar))

            folder.make(name, make)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a run's model: those of the checkpoint's ``folder``, and those that it leaves out."""

    folder: Path
    base: Mapping[str, Tensor]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole tensors, to be written to."""
        found = store.read_whole(self.folder, [name for name in names if name not in self.base])
        return found | {name: self.base[name].clone() for name in names if name in self.base}


def _read(tensors: Tensors, units: Sequence[Unit], model: PreTrainedModel, limit: int, bar: tqdm) -> Iterator[Tensor]:
    """Yield the converted tensors of the units, one by one.

    At most ``limit`` bytes of the checkpoint are in memory, or one unit. DCP needs as much again while it reads.
    """
    for group in groups(units, limit):
        read = tensors.read([name for unit in group for name in unit.reads])
        for unit in group:
            yield from outputs_of(model, unit, unit.take(read))
            bar.update(unit.out_bytes)


def form_of(objective: ChosenObjective, options: ExportOptions) -> Form:
    """Return the form in which a model of the objective leaves.

    Raises:
        InputError: it has no such form, or an option has no meaning for it.
    """
    exports = objective.cls.exports(objective.options)
    encoder = options.to == "sentence-transformers"
    if encoder and (options.heads or options.adapter):
        raise InputError(f"--{'heads' if options.heads else 'adapter'}: belongs to --to hf; leave it out")
    if options.prompts and not encoder:
        raise InputError("--prompt: belongs to --to sentence-transformers; leave it out")
    if exports.sentence_encoder if encoder else exports.causal_lm:
        return "sentence_encoder" if encoder else "causal_lm"
    if options.heads and not options.adapter:  # no adapters come back without their model
        return "heads"
    other = exports.causal_lm if encoder else exports.sentence_encoder
    ways = [exports.instead] if exports.instead else []
    if other:
        ways.append(f"export it by --to {'hf' if encoder else 'sentence-transformers'}")
    ways.append("give its decoder and heads to another run by --to hf --heads")
    what = "a sentence encoder" if encoder else "a causal language model"
    raise InputError(
        f"--to {options.to}: objective {objective.name!r} {exports.reason}, so its model cannot leave as {what}; "
        f"{', or '.join(ways)}"
    )


def _small_files(
    skeleton: Skeleton, plan: ConversionPlan, tokenizer: Tokenizer, options: ExportOptions
) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {**tokenizer.files, **skeleton.code}
    files["config.json"] = skeleton.config(DTYPES[options.dtype], tokenizer.special).to_json_string(use_diff=True)
    if (index := plan.index()) is not None:
        files[INDEX_FILE] = json.dumps(index, indent=1) + "\n"
    return files


def _journal(
    checkpoint: Path, manifest: Manifest, plan: ConversionPlan, small: list[str], options: ExportOptions
) -> Journal:
    files = {
        file: [(_unit_key(unit), [(e.name, e.shape, str(e.dtype)) for e in unit.entries]) for unit in units]
        for file, units in plan.all_files().items()
    }
    of = hashlib.sha256((checkpoint / FILE).read_bytes()).hexdigest()  # it holds the checksums of the rest
    return Journal(
        made_by=_made_by(),
        checkpoint=checkpoint.name,
        step=manifest.step,
        plan=hashlib.sha256(json.dumps([of, files, small]).encode()).hexdigest(),
        options={
            "dtype": options.dtype,
            "shard_bytes": options.shard_bytes,
            "heads": options.heads,
            **({"adapter": True} if options.adapter else {}),
            **({"to": options.to} if options.to != "hf" else {}),
        },
    )


def _unit_key(unit: Unit) -> str | list[str | float]:
    """Return all that a unit's bytes depend on, beside the checkpoint."""
    return unit.source if unit.made_of is None else [*unit.reads, unit.made_of.scale]


def _made_by() -> str:
    return f"jepa_scale {__version__}, transformers {transformers.__version__}"


def _card(
    run: Path,
    config: Config,
    manifest: Manifest,
    skeleton: Skeleton,
    plan: ConversionPlan,
    tokenizer: Tokenizer,
    options: ExportOptions,
    form: Form,
    pooling: str,
) -> Card:
    return Card(
        form=form,
        pooling=pooling,
        name=config.run.name,
        class_name=skeleton.class_name,
        own_code=bool(skeleton.code),
        dtype=options.dtype,
        parameters=plan.parameters,
        tokenizer=bool(tokenizer.files),
        chat=tokenizer.chat,
        heads=HEADS_FILE if plan.heads else "",
        adapter=options.adapter,
        rows=skeleton.vocab_size,
        metrics=metrics_at(run, manifest),
        config=config.model_dump(mode="json"),
        checkpoint=manifest,
        made_by=_made_by(),
    )


def metrics_at(run: Path, manifest: Manifest) -> dict[str, dict[str, float | None]]:
    """Return split → metric → value of the last evaluation not after the checkpoint.

    It is read from the run's rows, else from the manifest, else from the run's summary if that is of the same step.
    """
    found: dict[str, dict[str, float | None]] = {}
    rows = [row for row in read_rows(run) if row["step"] <= manifest.step and row["split"] != TRAIN]
    if rows:
        found = summarize(rows)["final"]
    elif manifest.metrics:
        for key, value in manifest.metrics.items():
            split, metric = split_key(key)
            found.setdefault(split, {})[metric] = value
    elif (summary := read_summary(run)).get("steps") == manifest.step:
        found = summary.get("final", {})
    return {split.removeprefix("eval/"): values for split, values in found.items() if split != TRAIN}
