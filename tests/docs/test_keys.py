"""Keys of configs that the pages name, exist."""

import re
from pathlib import Path

import pytest

from jepa_scale.config.schema import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    Section,
    TrainConfig,
)
from jepa_scale.data import parse_data
from jepa_scale.data.base import DataOptions
from jepa_scale.evaluation.options import OPTIONS
from jepa_scale.experiment import OBJECTIVES, objective_class
from jepa_scale.models.options import ModelOptions

DOCS = Path(__file__).resolve().parents[2] / "docs"


def below(cls: type[Section]) -> set[str]:
    return set(cls.model_fields).union(*(below(other) for other in cls.__subclasses__()))


parse_data({"source": "reversal"})  # which imports all sources
KNOWN = {
    "run": below(RunConfig),
    "engine": below(EngineConfig),
    "model": below(ModelOptions),
    "data": below(DataOptions),
    "objective": {"name"}.union(*(below(objective_class(name).Options) for name in OBJECTIVES)),
    "optim": below(OptimConfig),
    "train": below(TrainConfig),
    "checkpoint": below(CheckpointConfig),
    "eval": set().union(*(below(options) for options in OPTIONS.values())),
    "log": below(LogConfig),
}
KEY = re.compile(rf"`({'|'.join(KNOWN)})\.([a-z_0-9]+)[^`]*`")
FOREIGN = {"data.module", "model.name", "model.use_lora", "model.lora_rank", "model.pretrain", "data.shuffle"}
FOREIGN |= {
    f"data.{key}"
    for key in ("block_size", "bpe_lowercase", "bpe_vocab_size", "data_dir", "download_url", "subset_seed")
}
FOREIGN |= {"model.d_model", "model.dropout", "model.ff_multiplier"}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_keys_exist(page):
    for section, key in KEY.findall(page.read_text()):
        name = f"{section}.{key}"
        if name not in FOREIGN and key not in ("yaml", "json", "jsonl", "py", "md"):
            assert key in KNOWN[section], f"{page.name}: {name}"
