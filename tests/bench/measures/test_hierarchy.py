"""Probes of hidden symbols: on states that hold the symbols, on states that do not, and a decoder's states one by one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jepa_scale.bench.generators import hierarchy as grammar
from jepa_scale.bench.generators.rows import read_column, with_start
from jepa_scale.bench.measures import hierarchy
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import Segment, pack_sequence
from jepa_scale.utils.errors import InputError

SHAPE = {"depth": 2, "symbols": 6, "productions": 3}


@given(st.integers(1, 5), st.integers(2, 4), st.data())
def test_the_last_token_below_each_symbol(depth, branches, data):
    level = data.draw(st.integers(1, depth))
    size = branches**level
    below = [list(range(first, first + size)) for first in range(1, branches**depth + 1, size)]
    expected = [tokens[-1] for tokens in below if len(below) == 1 or tokens[-1] != branches**depth]
    assert hierarchy.last_tokens(level, depth, branches).tolist() == expected


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hierarchy")
    grammar.write(folder, 5, **SHAPE, train=1, test=120)
    return folder


def states_with(symbols: list[np.ndarray], level: int) -> torch.Tensor:
    """States (n, 5, 7) that hold the symbol of a level at the tokens below it."""
    return F.one_hot(torch.from_numpy(with_start(np.repeat(symbols[level], 2**level, axis=1), 6)), 7).float()


def test_a_probe_finds_the_symbols_that_some_block_shows(monkeypatch, data):
    rows = read_column(data / "test.jsonl", "input_ids")
    symbols = grammar.hidden_symbols(grammar.rules(5, 2, 6, 3, 2), rows[:, 1:])
    noise = torch.randn(len(rows), 5, 3, generator=torch.Generator().manual_seed(0))
    for level, other in ((1, 2), (2, 1)):
        blocks = [noise, states_with(symbols, level), noise]
        monkeypatch.setattr(hierarchy, "states_of", lambda run, rows, blocks=blocks: blocks)
        found = hierarchy.measure(None, data, 5, **SHAPE)
        assert set(found) == {"level_1", "level_2"}
        assert found[f"level_{level}"] == 1.0 and found[f"level_{other}"] < 0.8


def test_states_are_those_of_each_sample_alone(monkeypatch):
    torch.manual_seed(0)
    options = ModelOptions(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, initializer_range=0.3)
    backbone = build_backbone(options, 7).eval()
    rows = np.random.default_rng(0).integers(7, size=(5, 4))
    monkeypatch.setattr(hierarchy, "BATCH_TOKENS", 8)  # two samples at a time
    with torch.no_grad():
        run = SimpleNamespace(module=SimpleNamespace(backbone=backbone), device=torch.device("cpu"))
        found = hierarchy.states_of(run, rows)
        assert [states.shape for states in found] == [(5, 4, 16)] * 3
        for number, row in enumerate(rows.tolist()):
            alone = pack_sequence([Segment(row, "text")])
            for states, until in zip(found, (1, 2, None), strict=True):
                torch.testing.assert_close(states[number], backbone.hidden(alone, until=until), atol=1e-5, rtol=1e-4)


def test_too_few_samples_and_other_rules_are_refused(monkeypatch, tmp_path, data):
    grammar.write(tmp_path, 5, **SHAPE, train=1, test=30)
    with pytest.raises(InputError, match="30 samples are too few for a probe"):
        hierarchy.measure(None, tmp_path, 5, **SHAPE)
    with pytest.raises(InputError, match="is not derived by these rules"):
        hierarchy.measure(None, data, 6, **SHAPE)


def test_options_are_those_of_the_generator():
    written, measured = (inspect.signature(f).parameters for f in (grammar.write, hierarchy.measure))
    rules = [name for name in written if name not in ("folder", "seed", "train", "test")]
    assert {name: written[name].default for name in rules} == {name: measured[name].default for name in rules}
    assert {"train", "test"} <= set(measured)


def test_the_samples_at_which_level_1_is_read_off_and_their_rise():
    def case(depth: int, train: int, level_1: float):
        return {"depth": depth, "train": train}, {"hierarchy/level_1": level_1}

    shallow = [case(3, 4096, 0.97), case(3, 1024, 0.91)]  # 0.95 is two thirds of the way from 2^10 to 2^12
    deep = [case(4, 1024, 0.80), case(4, 4096, 0.90), case(4, 16384, 1.00)]
    expected = {"level_1_samples_L3": 10 + 2 * 2 / 3, "level_1_samples_L4": 13.0}
    assert hierarchy.derive([*shallow, *deep]) == pytest.approx(
        {**expected, "level_1_samples_per_level": 13 - 10 - 4 / 3}
    )
    assert hierarchy.derive([*shallow, *deep[:2]]) == pytest.approx({"level_1_samples_L3": 10 + 4 / 3})
    assert hierarchy.derive(deep[:2]) == {}
