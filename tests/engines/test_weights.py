"""Initial weights: those of one process, whoever builds them; and how much memory a rank has of them at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jepa_scale.config.schema import OptimConfig
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.weights import Weights, built_by_rank_0
from jepa_scale.utils.errors import InputError
from tests.distributed.launch import run_ranks
from tests.distributed.toy import ENGINES, sharded

WIDTH, LAYERS = 64, 12


class Deep(nn.Module):
    """Equal blocks, so that one parameter is a small part of all; one is frozen, and the root has a tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.embed, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].weight.requires_grad_(False)
        self.register_buffer("table", torch.randn(3))


def make_deep() -> Deep:
    torch.manual_seed(7)
    return Deep()


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and type(leaf) is Tensor and not leaf.is_meta:
                self._enter(leaf.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def initial(ranks: ParallelContext, cases: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
    """What each engine begins with, and a random number drawn after it, on every rank."""
    found = []
    for name, precision in cases:
        module = built_by_rank_0(make_deep, ranks)
        assert all(p.is_meta for p in module.parameters()) == (ranks.rank > 0)
        after = torch.rand(1)
        engine = sharded(
            name, module, module.layers, (), ranks, OptimConfig(), Weights(module, ranks), precision=precision
        )
        found.append({**engine.full_state(), "after": after, "here": engine.module.table.clone()})
    return found


ONE_OR_MORE = pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.matrix) for n in (1, 4))])
MORE = pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.matrix)])


@ONE_OR_MORE
def test_every_engine_begins_as_one_process_would(world_size):
    cases = [(name, precision) for name in ENGINES for precision in ("fp32", "bf16")]
    by_rank = run_ranks(initial, world_size, cases)
    wanted = make_deep().state_dict()
    after = torch.rand(1)
    for i, (name, precision) in enumerate(cases):
        for rank in by_rank:
            assert torch.equal(rank[i]["after"], after) and torch.equal(rank[i]["here"], wanted["table"])
        for key, value in wanted.items():
            # DeepSpeed's masters begin as what it computes with; under FSDP2 only frozen weights are rounded
            rounds = precision == "bf16" and key != "table" and (name != "fsdp" or key == "layers.1.weight")
            value = value.bfloat16().float() if rounds else value
            assert torch.equal(by_rank[0][i][key], value), (name, precision, key)


def taken(ranks: ParallelContext) -> tuple[int, int, int]:
    """The most that was there while weights were handed out, what was left of it, and what is left to hand out."""
    module = built_by_rank_0(make_deep, ranks)
    names = [name for name, _ in module.named_parameters()]
    weights = Weights(module, ranks)
    with Live() as live:
        for name in names:
            weights.take(name)
    return live.most, live.now, len(weights._values)


@MORE
def test_ranks_have_one_whole_parameter_at_a_time(world_size):
    one = 4 * WIDTH * WIDTH
    for most, left, held in run_ranks(taken, world_size)[1:]:
        assert one <= most <= 2.1 * one and left <= one and held == 0  # gloo may hold what it has sent last


def start_of(ranks: ParallelContext, names: list[str]) -> list[int]:
    """Most bytes alive while each engine is built, on this rank."""
    found = []
    for name in names:
        module = built_by_rank_0(make_deep, ranks)
        weights = Weights(module, ranks)
        with Live() as live:
            sharded(name, module, module.layers, (), ranks, OptimConfig(), weights)
        found.append(live.most)
    return found


@MORE
def test_no_rank_has_the_model_whole_while_an_engine_is_built(world_size):
    """Parameters, gradients and two moments of its shards (ZeRO-3 has masters and a second set of parameters), and whole ones one at
    a time; ZeRO-3 copies its partitions once when it puts them side by side."""
    matrices = 4 * (LAYERS + 1) * WIDTH * WIDTH
    one, share = 4 * WIDTH * WIDTH, matrices / world_size
    for fsdp, zero3 in run_ranks(start_of, world_size, ["fsdp", "zero3"])[1:]:
        assert fsdp <= 1.1 * (4 * share + 2 * one) and zero3 <= 1.1 * (8 * share + 2 * one), (fsdp, zero3)


def refused(ranks: ParallelContext) -> str:
    def build() -> nn.Module:
        if ranks.is_main:
            raise InputError("model.pretrained: no weights")
        return make_deep()

    with pytest.raises(InputError) as caught:
        built_by_rank_0(build, ranks)
    return str(caught.value)


def test_what_rank_0_cannot_build_every_rank_refuses():
    assert run_ranks(refused, 2) == ["model.pretrained: no weights"] * 2
