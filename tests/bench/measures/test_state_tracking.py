"""State tracking: readers that are right up to some position, and a real decoder and dynamics step by step."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jepa_scale.bench.generators import state_tracking as groups
from jepa_scale.bench.measures import state_tracking
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.objectives.next_latent.config import NextLatentOptions
from jepa_scale.objectives.next_latent.objective import NextLatent
from jepa_scale.packing import PackedSequence, Segment, pack_sequence
from jepa_scale.utils.errors import InputError

TABLE = groups.table("S3")


class Tracker:
    """A backbone whose state is the one-hot product, and the identity after the element number ``until`` of a word."""

    position_limit: int | None = None

    def __init__(self, until: int) -> None:
        self.until = until

    def hidden(self, packed: PackedSequence) -> torch.Tensor:
        products: list[int] = []
        for position, token in zip(packed.position_ids.tolist(), packed.input_ids.tolist(), strict=True):
            assert (token == 6) == (position == 0)
            products.append(0 if position == 0 else int(TABLE[products[-1], token]))
        shown = torch.tensor(products).where(packed.position_ids <= self.until, torch.tensor(0))
        return F.one_hot(shown, 6).double()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids, 6).double()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return states


class Step(nn.Module):
    """A dynamics that multiplies, once right and always wrong afterwards if it ``forgets``."""

    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.forgets = forgets

    def forward(self, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        table = torch.from_numpy(TABLE)
        right = table[states.argmax(-1), embeddings.argmax(-1)]
        if self.forgets:  # a state of size 2 was predicted before
            right = torch.where(states.amax(-1) > 1, 6, right)
        return 2 * F.one_hot(right, 7).double()[:, :6]


def run_of(until: int, dynamics: Step | None = None) -> Any:
    objective: Any = SimpleNamespace()
    if dynamics is not None:
        objective = NextLatent(NextLatentOptions(), SimpleNamespace(hidden_size=6), None)
        objective.dynamics = dynamics
    module = SimpleNamespace(backbone=Tracker(until), objective=objective)
    return SimpleNamespace(module=module, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state_tracking")
    groups.write(folder, 0, length=4, train=1, test=300)
    return folder


def test_a_perfect_decoder_of_an_objective_without_dynamics(data):
    found = state_tracking.measure(run_of(99), data, 0, length=4)
    assert set(found) == {
        *(f"decoder_{what}{n}x" for n in (1, 2, 4) for what in ("", "exact_")),
        *(f"decoder_at_{n}" for n in (1, 2, 4, 8, 16)),
    }
    assert set(found.values()) == {1.0}


def test_a_decoder_that_is_lost_beyond_the_length_of_training(data):
    """There it answers with the identity, which is right in one of six words."""
    found = state_tracking.measure(run_of(4), data, 0, length=4)
    assert found["decoder_1x"] == found["decoder_exact_1x"] == found["decoder_at_1"] == found["decoder_at_4"] == 1.0
    assert found["decoder_exact_2x"] < 0.02 and found["decoder_exact_4x"] == 0.0
    for name, expected in (("2x", 0.5 + 0.5 / 6), ("4x", 0.25 + 0.75 / 6), ("at_8", 1 / 6), ("at_16", 1 / 6)):
        assert found[f"decoder_{name}"] == pytest.approx(expected, abs=0.06)


def test_the_dynamics_goes_on_from_the_first_state_alone(data):
    """It is right where the decoder is not; and one that is right for a single step is so at the first element."""
    found = state_tracking.measure(run_of(0, Step(forgets=False)), data, 0, length=4)
    recurrent = {name: value for name, value in found.items() if name.startswith("recurrent_")}
    assert len(recurrent) == 11 and set(recurrent.values()) == {1.0} and found["decoder_at_4"] < 0.3
    found = state_tracking.measure(run_of(99, Step(forgets=True)), data, 0, length=4)
    assert found["recurrent_at_1"] == 1.0 and found["recurrent_at_2"] < 0.3 and found["decoder_4x"] == 1.0
    assert 0.25 <= found["recurrent_1x"] < 0.5 and found["recurrent_exact_4x"] == 0.0


def test_words_are_read_as_a_loop_over_each_would(monkeypatch):
    torch.manual_seed(0)
    options = ModelOptions(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    backbone = build_backbone(options, 7).eval()
    dynamics = NextLatent(NextLatentOptions(), backbone, None).dynamics
    nn.init.normal_(dynamics.mlp[-1].weight, std=0.3)
    ids = F.pad(torch.randint(6, (4, 5), generator=torch.Generator().manual_seed(1)), (1, 0), value=6)
    with torch.no_grad():
        decoder = state_tracking.read_products(backbone, ids)
        recurrent = state_tracking.recurrent_products(backbone, dynamics, ids)
        for n, word in enumerate(ids.tolist()):
            states = backbone.hidden(pack_sequence([Segment(word, "text")]))
            assert decoder[n].tolist() == backbone.logits(states).argmax(-1).tolist()[1:]
            state = states[:1]
            for i in range(1, 6):
                state = dynamics(backbone.embed(torch.tensor(word[i : i + 1])), state)
                assert recurrent[n, i - 1] == backbone.logits(state).argmax()
    assert (decoder != recurrent).any()


def test_a_model_with_too_few_positions_is_refused(data):
    run = run_of(99)
    run.module.backbone.position_limit = 16
    with pytest.raises(InputError, match="max_position_embeddings: 16 is less than the 17 tokens"):
        state_tracking.measure(run, data, 0, length=4)
    run.module.backbone.position_limit = 17
    assert state_tracking.measure(run, data, 0, length=4)["decoder_4x"] == 1.0


def test_options_are_those_of_the_generator():
    written, measured = (inspect.signature(f).parameters for f in (groups.write, state_tracking.measure))
    assert {n: written[n].default for n in ("group", "length")} == {n: measured[n].default for n in ("group", "length")}
    assert {"train", "test"} <= set(measured)
