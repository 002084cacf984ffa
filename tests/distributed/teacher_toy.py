"""A small root module that learns from its EMA teacher, and a dense fp64 reference of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_scale.checkpoint.shard_view import ShardView
from jepa_scale.config.ema import TeacherOptions
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.engines.base import Engine
from jepa_scale.engines.ema import Teacher, TeacherModel, momentum_at
from tests.distributed.toy import DIM, OPTIM, VOCAB, Block, sharded

BATCH, LENGTH, MICRO = 8, 5, 2
FROZEN = "body.blocks.0.up"


class Output(NamedTuple):
    total: Tensor


class Body(nn.Module):
    """Embedding and blocks, with buffers of both kinds: one written in place, one assigned and not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shift", torch.zeros(DIM), persistent=False)

    def forward(self, ids: Tensor, until: int = 3) -> Tensor:
        x = self.embed(ids) + self.shift.to(self.embed.weight.dtype)
        for block in self.blocks[:until]:
            x = block(x)
        if self.training:
            self.calls.add_(1)
            self.shift = self.shift + 0.01
        return x


class Encoder(nn.Module):
    """Encoder that subtracts a vector, which each training forward changes, and projects."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))
        self.project = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(torch.arange(DIM).to(self.mean), 0.01)
        return self.project(x - self.mean.to(x.dtype))


class Root(nn.Module):
    """Root module whose head is tied to the embedding and of which one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.body = Body()
        self.encoder = Encoder()
        self.head.weight = self.body.embed.weight
        self.get_submodule(FROZEN).requires_grad_(False)

    def forward(self, task: str, ids: Tensor, teacher: Teacher | None = None, learns: bool = True) -> Any:
        if task == "lower":
            return self.body(ids, 2)
        if task == "hidden":
            return self.body(ids)
        if task == "encoder":
            return self.encoder(self.body(ids, 3)[:, -1])
        hidden = self.body(ids)
        online = self.encoder(hidden[:, -1])
        logits = self.head(hidden[:, :-1]).float()
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum")
        if teacher is not None:
            target = teacher.forward("encoder", teacher.forward("body", ids)[:, -1])
            assert not target.requires_grad
            if learns:
                loss = loss + (online - target).float().square().sum()
        loss = loss + 0.1 * online.float().square().sum()
        return Output(loss / BATCH)


def make_root() -> Root:
    torch.manual_seed(5)
    return Root()


def copies(root: Root) -> TeacherModel:
    """Teacher of the lower two blocks with the embedding, and of the encoder, with values that differ from the student's."""
    body = copy.deepcopy(root.body)
    body.blocks = body.blocks[:2]
    model = TeacherModel({"body": body, "encoder": copy.deepcopy(root.encoder)})
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(dist.get_rank() + 1)
    return model


def whole_copy(root: Root) -> TeacherModel:
    """Teacher of everything; here the first name of the tied weight is another one."""
    return TeacherModel({name: child for name, child in copy.deepcopy(root).named_children()})


def make_engine(ranks: ParallelContext, name: str, precision: str, root: Root, micro: int = MICRO) -> Engine:
    """Build an engine; ``micro`` is the number of micro-batches in a step."""
    options = {"precision": precision, "clip_norm": 3.0, "accumulation": micro}
    return sharded(name, root, root.body.blocks, ("encoder",), ranks, OPTIM, **options)


def batches(step: int, micro: int, ranks: ParallelContext) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step % 7)
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    yield from ids.view(micro, ranks.world_size, -1, LENGTH)[:, ranks.rank]


PROBE = torch.arange(2 * LENGTH).view(2, LENGTH)


def train_step(engine: Engine, step: int, teacher: Teacher | None, learns: bool = True) -> list[float]:
    """Train one step and update the teacher; return the losses of the micro-batches and the gradient norm."""
    results = []
    for ids in batches(step, engine.options.accumulation, engine.ranks):
        loss = engine.forward("loss", ids, teacher, learns).total
        engine.backward(loss)
        results.append(loss.item())
    results.append(engine.step().item())
    if teacher is not None:
        teacher.update(step)
    return results


def whole(boxes: dict[str, ShardView]) -> dict[str, Tensor]:
    """Gather the whole tensors, and assert that each element exists and is equal on all ranks that hold it. Collective."""
    sizes = {name: of_name.shape.numel() for name, of_name in sorted(boxes.items())}
    high, low = (torch.full((sum(sizes.values()),), value, dtype=torch.float64) for value in (-torch.inf, torch.inf))
    for flat in (high, low):
        for name, part in zip(sizes, flat.split(list(sizes.values())), strict=True):
            for offset, box in boxes[name].parts:
                place = tuple(slice(at, at + n) for at, n in zip(offset, box.shape, strict=True))
                part.view(boxes[name].shape)[place] = box.detach().double()
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    assert torch.equal(high, low), "the ranks have different values, or nobody has one"
    parts = zip(sizes, high.split(list(sizes.values())), strict=True)
    return {name: part.view(boxes[name].shape) for name, part in parts}


def model_state(engine: Engine) -> dict[str, Tensor]:
    """Return the student's whole parameters and persistent buffers, by the teacher's names. Collective."""
    boxes = {name.removeprefix("model/"): b for name, b in engine.sharded_state().items() if name.startswith("model/")}
    found = whole(boxes)
    return found | {"body.embed.weight": found["head.weight"]}  # it has two


class Reference:
    """Reference teacher, dense and in fp64."""

    def __init__(
        self, model: TeacherModel, start: dict[str, Tensor], options: TeacherOptions, total_steps: int
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.options, self.total_steps = options, total_steps
        self._follow(start, 1.0)

    @torch.no_grad()
    def _follow(self, state: dict[str, Tensor], weight: float) -> None:
        for name, parameter in self.model.named_parameters():
            parameter += weight * (state[name] - parameter)

    def update(self, step: int, state: dict[str, Tensor]) -> None:
        """Update the EMA; ``state`` holds the student's whole parameters."""
        self._follow(state, 1.0 - momentum_at(step, self.options, self.total_steps))

    @torch.no_grad()
    def outputs(self, student: nn.Module, precision: str) -> list[Tensor]:
        """Outputs of both copies with the student's buffers; in bf16 the weights are rounded to it."""
        model = self.model
        if precision == "bf16":
            model = copy.deepcopy(model).bfloat16()
        buffers = dict(student.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        body = model("body", PROBE)
        return [body, model("encoder", body[:, 0])]
