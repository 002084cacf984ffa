"""How many steps a budget of FLOPs is: estimated from real views, the same for every rank that asks."""

from types import SimpleNamespace

import pytest

from jepa_scale.config.parsing import parse_section
from jepa_scale.data.sampling.batches import DataParallelSlice
from jepa_scale.data.sampling.loader import Loader
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.lm_options import LmOptions
from jepa_scale.objectives.two_view.objective import TwoView, TwoViewOptions
from jepa_scale.training import flop_budget
from jepa_scale.training.build import create_sampler
from jepa_scale.training.flop_budget import steps_within, whole_steps
from jepa_scale.utils.errors import InputError
from tests.objectives import chats

SEED = 3


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    return chats.chat_data(folder, "llama", chats.conversations(60), shuffle_window=16)


def run(chat, options=None, rank=0, world_size=1, **train):
    """A run's loader, what a step costs, the kinds of its steps."""
    model = chats.backbone("llama", chat.vocab_size)
    if options is None:
        objective = LanguageModeling(LmOptions(), model, chat)
    else:
        objective = TwoView(parse_section(TwoViewOptions, options, "objective"), model, chat)
    keys = {"batch_size": 0, "batch_tokens": 0, "micro_tokens": 0, "accumulation": 1, "epochs": 0, **train}
    experiment = SimpleNamespace(train=SimpleNamespace(**keys), run=SimpleNamespace(seed=SEED))
    stream = create_sampler(experiment, chat, objective, SimpleNamespace(dp_rank=rank, dp_size=world_size))
    loader = Loader(chat.train, stream, objective.view_transform(), objective.sequences, 0, 0, SEED)
    return loader, objective.flops(model), lambda step: objective.kind_of_step(step, SEED)


def cost(loaders, flops, steps):
    return sum(
        flops([x.micro_batch(step, m) for m in range(x.sampler.accumulation)]) for step in steps for x in loaders
    )


VARIANTS = {
    "lm": (None, {"batch_size": 4}),
    "views": ({"predictor_tokens": 1}, {"batch_size": 8, "accumulation": 2}),
    "views of some steps": ({"loss_dropout": 0.5, "jepa_start": 20}, {"batch_size": 4}),
    "collecting": ({"distance": "infonce", "regularizer": "vicreg"}, {"batch_size": 8, "accumulation": 2}),
    "tokens": ({"predictor_tokens": 1}, {"batch_tokens": 640, "micro_tokens": 320}),
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_so_many_steps_costs_the_budget(chat, monkeypatch, name, world_size):
    """Although most of its samples have never been looked at."""
    monkeypatch.setattr(flop_budget, "SAMPLES", 64)
    monkeypatch.setattr(flop_budget, "MOST_SAMPLES", 96)
    options, train = VARIANTS[name]
    loader, flops, kind = run(chat, options, world_size=world_size, **train)
    ranks = whole_steps(loader, world_size)
    budget = cost(ranks, flops, range(120))
    steps = steps_within(budget, ranks, flops, kind)
    assert cost(ranks, flops, range(steps)) == pytest.approx(budget, rel=0.02)
    assert steps == pytest.approx(120, abs=2)


def test_a_short_run_is_counted_to_the_step(chat):
    loader, flops, kind = run(chat, {"jepa_start": 10}, batch_size=4)
    for steps in (1, 9, 13, 40):
        budget = cost([loader], flops, range(steps))
        step = cost([loader], flops, [steps])
        for off, expected in ((0, steps), (0.4 * step, steps), (0.6 * step, steps + 1)):
            assert steps_within(budget + off, whole_steps(loader, 1), flops, kind) == expected
    assert steps_within(1.0, whole_steps(loader, 1), flops) == 1


@pytest.mark.parametrize("train", [{"batch_size": 8}, {"batch_tokens": 640, "micro_tokens": 320}])
def test_every_rank_finds_the_same_number_from_all_ranks_samples(chat, train):
    found = []
    for rank in range(2):
        loader, flops, kind = run(chat, {}, rank=rank, world_size=2, **train)
        loaders = whole_steps(loader, 2)
        assert loader.sampler.dp_slice == DataParallelSlice(1, rank, 2)  # its own is as it was
        found.append((steps_within(3e9, loaders, flops, kind), cost(loaders, flops, range(20))))
        own = [sum(map(int, x.sampler.micro_batch(4, 0)[1])) for x in loaders]
        assert own[rank] == sum(map(int, loader.sampler.micro_batch(4, 0)[1])) and own[0] != own[1]
    assert found[0] == found[1] and found[0][0] > 10


def test_a_budget_beyond_reason_is_refused(chat, monkeypatch):
    monkeypatch.setattr(flop_budget, "MOST_STEPS", 50)
    loader, flops, _ = run(chat, batch_size=4)
    with pytest.raises(InputError, match=r"train.flops: 1e\+30 is more than 50 steps of this model take; lower it"):
        steps_within(1e30, whole_steps(loader, 1), flops)
