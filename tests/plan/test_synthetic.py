"""Data that are not read: every shipped objective has its views made of them."""

from pathlib import Path

import numpy as np
import pytest

from jepa_scale.config.loading import load_config
from jepa_scale.experiment import validate
from jepa_scale.plan.planner import Request, make_plan
from jepa_scale.plan.synthetic import micro_batch, synthetic_data
from jepa_scale.utils.errors import InputError
from tests.plan.small import MODEL, config, modelled

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_micro_batch_is_full():
    experiment = validate(config(train={"batch_tokens": 100, "micro_tokens": 100}))
    data = synthetic_data(experiment, None, None)
    objective = modelled(config())[0].objective
    batch = micro_batch(objective, data, tokens=100)
    assert batch.sequences["main"].table.lengths == (16,) * 6  # 17 tokens, the last one only predicted; 4 are too few
    assert micro_batch(objective, data, samples=3).num_tokens == 48
    with pytest.raises(InputError, match="train.micro_tokens: a sample's views take 16 tokens, more than 3"):
        micro_batch(objective, data, tokens=3)


def test_the_vocabulary_must_be_known():
    without = {**MODEL, "vocab_size": None}
    unknown = config(model=without, data={"source": "text", "path": "nowhere", "tokenizer": "some/tokenizer"})
    with pytest.raises(InputError, match="model.vocab_size: no data are read to plan.*--vocab-size"):
        synthetic_data(validate(unknown), None, None)
    assert synthetic_data(validate(unknown), 77, None).vocab_size == 77
    trained = config(model=without, data={"source": "text", "path": "nowhere", "tokenizer": "bpe", "vocab_size": 512})
    assert synthetic_data(validate(trained), None, None).vocab_size == 512


def test_the_vocabulary_of_a_pretrained_model_is_in_its_config(tmp_path):
    model = {"family": "huggingface", "pretrained": str(tmp_path)}
    experiment = validate(
        config(model=model, data={"source": "text", "path": "nowhere", "tokenizer": "some/tokenizer"})
    )
    with pytest.raises(InputError, match=f"model.pretrained: can't load '{tmp_path}'"):
        synthetic_data(experiment, None, None)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 4321}')
    assert synthetic_data(experiment, None, None).vocab_size == 4321
    assert synthetic_data(experiment, 77, None).vocab_size == 77


def test_a_sample_is_not_longer_than_the_config_allows():
    with pytest.raises(InputError, match="--sample-tokens 18: no sample has more than data.max_length=17"):
        synthetic_data(validate(config()), None, 18)
    data = synthetic_data(validate(config()), None, 9)
    assert data.train.max_size == 9 and (data.train.sizes(np.arange(3)) == 9).all()


@pytest.mark.parametrize(
    "name", ["reversal", "reversal_two_view", "tiny_corpus", "nl_rx_synth", "nl_rx_synth_stp", "span_tiny", "grid_arc"]
)
def test_every_objective_is_planned(name):
    plan = make_plan(validate(load_config(CONFIGS / f"{name}.yaml")), Request(2, None))
    assert plan.memory.peak > sum(plan.memory.state.values()) > 0
    assert plan.flops > 0 and plan.micro_tokens > 0
