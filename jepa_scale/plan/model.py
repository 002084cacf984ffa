"""The config's model and objective on the ``meta`` device: all but the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jepa_scale.config.schema import OptimConfig
from jepa_scale.engines.ema import TeacherModel
from jepa_scale.experiment import Experiment
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.frozen.four_bit import PlannedFourBitLinear, coded_size, frozen_layers, replace_layers
from jepa_scale.models.loading import build_backbone
from jepa_scale.objectives.base import JepaModel, Objective
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.optim import parameter_groups
from jepa_scale.optim.groups import MOMENTS
from jepa_scale.plan.layout import Layout
from jepa_scale.plan.tensor_parallel import cut_for_rank


@dataclass(frozen=True, slots=True)
class Sizes:
    """A trainable or frozen parameter as it is on one tp rank.

    Attributes:
        shape: of the rank's part. moments: tensors of its shape that the optimizer keeps. group: number of its group.
    """

    shape: tuple[int, ...]
    trains: bool
    moments: int
    group: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(slots=True)
class Modelled:
    """The model of one tp rank, in the compute dtype, without values.

    Attributes:
        parameters: name → sizes; a tied one once, as in ``module.named_parameters()``.
        whole: parameters of the model, tp or not; taught: of the teacher's copies; largest, largest_trained: elements of the
            largest parameter, and of the largest that is trained, tp or not.
        coded: bytes of the weights in 4 bits, which are no parameters, and whole on every rank.
        flops: of the whole model: micro-batches of a data-parallel rank → FLOPs of training on them, all its tp ranks
            together.
    """

    module: JepaModel
    teacher: TeacherModel | None
    parameters: Mapping[str, Sizes]
    whole: int
    taught: int
    largest: int
    largest_trained: int
    coded: int
    flops: StepFlops

    @property
    def objective(self) -> Objective:
        return self.module.objective

    @property
    def backbone(self) -> Backbone:
        return self.module.backbone

    @property
    def shard(self) -> list[nn.Module]:
        """The units that an engine gathers and frees one at a time."""
        return [*self.backbone.layers, *self.objective.blocks]

    @property
    def teacher_shard(self) -> list[nn.Module]:
        """The same units of the teacher's copy, as far as it has them."""
        if self.teacher is None:
            return []
        students, sharded = dict(self.module.named_modules()), {id(part) for part in self.shard}
        return [
            part
            for name, part in self.teacher.named_modules()
            if name in students and id(students[name]) in sharded and type(part).forward is not nn.Module.forward
        ]

    @property
    def logits_width(self) -> int:
        head = self.backbone.decoder.get_output_embeddings()
        return int(head.weight.shape[0])


def model_on_meta(experiment: Experiment, data: Any, layout: Layout) -> Modelled:
    """Build the model of :func:`jepa_scale.training.build.build`, as it is on rank 0 of each group.

    Raises:
        InputError: the model, the objective or the layout does not fit the others.
    """
    with torch.device("meta"):
        backbone = build_backbone(experiment.model, data.vocab_size)
        objective = experiment.objective.build(backbone, data)
    module = JepaModel(backbone, objective).to("meta")
    flops = objective.flops(backbone)
    whole = sum(parameter.numel() for parameter in module.parameters())
    largest = max(parameter.numel() for parameter in module.parameters())
    largest_trained = max(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    taught = sum(p.numel() for copied in objective.teacher_copies(backbone).values() for p in copied.parameters())
    coded = 0
    if experiment.model.load_in_4bit:
        coded = sum(coded_size(layer.weight.numel()) for _, layer in frozen_layers(backbone))
        replace_layers(backbone, lambda _, layer: PlannedFourBitLinear(layer))
    if layout.tp > 1:
        cut_for_rank(backbone, layout.tp)
    copies = objective.teacher_copies(backbone)
    teacher = TeacherModel({path: copied.to("meta") for path, copied in copies.items()}) if copies else None
    moments, groups = _optimized(module, experiment.optim, objective, backbone)
    parameters = {
        name: Sizes(tuple(p.shape), p.requires_grad, moments.get(name, 0), groups.get(name, -1))
        for name, p in module.named_parameters()
    }
    if layout.precision != "fp32":
        module.to(layout.dtype)
        if teacher is not None:
            teacher.to(layout.dtype)
    module.train()
    if teacher is not None:
        teacher.requires_grad_(False).eval()
    return Modelled(module, teacher, parameters, whole, taught, largest, largest_trained, coded, flops)


def _optimized(
    module: JepaModel, optim: OptimConfig, objective: Objective, backbone: Backbone
) -> tuple[dict[str, int], dict[str, int]]:
    """Return name of each trainable parameter → moments that the optimizer keeps of it, and the number of its group."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    moments, groups = {}, {}
    for number, group in enumerate(parameter_groups(module, optim, objective.head_prefixes(backbone))):
        for parameter in group["params"]:
            moments[names[parameter]] = len(MOMENTS[group["method"]])
            groups[names[parameter]] = number
    return moments, groups


def fuse_norms(module: nn.Module) -> None:
    """Replace RMSNorm by the fused kernel of a GPU, which keeps its input and one value per row for the backward pass.

    A CPU keeps the result of every operation.
    """
    for part in module.modules():
        if isinstance(part, nn.RMSNorm):
            part.forward = _fused_forward(part)  # type: ignore[method-assign,assignment]


def _fused_forward(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, norm.weight)

    return forward


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return grads[0] * x, torch.empty_like(weight)
