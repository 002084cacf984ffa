"""LoRA on every engine: the curve of a plain loop, an EMA teacher, resuming, other world sizes, and the exported model."""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jepa_scale.checkpoint import Manifest
from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import OptimConfig
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.data import load_data, parse_data
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.ema import Teacher, TeacherModel
from jepa_scale.engines.fsdp import engine as fsdp_engine
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.optim import parameter_groups
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.training import build
from jepa_scale.utils.errors import InputError
from tests.data.corpus import VOCABULARY, write_text
from tests.distributed.launch import run_ranks
from tests.distributed.same_runs import resumed_bitwise
from tests.distributed.small_runs import checkpoint, newest, rows, tensors
from tests.distributed.test_horizon_runs import config_file
from tests.distributed.test_runs import train_runs
from tests.distributed.toy import ENGINES, sharded

STEPS, KNOWN, ROWS = 20, 40, 43
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_norm=0.5)
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True}


def pretrained(folder: Path, config: dict[str, Any], known: int) -> str:
    """Write a model with random weights to a folder; they are larger than usual, so that an error in them is detected."""
    torch.manual_seed(5)
    decoder = build_backbone(ModelOptions(family="huggingface", config=config), known).decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    decoder.save_pretrained(folder)
    return str(folder)


class Output(NamedTuple):
    total: Tensor


class Root(nn.Module):
    """Backbone alone; the loss is a sum over labels, so that the parts of a batch add up."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, ids: Tensor) -> Output:
        stream = pack_sequence([Segment(row, "text") for row in ids.tolist()])
        hidden = self.backbone.hidden(stream).view(*ids.shape, -1)[:, :-1]
        logits = self.backbone.logits(hidden.reshape(-1, hidden.shape[-1])).float()
        return Output(F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="sum") / 40)


def make_root(folder: str) -> Root:
    torch.manual_seed(2)
    lora = {"rank": 3, "alpha": 12}
    return Root(build_backbone(ModelOptions(family="huggingface", pretrained=folder, lora=lora), ROWS))


def batch(step: int) -> Tensor:
    """Return (8, 6) ids that include the new ones."""
    return torch.randint(ROWS, (8, 6), generator=torch.Generator().manual_seed(step % 4))


def clip_groups(root: nn.Module) -> dict[str, list[str]]:
    names = [name for name, parameter in root.named_parameters() if parameter.requires_grad]
    return {"first": [n for n in names if ".layers.0." in n], "rest": [n for n in names if ".layers.0." not in n]}


def reference(folder: str) -> tuple[list[float], Root, Root]:
    """Train with plain PyTorch in one process; return the losses, the model, and its EMA."""
    root = make_root(folder)
    average = copy.deepcopy(root)
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in parameter_groups(root, OPTIM, ["objective"])]
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    named, losses = dict(root.named_parameters()), []
    for step in range(STEPS):
        loss = root(batch(step)).total
        loss.backward()
        for names in clip_groups(root).values():
            nn.utils.clip_grad_norm_([named[name] for name in names], OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for mine, its in zip(average.parameters(), root.parameters(), strict=True):
                mine.lerp_(its, 0.1)
    return losses, root, average


def train_all(ranks: ParallelContext, folder: str, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    results = []
    for name, precision in cases:
        root = make_root(folder)
        copies = {"backbone": root.backbone.lower(1)}
        options = {"precision": precision, "clip_norm": OPTIM.clip_norm, "clip_groups": clip_groups(root)}
        engine = sharded(name, root, root.backbone.layers, ["objective"], ranks, OPTIM, **options)
        constant = TeacherOptions(momentum=0.9, final_momentum=None, schedule="constant")
        teacher = Teacher(engine, TeacherModel(copies), constant, STEPS)
        losses = []
        for step in range(STEPS):
            ids = batch(step).chunk(ranks.world_size)[ranks.rank]
            loss = engine.forward(ids).total
            engine.backward(loss)
            engine.step()
            teacher.update(step)
            losses.append(float(loss.detach()))
        state = engine.sharded_state()
        results.append(
            {
                "losses": losses,
                "state": engine.full_state(),
                "names": list(state),
                "teacher": teacher.forward("backbone", pack_sequence([Segment([1, 41, 3], "a")])),
            }
        )
    return results


@pytest.mark.parametrize(
    ("config", "world_size"),
    [pytest.param(LLAMA, 1, marks=pytest.mark.matrix), (QWEN3, 2)],
    ids=["untied-1", "tied-2"],
)
def test_every_engine_trains_what_a_plain_loop_trains(tmp_path, config, world_size):
    """Test with clipping by group, new rows, and an EMA of a part; bf16 agrees within its rounding."""
    folder = pretrained(tmp_path / "base", config, KNOWN)
    losses, model, average = reference(folder)
    cases = [(engine, "fp32") for engine in ENGINES]
    if world_size == 2:
        cases += [("zero1", "bf16")]
    by_rank = run_ranks(train_all, world_size, folder, cases)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    start = dict(make_root(folder).named_parameters())
    with torch.no_grad():
        wanted = average.backbone.hidden(pack_sequence([Segment([1, 41, 3], "a")]), until=1)
    assert losses[-1] < 0.9 * losses[0]
    for i, (engine, precision) in enumerate(cases):
        got = by_rank[0][i]
        curve = torch.tensor([rank[i]["losses"] for rank in by_rank], dtype=torch.float64).sum(0)
        loose = 1e-4 if precision == "fp32" else 0.05
        assert (curve - torch.tensor(losses, dtype=torch.float64)).abs().max() < loose, (engine, precision)
        torch.testing.assert_close(got["teacher"].float(), wanted, rtol=0, atol=1e-3 if precision == "fp32" else 0.1)
        for name, parameter in model.named_parameters():
            value = got["state"][name]
            if name in frozen:
                same = start[name] if precision == "fp32" else start[name].bfloat16().float()
                assert torch.equal(value, same), (engine, precision, name)
            elif precision == "fp32":
                torch.testing.assert_close(value, parameter.detach(), rtol=0, atol=1e-3, msg=f"{engine}: {name}")
        moments = {name.partition("/")[2] for name in got["names"] if not name.startswith("model/")}
        assert moments == {name for name, _ in model.named_parameters()} - frozen
        assert {name for name in got["names"] if name.startswith("model/")} >= {f"model/{name}" for name in frozen}


def train_in_bf16(ranks: ParallelContext, folder: str, cases: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Train each engine in bf16 on frozen weights that are held in bf16, were rounded before, or are held in fp32 and cast."""
    results = []
    for name, frozen in cases:
        root = make_root(folder)
        if frozen == "rounded before":
            for parameter in root.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16().float()
        copies = {"backbone": root.backbone.lower(1)}
        hold = patch.object(fsdp_engine, "cast_frozen") if frozen == "cast from fp32" else nullcontext()
        with hold:
            engine = sharded(name, root, root.backbone.layers, ["objective"], ranks, OPTIM, precision="bf16")
        constant = TeacherOptions(momentum=0.9, final_momentum=None, schedule="constant")
        teacher = Teacher(engine, TeacherModel(copies), constant, 4)
        losses = []
        for step in range(4):  # B is zero in the first step, A moves from the second on
            loss = engine.forward(batch(step).chunk(ranks.world_size)[ranks.rank]).total
            engine.backward(loss)
            engine.step()
            teacher.update(step)
            losses.append(loss.detach().clone())
        state, of_teacher = engine.sharded_state(), teacher.sharded_state()
        trained = {n.partition("/")[2] for n in state if n.startswith("exp_avg/")}
        results.append(
            {
                "losses": torch.stack(losses),
                "teacher": teacher.forward("backbone", pack_sequence([Segment([1, 41, 3], "a")])),
                "dtypes": {(n.partition("/")[2] in trained, v.dtype) for n, v in {**state, **of_teacher}.items()},
            }
        )
    return results


def test_frozen_weights_are_held_in_the_compute_dtype_and_the_curve_is_that_of_a_cast(tmp_path):
    """The rounding of the weights is the one of the cast before each use, so that not a bit of a loss differs."""
    folder = pretrained(tmp_path / "base", QWEN3, KNOWN)
    cases = [(engine, how) for engine in ENGINES for how in ("held in bf16", "rounded before")]
    cases.append(("fsdp", "cast from fp32"))
    for of_rank in run_ranks(train_in_bf16, 2, folder, cases):
        found = dict(zip(cases, of_rank, strict=True))
        for (engine, how), got in found.items():
            held = found[engine, "held in bf16"]
            assert torch.equal(got["losses"], held["losses"]), (engine, how)
            assert torch.equal(got["teacher"], held["teacher"]), (engine, how)
            frozen = torch.float32 if how == "cast from fp32" else torch.bfloat16
            assert got["dtypes"] == {(True, torch.float32), (False, frozen)}, (engine, how)


def edit(file: str, **sections: Any) -> str:
    """Change sections of a config file, and return its path."""
    path = Path(file)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))
    return file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder, [10, 1, 30, 8], valid=9)
    return folder


def model(folder: Path, **lora: Any) -> dict[str, Any]:
    """Return a base model that lacks the corpus's last two ids."""
    known = VOCABULARY - 2
    return {"family": "huggingface", "pretrained": pretrained(folder / "base", LLAMA, known), "lora": lora or None}


def train_lora(ranks: ParallelContext, cases: list[tuple[str, str | None]], keeps: bool = False) -> str:
    """Train each (config file, --resume value); ``keeps``: with checkpoints that hold the base, as there were. Return an error."""
    with patch.object(build, "base_of", return_value=None) if keeps else nullcontext():
        try:
            train_runs(ranks, cases)
        except InputError as error:
            return str(error)
    return ""


def evaluate(ranks: ParallelContext, run: str) -> str:
    """Return what ``jepa-scale eval`` prints."""
    from jepa_scale.training.run import evaluate_checkpoint

    with redirect_stdout(StringIO()) as printed:
        evaluate_checkpoint(argparse.Namespace(run=Path(run), checkpoint="auto", overrides=[]))
    return printed.getvalue()


def test_a_checkpoint_names_its_base_and_one_that_holds_it_can_still_be_read(corpus, tmp_path):
    """Both go on, on another engine, to the same weights, moments and teacher, bit by bit, each in its form. Another base is
    refused."""
    how: dict[str, Any] = {"model": model(tmp_path, rank=2), "checkpoint": {"every": 2, "keep_last": 9}}
    how["train"] = {"batch_tokens": 240, "micro_tokens": 60, "steps": 4}
    how["engine"] = {"precision": "bf16"}
    for form in ("named", "held"):
        before = config_file(tmp_path, form, corpus, "vicreg", "zero3", **how)
        assert run_ranks(train_lora, 2, [(before, None)], form == "held") == ["", ""]
    again = []
    for form in ("named", "held"):
        after = config_file(tmp_path, f"again-{form}", corpus, "vicreg", "fsdp", **how)
        again.append((after, str(checkpoint(tmp_path / form, 2))))
    assert run_ranks(train_lora, 2, again) == ["", ""]

    for run in ("", "again-"):
        named, held = (tensors(checkpoint(tmp_path / f"{run}{form}", 4)) for form in ("named", "held"))
        base = {name for name in held if "backbone" in name and "lora_" not in name and ".new_rows." not in name}
        assert any(name.startswith("teacher/") for name in base) and any("embed_tokens" in name for name in base)
        assert named.keys() == held.keys() - base
        assert all(torch.equal(tensor, held[name]) for name, tensor in named.items()), run
        assert all(held[name].dtype == torch.bfloat16 for name in base)
        manifest = Manifest.read(checkpoint(tmp_path / f"{run}named", 4))
        assert manifest.state["base"]["name"] == how["model"]["pretrained"]

    weights = tmp_path / "base/model.safetensors"
    changed = {name: tensor + 0.1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    for error in run_ranks(train_lora, 2, again[:1]):
        assert "model.pretrained: the weights of " in error and "are not those of " in error
    told, *_ = run_ranks(evaluate, 2, str(tmp_path / "again-held"))  # of the weights in the checkpoint
    (row,) = [row for row in rows(tmp_path / "again-held", "eval/valid") if row["step"] == 4]
    assert f"lm_loss {row['lm_loss']:.4f}" in told


@pytest.mark.matrix
def test_whole_runs_resume_bitwise(corpus, tmp_path):
    """Resume ``horizon`` with a teacher of the lower blocks, clipping by part and dropout in the adapters, in new processes.

    From step 2 on the rows, weights, moments and teacher are bitwise equal. The frozen weights are read from the base again.
    """
    how: dict[str, Any] = {"model": model(tmp_path, rank=2, dropout=0.1), "checkpoint": {"every": 2, "keep_last": 9}}
    cases = {"fsdp": ("fsdp", "bf16"), "zero1": ("zero1", "bf16"), "zero3": ("zero3", "fp32")}
    files = {
        name: config_file(tmp_path, name, corpus, "vicreg", engine, engine={"precision": precision}, **how)
        for name, (engine, precision) in cases.items()
    }
    for name, held in resumed_bitwise(files, tmp_path, 2).items():
        assert newest(tmp_path / name) > 4
        assert any(n.startswith("teacher/backbone") and "lora_B" in n for n in held)
        start = tensors(checkpoint(tmp_path / name, 2))
        moved = [n for n in held if n.startswith("model/backbone")]
        assert moved and all("lora" in n or "new_rows" in n for n in moved)
        assert not any(torch.equal(held[n], start[n]) for n in moved)


@pytest.mark.matrix
def test_a_run_goes_on_with_fewer_ranks_and_leaves_as_what_it_was(corpus, tmp_path):
    """Continue a run of two ranks of ZeRO-3 on one rank of FSDP2, and compare it with FSDP2 on one rank throughout.

    The merged model then has the score of the run's evaluation.
    """
    how: dict[str, Any] = {"model": model(tmp_path, rank=2), "checkpoint": {"every": 2, "keep_last": 9}}
    whole = config_file(tmp_path, "whole", corpus, "vicreg", "fsdp", **how)
    before = config_file(tmp_path, "moved", corpus, "vicreg", "zero3", **how)
    run_ranks(train_runs, 2, [(before, None)])
    after = config_file(tmp_path, "moved", corpus, "vicreg", "fsdp", **how)
    run_ranks(train_runs, 1, [(whole, None), (after, str(checkpoint(tmp_path / "moved", 2)))])
    mine, theirs = rows(tmp_path / "moved", "train"), rows(tmp_path / "whole", "train")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], abs=1e-4)
    last = newest(tmp_path / "whole")
    a, b = (tensors(checkpoint(tmp_path / name, last)) for name in ("moved", "whole"))
    assert a.keys() == b.keys()

    export(tmp_path / "moved", tmp_path / "hf", ExportOptions(progress=False, tokenizer="none"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    for example in load_data(parse_data({"source": "text", "path": str(corpus), "max_length": 24})).splits["valid"]:
        ids = torch.tensor(list(map(int, example.lm_sequence()[0])))[None]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(merged(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    (told,) = [row["lm_loss"] for row in rows(tmp_path / "moved", "eval/valid") if row["step"] == last]
    assert total / count == pytest.approx(told, abs=1e-5)
