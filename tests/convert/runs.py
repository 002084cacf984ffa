"""Small run directories: a config, a model with random weights and its checkpoint, as training leaves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from jepa_scale.checkpoint import Manifest, store
from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.loading import load_config
from jepa_scale.convert.from_hf import state_tensors
from jepa_scale.data import load_data
from jepa_scale.experiment import validate
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel
from jepa_scale.packing import PackedSequence, Segment, pack_sequence

NATIVE = {
    "family": "native",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,  # nothing here is Llama's default, which would hide what is left out
    "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0,
}
REVERSAL = {"source": "reversal", "entities_a": 50, "comb": 5, "relations": 2}


def huggingface(model_type: str, **keys: Any) -> dict[str, Any]:
    """``model:`` of a tiny model of transformers."""
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {"family": "huggingface", "config": {"model_type": model_type, **common, "intermediate_size": 48, **keys}}


GPT2 = {
    "family": "huggingface",
    "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
MODELS: dict[str, dict[str, Any]] = {
    "native": NATIVE,
    "native_tied": {**NATIVE, "tie_word_embeddings": True, "output_bias": True},
    "native_polar": {**NATIVE, "position_embedding": "pope", "embedding_norm": True, "drop_path": 0.3},
    "native_bridge": {**NATIVE, "bridge_after": 1, "bridge_intermediate_size": 24, "bridge_grad_barrier": True},
    "gpt2": GPT2,
    "llama": huggingface("llama", rms_norm_eps=1e-5),
    "qwen3": huggingface("qwen3", head_dim=16, tie_word_embeddings=True),
    "mixtral": huggingface("mixtral", num_local_experts=4),
}


def config_file(folder: Path, name: str, model: dict[str, Any], **sections: Any) -> Path:
    values = {
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "engine": {"name": "fsdp", "threads": 1},
        "model": model,
        "data": REVERSAL,
        "objective": {"name": "lm"},
        "train": {"steps": 4, "batch_size": 8, "log_every": 1},
        "eval": {"max_facts": 5, "rank_facts": 5} if "data" not in sections else {},
        "log": {"progress": False, "report": False},
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_run(
    folder: Path, name: str, model: dict[str, Any], step: int = 7, seed: int = 1, **sections: Any
) -> JepaModel:
    """A run directory ``folder/name`` with one checkpoint; returns the model whose tensors are in it."""
    experiment = validate(load_config(config_file(folder, name, model, **sections)))
    data = load_data(experiment.data)
    torch.manual_seed(seed)
    backbone = build_backbone(experiment.model, data.vocab_size)
    module = JepaModel(backbone, experiment.objective.build(backbone, data))
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases too: what is one or zero hides mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    run = folder / name
    run.mkdir()
    (run / "config.yaml").write_text(experiment.to_yaml())
    tensors = state_tensors(module)
    tensors |= {f"exp_avg/{n}": torch.full_like(p, 5.0) for n, p in module.named_parameters()}
    write_checkpoint(run, step, tensors)
    return module.eval()


def write_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], metrics: dict[str, float] | None = None, **state: Any
) -> Path:
    """As two ranks with rows of each tensor would have written it."""
    path = run / "checkpoints" / f"step_{step:08d}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = store.write(path / "tensors", {name: _halves(tensor) for name, tensor in tensors.items()})
    Manifest(
        step=step,
        engine="fsdp",
        layout="FSDP2 fp32",
        world_size=2,
        updates=step,
        state={"tokens": 1234, **state},
        metrics=metrics or {},
        files={f"tensors/{name}": told for name, told in files.items()},
    ).write(path)
    return path


def _halves(tensor: Tensor) -> ShardView:
    if tensor.dim() == 0 or len(tensor) < 2:
        return ShardView.whole(tensor)
    cut, rest = len(tensor) // 2, (0,) * (tensor.dim() - 1)
    return ShardView(tensor.shape, tensor.dtype, [((0, *rest), tensor[:cut]), ((cut, *rest), tensor[cut:])])


@torch.no_grad()
def logits(backbone: Backbone, sequences: list[list[int]]) -> list[Tensor]:
    """(n, V) of each sequence, from one packed stream."""
    stream: PackedSequence = pack_sequence([Segment(tokens, "text") for tokens in sequences])
    rows = backbone.logits(backbone.hidden(stream))
    return list(rows.split([len(tokens) for tokens in sequences]))


def without_jepa_scale(script: str, *arguments: str, python: str = sys.executable, **environment: str) -> Any:
    """Run a script where jepa_scale can't be imported, in a folder elsewhere; the JSON value that it prints last."""
    lines = [
        "import sys, importlib.util",
        "sys.modules['jepa_scale'] = None  # an import of it fails, wherever it is installed",
        "import torch; torch.set_num_threads(1)",
        textwrap.dedent(script),
        "assert not [name for name in sys.modules if name.startswith('jepa_scale.')]",
    ]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", "\n".join(lines), *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        env={**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def give_code_of_its_own(folder: Path, model_type: str) -> None:
    """Give an exported Llama a module that defines its classes, as models with remote code have.

    Args:
        model_type: transformers knows one class of configs for each, in a whole process.
    """
    (folder / "modeling_mine.py").write_text(
        f"from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass MineConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
        "\n\nclass MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type, "architectures": ["MineForCausalLM"]}
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
