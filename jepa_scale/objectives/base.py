"""Base class of objectives: the loader makes the views, and a module turns a micro-batch into a loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.distributed.comm import all_reduce_sum
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.families.router_loss import NAME as ROUTER_LOSS
from jepa_scale.models.families.router_loss import RouterLoss
from jepa_scale.models.flops import DecoderFlops
from jepa_scale.models.generation.batches import Ended, Generated, Prompts, greedy
from jepa_scale.models.generation.speculative import Drafter
from jepa_scale.objectives.answers import AnswerGenerator, LanguageModelAnswerGenerator
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.objectives.exports import Exports
from jepa_scale.objectives.tasks import TASKS, Call, Task
from jepa_scale.packing import PackedBatch, Segment, Views
from jepa_scale.utils.errors import InputError

DECODER = "backbone.decoder."
"""Prefix of the decoder's parameters in :class:`JepaModel`."""
ROUTERS = "router_choices"
"""Name of the routers' choices among the tensors of a gather pass."""


class Loss(NamedTuple):  # a tuple, because the engines search the root module's output for tensors
    """Contribution of one rank's micro-batch to the global batch's loss.

    Attributes:
        total: 0-d float tensor with gradient. Its sum over all ranks and micro-batches is the loss: the objective has
            already divided by the global counts in ``batch.totals``.
        means: name → 0-d tensor, contributions to logged values; they are summed like ``total``, which is logged as ``loss``.
        gauges: name → 0-d tensor or number, values that are the same on every rank (a temperature, a gate); the last one is
            logged.
    """

    total: Tensor
    means: dict[str, Tensor] = {}
    gauges: Mapping[str, Tensor | float] = {}


class Diagnostics(Protocol):
    """Metrics of one objective on an evaluation split, computed from the same samples and views every time."""

    representations: dict[str, Tensor]
    """The states that :meth:`measure` used: name → (n, d) on the CPU, complete on every rank. If two tensors have equally
    many rows, row i of both belongs to the same sample."""

    @property
    def samples(self) -> int:
        """Number of samples of the split to use, evenly spread; 0 = all."""

    @property
    def views(self) -> ViewTransform:
        """The transform that makes an example's views."""

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens of these views; see :meth:`Objective.view_tokens`."""

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        """Return the metrics of one split, given its micro-batches on this rank. Collective; the same on every rank."""


@dataclass(slots=True)
class BaseDiagnostics:
    """Base of this package's :class:`Diagnostics`; ``call("diagnose", batch)`` returns the rows of a micro-batch."""

    call: Call
    samples: int
    views: Any
    view_tokens: Callable[[np.ndarray], np.ndarray]
    representations: dict[str, Tensor] = field(default_factory=dict, init=False)


class TargetEncoder(Protocol):
    """Interface through which an objective uses its EMA teacher; :class:`jepa_scale.engines.ema.Teacher` implements it."""

    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run the EMA copy of the sub-module at ``path`` of :class:`JepaModel`, without gradient."""

    def momentum(self, step: int) -> float:
        """Return the momentum of the update after optimizer step ``step``, counted from 0."""


class Objective(nn.Module):
    """Base of every objective.

    A subclass declares its ``Options`` and its ``sequences``, builds its heads in ``__init__(options, backbone, data)``,
    makes its views in :meth:`view_transform` and its loss in :meth:`loss`. Every head must be used on every rank in every
    step, with weight zero if need be. Parameters must belong to sub-modules. Both are needed because ZeRO-3 and FSDP2 issue
    their collectives when a module runs.
    """

    Options: ClassVar[type[Section]] = Section
    sequences: tuple[str, ...] = ("main",)
    """Names of the packed sequences that hold the segments of its views."""
    needs_global_batch: bool = False
    """Whether the loss compares samples across micro-batches. If so, :meth:`gather` runs on all of them first."""
    pooling: ClassVar[Literal["mean", "last"]] = "mean"
    """The pooled state of :meth:`encode` that represents a text."""
    predicts_tokens: bool = True
    """Whether the model is trained to predict next tokens. If not, evaluation skips perplexity and generation."""
    tap: int = 0
    """Number of the block after which the objective reads the decoder's states; 0 = it reads only the final states."""
    least_samples: int = 1
    """Fewest samples in an optimizer step, over all ranks, for which the loss is meaningful."""
    own_tasks: ClassVar[tuple[str, ...]] = ()
    """Names of further tasks, beside :data:`jepa_scale.objectives.tasks.TASKS`: methods that the objective's answer
    generator or diagnostics call through the engine. The first argument of each is the backbone."""
    balances_routers: bool = False
    """Whether the routers' balance loss of a mixture of experts is added to this objective's. It counts choices over the global
    batch, so that steps of several micro-batches have a gather pass."""
    padded: bool = False
    """Whether the backbone runs segments in padded rows, so that samples of near sizes share a micro-batch."""
    teacher: TargetEncoder
    """The EMA teacher, set before the first forward if :meth:`teacher_copies` is not empty."""

    @classmethod
    def exports(cls, options: Section) -> Exports:
        """Return the forms in which a model with these options can be exported. Nothing is built for it.

        By default it is a causal language model if next-token prediction is trained, and a sentence encoder if texts are encoded as
        this base class does. An objective whose answers need its heads says so here.
        """
        trained = cls.predicts_tokens and getattr(options, "lm_weight", 1) > 0
        plain = all(getattr(cls, n) is getattr(Objective, n) for n in ("text_views", "encode", "most_text_tokens"))
        reason = "" if trained else "trains no next-token prediction"
        if not plain:
            reason += f"{' and ' if reason else ''}encodes texts in a way of its own"
        return Exports(trained, plain, reason)

    @property
    def blocks(self) -> list[nn.Module]:
        """Modules of the objective that an engine may gather and free one at a time, like the decoder's blocks."""
        return []

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Return copies of the modules with an EMA teacher, by their names in :class:`JepaModel`.

        Called before the weights are sharded.
        """
        return {}

    def teacher_options(self) -> TeacherOptions:
        """Return the options of the EMA update; called only if there is a teacher."""
        raise NotImplementedError

    def head_prefixes(self, backbone: Backbone) -> tuple[str, ...]:
        """Return the name prefixes in :class:`JepaModel` of the parameters with learning rate ``optim.lr_head``."""
        return ("objective.",)

    @property
    def detached(self) -> bool:
        """Whether an option ``detach`` makes this the control, whose heads give the decoder no gradient."""
        return bool(getattr(getattr(self, "options", None), "detach", False))

    def clip_groups(self, model: JepaModel) -> dict[str, list[str]]:
        """Return the groups for gradient clipping: group name → names of its parameters; {} = one group of all.

        The heads of a control are a group of their own: so that their gradient does not change how much of the decoder's is clipped.
        """
        if not self.detached:
            return {}
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        heads = [name for name in names if name.startswith("objective.")]
        return {"decoder": [name for name in names if name not in set(heads)], "heads": heads}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Bounds of parameters: name in :class:`JepaModel` → least and greatest value of the elements; see
        :attr:`jepa_scale.engines.base.EngineOptions.bounds`."""
        return {}

    def on_optimizer_step(self, step: int, grad_norm: Tensor) -> None:
        """Update buffers after an optimizer step, before the teacher's EMA update. Collective.

        The buffers must be the same on every rank afterwards.

        Args:
            step: number of the optimizer step, from 0.
            grad_norm: 0-d on the device, not finite if nothing was updated. Do not read it on the host: that would
                synchronize.
        """

    def view_transform(self) -> ViewTransform:
        """Return the transform from an example to its views. It is a separate object because loader workers copy it."""
        raise NotImplementedError

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the most tokens, (m,), that all views of each example take together; ``sizes`` (m,) are its own tokens.

        Token budgets need it.

        Raises:
            InputError: the objective cannot bound them.
        """
        raise InputError(
            "train.batch_tokens: this objective has no view_tokens, so its batches are counted in samples; give train.batch_size"
        )

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """Return a function that counts one rank's FLOPs for an optimizer step's micro-batches.

        The count includes the gather pass and the teacher. Called once, before the weights are sharded. The base class
        counts all sequences through the whole decoder and the LM head at the labelled positions. If the objective needs the
        global batch, it counts a second pass without head and gradient. Subclasses add heads, a teacher and the products
        within the loss.

        Args:
            square: as for :meth:`jepa_scale.models.flops.DecoderFlops.count`.
        """
        decoder, names, needs_global_batch = DecoderFlops.of(backbone), self.sequences, self.needs_global_batch

        def count(batches: Sequence[PackedBatch]) -> int:
            sequences = [batch.sequences[name] for batch in batches for name in names]
            total = sum(decoder.of_sequence(packed, training=True, square=square) for packed in sequences)
            if needs_global_batch and len(batches) > 1:
                total += sum(decoder.of_sequence(packed, training=False, rows=0, square=square) for packed in sequences)
            return total

        return count

    def kind_of_step(self, step: int, seed: int) -> Hashable:
        """Return the kind of a step: steps of one kind take the same time, apart from the lengths of their samples."""
        return 0

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        """Return the loss of micro-batch number ``micro`` of an optimizer step.

        ``gathered`` holds the results of :meth:`gather` for each micro-batch of the step, including this one. It is empty
        when there is one micro-batch or when the objective does not need the global batch.
        """
        raise NotImplementedError

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the tensors of this micro-batch that the losses of the others need. Called without gradient, on every rank."""
        raise NotImplementedError

    def answer_generator(self, call: Call) -> AnswerGenerator:
        """Return the generator of this objective's answers at evaluation.

        ``call(task, *args)`` runs the task of that name through the engine without gradient, on all ranks together.
        """
        return LanguageModelAnswerGenerator(call)

    def text_views(self, example: Any, draw: SampleRNG) -> Views:
        """Return the view of a text to be encoded: one segment of the sequence ``"main"`` with role ``"text"``.

        The segment has at most as many tokens as the text; the base class takes all of them.

        Args:
            example: has ``tokens``, (n,) ids, n ≥ 1, with BOS first if the tokenizer adds it. It has no EOS: next-token
                prediction never has a document's closing EOS as input.
        """
        return Views([Segment(example.tokens, "text")])

    def most_text_tokens(self, backbone: Backbone) -> int | None:
        """Return the number of tokens of the longest text that :meth:`text_views` accepts; None = no limit."""
        return backbone.position_limit

    def encode(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the states of the sequence ``"main"`` after the final norm, fp32, in packed order.

        ``tokens`` (T, d) are all states, ``last`` (S, d) those at each segment's last token, ``mean`` (S, d) the mean over
        each segment. ``batch.segments["text"]`` and ``batch.samples["text"]`` map the rows to the order of the texts.
        """
        packed = batch.sequences["main"]
        states = backbone.hidden(packed).float()
        lengths = packed.table.cu_seqlens.diff().long()
        mean = torch.segment_reduce(states, "mean", lengths=lengths, axis=0)
        return {"tokens": states, "last": states[packed.last], "mean": mean}

    def diagnostics(self, call: Call) -> Diagnostics | None:
        """Return the objective's own metrics for an evaluation on text, beside the perplexity; None = there are none."""
        return None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> Any:
        """Return the tensors of a micro-batch that the objective's :meth:`diagnostics` need, in a tuple or dict."""
        raise NotImplementedError

    def next_token_logits(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """Return the logits after each segment of the sequence ``"main"``, (S, V) fp32."""
        packed = batch.sequences["main"]
        return backbone.logits(backbone.hidden(packed)[packed.last]).float()

    def label_log_probs(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """Return the log-probability of each label of the sequence ``"main"``, (L,) fp32, in packed order."""
        packed = batch.sequences["main"]
        return -backbone.label_losses(backbone.hidden(packed)[packed.labelled], packed.labels[packed.labelled])

    def label_matches(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """Return whether each label of the sequence ``"main"`` is the likeliest token, (L,) bool, in packed order."""
        packed = batch.sequences["main"]
        return (
            backbone.logits(backbone.hidden(packed)[packed.labelled]).argmax(dim=-1) == packed.labels[packed.labelled]
        )

    def label_scores(self, backbone: Backbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return :meth:`label_log_probs` and :meth:`label_matches` from one forward of the decoder."""
        packed = batch.sequences["main"]
        states, labels = backbone.hidden(packed)[packed.labelled], packed.labels[packed.labelled]
        return -backbone.label_losses(states, labels), backbone.logits(states).argmax(dim=-1) == labels

    def drafter(self, backbone: Backbone) -> Drafter | None:
        """Return a head that drafts tokens for :func:`jepa_scale.models.generation.speculative.generate`; None = it has none."""
        return None

    def generate(
        self, backbone: Backbone, prompts: Prompts, stop: tuple[int, ...], new_tokens: int, ended: Ended | None = None
    ) -> Generated:
        """Decode answers greedily, of at most ``new_tokens`` tokens; see :func:`jepa_scale.models.generation.batches.greedy`."""
        with backbone.unpacked() as decoder:
            return greedy(decoder, prompts, stop, new_tokens, ended)


class JepaModel(nn.Module):
    """The root module that an engine shards: a backbone and an objective's heads.

    Every use of parameters goes through :meth:`forward`, so that the engine's hooks run.
    """

    def __init__(self, backbone: Backbone, objective: Objective):
        super().__init__()
        self.backbone = backbone
        self.objective = objective
        objective.balances_routers, objective.padded = backbone.router_loss is not None, backbone.padded

    def forward(self, task: Task, *args: Any, **kwargs: Any) -> Any:
        """Run the objective's method ``task`` on the backbone and the arguments."""
        own = self.objective.own_tasks
        assert task in TASKS or task in own, (
            f"{task!r} is no task of {type(self.objective).__name__}; there are {', '.join(sorted({*TASKS, *own}))}"
        )
        if self.backbone.router_loss is not None and task in ("gather", "loss"):
            return getattr(self, f"_balanced_{task}")(self.backbone.router_loss, *args, **kwargs)
        return getattr(self.objective, task)(self.backbone, *args, **kwargs)

    def _balanced_gather(self, balance: RouterLoss, batch: PackedBatch) -> dict[str, Tensor]:
        """Return the objective's tensors, if it gathers any, and the routers' choices in the forwards of its loss."""
        own = self.objective.gather(self.backbone, batch) if self.objective.needs_global_batch else {}
        with self.backbone.routers_recorded() as logits:
            self.objective.loss(self.backbone, batch, [], 0)
        return {**own, ROUTERS: balance.counts(logits)}

    def _balanced_loss(
        self, balance: RouterLoss, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int
    ) -> Loss:
        """Return the objective's loss with the routers' balance loss over the global batch."""
        with self.backbone.routers_recorded() as logits:
            loss = self.objective.loss(
                self.backbone, batch, gathered if self.objective.needs_global_batch else [], micro
            )
        counts = torch.stack([each[ROUTERS] for each in gathered]).sum(dim=0) if gathered else balance.counts(logits)
        share = balance.share(logits, all_reduce_sum(counts))
        total = loss.total + balance.coefficient * share
        return Loss(total, {**loss.means, "loss": total.detach(), ROUTER_LOSS: share.detach()}, loss.gauges)


def lm_loss(backbone: Backbone, hidden: Tensor, batch: PackedBatch, sequence: str = "main") -> Tensor:
    """Return a packed sequence's next-token loss as its contribution to the mean over the global batch's labels.

    hidden (T, d) → 0-d.
    """
    packed = batch.sequences[sequence]
    total, *_ = backbone.label_loss(hidden.index_select(0, packed.labelled), packed.labels[packed.labelled])
    return mean_over_global_batch(total, batch.totals["labels"])


def mean_over_global_batch(value: Tensor, total: Tensor) -> Tensor:
    """Return a micro-batch's sum as its contribution to the mean over the global batch (0 if ``total`` is 0)."""
    return value / torch.clamp(total.to(value.dtype), min=1)


def resolve_tap(tap: int, num_layers: int, key: str) -> int:
    """Return ``tap`` as a number of blocks from 1 to ``num_layers``; −1 is after the last block, −2 after the one before.

    Raises:
        InputError: names ``key`` when there is no such block.
    """
    resolved = tap if tap > 0 else num_layers + 1 + tap
    if tap == 0 or not 1 <= resolved <= num_layers:
        raise InputError(f"{key}: {tap} is outside the decoder's {num_layers} blocks")
    return resolved
