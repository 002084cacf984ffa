"""What an objective is: views made in the loader, and a module that turns a micro-batch into a loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from jepa_scale.config.ema import TeacherOptions
from jepa_scale.config.schema import Section
from jepa_scale.data.sampling.rng import SampleRNG, ViewTransform
from jepa_scale.models.backbone import Backbone
from jepa_scale.models.flops import DecoderFlops
from jepa_scale.models.generation import Generated, Prompts, greedy
from jepa_scale.objectives.answers import AnswerGenerator, LanguageModelAnswerGenerator
from jepa_scale.objectives.costs import StepFlops
from jepa_scale.objectives.tasks import TASKS, Call, Task
from jepa_scale.packing import PackedBatch, Segment, Views
from jepa_scale.utils.errors import InputError


class Loss(NamedTuple):  # a tuple, because the engines look for tensors in what the root module returns
    """What one micro-batch of one rank adds to the global batch's loss.

    Attributes:
        total: 0-d float tensor with gradient. Summed over all ranks and micro-batches it *is* the loss, i.e. the
            objective has already divided by the global counts in ``batch.totals``.
        means: name → 0-d tensor, contributions of the same kind to logged values.
        gauges: name → 0-d tensor or number, values that are the same on every rank (a temperature, a gate); the last one is
            logged.
    """

    total: Tensor
    means: dict[str, Tensor] = {}
    gauges: Mapping[str, Tensor | float] = {}


class Diagnostics(Protocol):
    """Metrics of an objective's own on an evaluation split, always of the same samples and views."""

    representations: dict[str, Tensor]
    """What :meth:`measure` has looked at: name → (n, d) on the CPU, whole on every rank. Rows of the same number belong
    together where there are equally many."""

    @property
    def samples(self) -> int:
        """How many of the split to look at, evenly spread; 0 = all."""

    @property
    def views(self) -> ViewTransform:
        """Makes an example's views."""

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """As :meth:`Objective.view_tokens`, of these views."""

    def measure(self, batches: Iterable[PackedBatch]) -> dict[str, float]:
        """Metrics of one split from its micro-batches on this rank. Collective; the same on every rank."""


class TargetEncoder(Protocol):
    """An exponential moving average of parts of the model, as an objective sees it; :class:`jepa_scale.engines.ema.Teacher`."""

    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Run the average of the sub-module at ``path`` of :class:`JepaModel`, without gradient."""

    def momentum(self, step: int) -> float:
        """Momentum of the update after optimizer step ``step``, counted from 0."""


class Objective(nn.Module):
    """Base of every objective.

    A subclass declares its ``Options`` and its ``streams``, builds its heads in ``__init__(options, backbone, data)``,
    makes its views in :meth:`view_transform` and its loss in :meth:`loss`. Every head must be used on every rank in every
    step, with weight zero if need be, and parameters live in sub-modules: the collectives of ZeRO-3 and FSDP2 are issued
    by modules as they run.
    """

    Options: ClassVar[type[Section]] = Section
    streams: tuple[str, ...] = ("main",)
    needs_global_batch: bool = False
    """Whether the loss compares samples across micro-batches; then :meth:`gather` runs first on all of them."""
    pooling: ClassVar[Literal["mean", "last"]] = "mean"
    """Which of the states of :meth:`encode` stands for a text."""
    predicts_tokens: bool = True
    """Whether the model is trained to predict next tokens; if not, nobody asks for its perplexity or has it generate."""
    tap: int = 0
    """Number of the block after which the objective reads the decoder's states; 0 = it reads the last ones alone."""
    least_samples: int = 1
    """Fewer samples in an optimizer step, over all ranks, say nothing to the loss."""
    own_tasks: ClassVar[tuple[str, ...]] = ()
    """Names of further tasks, beside :data:`jepa_scale.objectives.tasks.TASKS`: methods that the objective's own answerer or
    diagnostics call through the engine. Each takes the backbone first."""
    teacher: TargetEncoder
    """The EMA teacher, set before the first forward if :meth:`teacher_copies` gives something to teach with."""

    @property
    def blocks(self) -> list[nn.Module]:
        """Modules of the objective that an engine may gather and free one at a time, as it does the decoder's blocks."""
        return []

    def teacher_copies(self, backbone: Backbone) -> dict[str, nn.Module]:
        """Copies of what has an EMA teacher, by their names in :class:`JepaModel`; called while the weights are whole."""
        return {}

    def teacher_options(self) -> TeacherOptions:
        """How the teacher follows; asked for only if there is one."""
        raise NotImplementedError

    def head_prefixes(self, backbone: Backbone) -> tuple[str, ...]:
        """Names in :class:`JepaModel` of what learns at ``optim.lr_head``."""
        return ("objective.",)

    def clip_groups(self, model: JepaModel) -> dict[str, list[str]]:
        """Name of a group → its parameters' names in the model, when gradients are clipped by group; {} = all together."""
        return {}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Name in :class:`JepaModel` of a parameter → least and greatest value of its elements; see
        :attr:`jepa_scale.engines.base.EngineOptions.bounds`."""
        return {}

    def on_optimizer_step(self, step: int, grad_norm: Tensor) -> None:
        """An optimizer step is done, and the teacher has not followed yet: where buffers take in what the step has seen, which
        must be the same on every rank. Collective.

        Args:
            step: its number, from 0.
            grad_norm: 0-d, not finite if nothing was updated; the device knows, the host is not to ask it.
        """

    def view_transform(self) -> ViewTransform:
        """Example → views; returned as an object of its own because loader workers get a copy of it."""
        raise NotImplementedError

    def view_tokens(self, sizes: np.ndarray) -> np.ndarray:
        """(m,) tokens of examples → (m,) tokens that all of an example's views take at most. Token budgets need it.

        Raises:
            InputError: the objective does not know.
        """
        raise InputError("train.batch_tokens: this objective's batches are counted in samples; give train.batch_size")

    def flops(self, backbone: Backbone, square: bool = False) -> StepFlops:
        """What training on an optimizer step's micro-batches costs a rank, a collecting pass and a teacher included.

        Called once, while the weights are whole. As it stands here: all streams through the whole decoder and the LM head on
        the labelled places, and where the objective collects, the same once more without head and gradient. Heads, a
        teacher and products within the loss are an objective's own to add.

        Args:
            square: as for :meth:`jepa_scale.models.flops.DecoderFlops.forward`.
        """
        decoder, names, needs_global_batch = DecoderFlops.of(backbone), self.streams, self.needs_global_batch

        def count(batches: Sequence[PackedBatch]) -> int:
            streams = [batch.streams[name] for batch in batches for name in names]
            total = sum(decoder.of_stream(stream, training=True, square=square) for stream in streams)
            if needs_global_batch and len(batches) > 1:
                total += sum(decoder.of_stream(stream, training=False, rows=0, square=square) for stream in streams)
            return total

        return count

    def kind_of_step(self, step: int, seed: int) -> Hashable:
        """Steps of the same kind cost the same, but for the lengths of their samples."""
        return 0

    def loss(self, backbone: Backbone, batch: PackedBatch, gathered: list[dict[str, Tensor]], micro: int) -> Loss:
        """Loss of micro-batch number ``micro`` of an optimizer step.

        ``gathered`` holds what :meth:`gather` returned for each micro-batch of the step, this one included; it is empty
        when there is one micro-batch or when the objective does not collect.
        """
        raise NotImplementedError

    def gather(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """What the other micro-batches need to know of this one; called without gradient, on every rank."""
        raise NotImplementedError

    def answer_generator(self, call: Call) -> AnswerGenerator:
        """How this objective's model answers questions at evaluation. ``call(task, *args)`` runs the task of that name
        through the engine without gradient, on all ranks together."""
        return LanguageModelAnswerGenerator(call)

    def text_views(self, example: Any, draw: SampleRNG) -> Views:
        """A text to be encoded → one segment of the stream ``"main"`` with role ``"text"``, of no more tokens than the text has.
        As it stands here, of all of them.

        Args:
            example: has ``tokens``, (n,) ids, n ≥ 1, BOS first where that is the tokenizer's habit. It has no EOS: next-token
                prediction never reads the one that closes a document.
        """
        return Views([Segment(example.tokens, "text")])

    def most_text_tokens(self, backbone: Backbone) -> int | None:
        """Tokens of the longest text that :meth:`text_views` may be given; None = there is no limit."""
        return getattr(backbone.decoder.config, "max_position_embeddings", None)

    def encode(self, backbone: Backbone, batch: PackedBatch) -> dict[str, Tensor]:
        """States of the stream ``"main"`` after the final norm, fp32, in its order: ``tokens`` (T, d), ``last`` (S, d) at each
        segment's last token, ``mean`` (S, d) over each segment. Rows come back to the order of the texts by
        ``batch.segments["text"]`` and ``batch.samples["text"]``."""
        stream = batch.streams["main"]
        states = backbone.hidden(stream).float()
        lengths = stream.table.cu_seqlens.diff().long()
        mean = torch.segment_reduce(states, "mean", lengths=lengths, axis=0)
        return {"tokens": states, "last": states[stream.last], "mean": mean}

    def diagnostics(self, call: Call) -> Diagnostics | None:
        """What else an evaluation on text looks at, beside the perplexity."""
        return None

    def diagnose(self, backbone: Backbone, batch: PackedBatch) -> Any:
        """Compute what the objective's :meth:`diagnostics` need of a micro-batch: tensors, in a tuple or dict."""
        raise NotImplementedError

    def next_token_logits(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """(S, V) fp32, the logits after each segment of the stream ``"main"``."""
        stream = batch.streams["main"]
        return backbone.logits(backbone.hidden(stream)[stream.last]).float()

    def label_log_probs(self, backbone: Backbone, batch: PackedBatch) -> Tensor:
        """(L,) fp32, the log-probability of each label of the stream ``"main"``, in stream order."""
        stream = batch.streams["main"]
        return -backbone.label_losses(backbone.hidden(stream)[stream.labelled], stream.labels[stream.labelled])

    def generate(self, backbone: Backbone, prompts: Prompts, stop: tuple[int, ...], new_tokens: int) -> Generated:
        """Greedy answers of the decoder, of ``new_tokens`` tokens at most; see :func:`jepa_scale.models.generation.greedy`."""
        with backbone.unpacked() as decoder:
            return greedy(decoder, prompts, stop, new_tokens)


class JepaModel(nn.Module):
    """The root module that an engine shards: a backbone and an objective's heads.

    Whatever runs parameters goes through :meth:`forward`, so that the engine's hooks see it.
    """

    def __init__(self, backbone: Backbone, objective: Objective):
        super().__init__()
        self.backbone = backbone
        self.objective = objective

    def forward(self, task: Task, *args: Any, **kwargs: Any) -> Any:
        """Run the objective's method ``task`` on the backbone and the arguments."""
        own = self.objective.own_tasks
        assert task in TASKS or task in own, (
            f"{task!r} is no task of {type(self.objective).__name__}; there are {', '.join(sorted({*TASKS, *own}))}"
        )
        return getattr(self.objective, task)(self.backbone, *args, **kwargs)


def lm_loss(backbone: Backbone, hidden: Tensor, batch: PackedBatch, stream: str = "main") -> Tensor:
    """Next-token loss of a stream as a contribution to the mean over the global batch's labels. hidden (T, d) → 0-d."""
    packed = batch.streams[stream]
    losses = backbone.label_losses(hidden[packed.labelled], packed.labels[packed.labelled])
    return mean_over_global_batch(losses.sum(), batch.totals["labels"])


def mean_over_global_batch(value: Tensor, total: Tensor) -> Tensor:
    """A sum over this micro-batch as its contribution to the mean over the global batch (0 if the batch has none)."""
    return value / torch.clamp(total.to(value.dtype), min=1)


def resolve_tap(tap: int, num_layers: int, key: str) -> int:
    """``tap`` as a number of blocks from 1 to ``num_layers``; −1 is after the last block, −2 after the one before.

    Raises:
        InputError: names ``key`` when there is no such block.
    """
    resolved = tap if tap > 0 else num_layers + 1 + tap
    if tap == 0 or not 1 <= resolved <= num_layers:
        raise InputError(f"{key}: {tap} is outside the decoder's {num_layers} blocks")
    return resolved
