"""A probe before the first step: does a decoder of transformers compute on packed segments what it computes on each alone?

Whether a family can run packed is not written anywhere: a layer may read across segments (a convolution, a recurrence), make a
mask of its own, or not pass the segments on. So two random segments run once as in training, packed with this package's attention
or in padded rows, and once alone, with the family's own attention in plain operations (``eager``) where it can be chosen. Every
block's output and the logits must agree, and so must every block's sliding window, which is longer than these segments.

They are compared in fp32 on the host, where rounding hides nothing, and then on the run's device in its dtype, where other kernels
run. Only the second is done where the family's kernels do not run on the host. As rounding could hide there that a token sees
the segment before its own, the packed segments run once more with other tokens in the first: the states of the second must stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils

from jepa_scale.models.attention.packed import NAME as PACKED
from jepa_scale.models.attention.packed import packed_attention, window_of
from jepa_scale.models.backbone import Backbone
from jepa_scale.packing import PackedSequence, Segment, pack_sequence
from jepa_scale.utils.errors import InputError, one_line

LENGTHS = (9, 6)
"""Tokens of the two segments."""
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.1
"""Largest mean over a segment's tokens of ‖packed − alone‖ / ‖alone‖ in fp32 on the host, and on the run's device in its dtype
(fp32 products may be computed in TF32 there)."""
ROUNDINGS = 4
"""Largest ‖difference‖ / ‖state‖ that other tokens in the first segment may make in the first block that they change at all, in units
of the dtype's rounding, but at least :data:`SMALL`: kernels choose their order of sums by all tokens, as those of a mixture's experts
do."""
SMALL = 1e-5
HOST = torch.device("cpu")
ALONE = "alone"


@dataclass(slots=True)
class _Seen:
    """What a forward computed.

    Attributes:
        states: each block's output, and the logits, as rows of one segment after the other, fp32 on the CPU.
        windows: number of a block → sliding windows of its attention layers, None for full attention.
    """

    states: list[Tensor] = field(default_factory=list)
    windows: dict[int, set[int | None]] = field(default_factory=dict)
    block: int = 0


class _Refusal(InputError):
    """Says what is wrong with a family, without what to do."""


class _NoReference(_Refusal):
    """A family cannot run on each segment alone."""


def probe(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a decoder of transformers computes the same for packed or padded segments and for each segment alone.

    The decoder keeps its weights, device, dtype and modes, and torch's global generator its state. On the device there are at most
    one block, the embedding and the LM head at a time. A forward of 18 tokens and one of 15, on the host and on the device, where packed
    segments run twice.

    Args:
        backbone: with all its weights: call it before they are sharded.
        device, dtype: those in which the run computes.

    Raises:
        InputError: the results differ, in the named block, or a forward fails. The message names ``model.packing: padded`` if the
            family computes the same in padded rows.
    """
    try:
        _check(backbone, device, dtype)
    except _Refusal as refusal:
        way = _OTHER_FAMILY if backbone.padded else way_out(backbone.decoder, device, dtype)
        raise InputError(f"{refusal}; {way}") from refusal.__cause__


def _check(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
    """Compare in fp32 on the host and, where a run computes otherwise, as it does.

    A kernel may run on a device alone, or in half precision alone. The host can then compare nothing, and only the run's device does.
    """
    otherwise = (device.type, dtype) != (HOST.type, torch.float32)
    try:
        _probe(backbone, HOST, torch.float32, TOLERANCE)
    except _NoReference:
        if not otherwise:
            raise
    if otherwise:
        _probe(backbone, device, dtype, ROUNDED_TOLERANCE)


_OTHER_FAMILY = "choose another family"


def way_out(decoder: PreTrainedModel, device: torch.device = HOST, dtype: torch.dtype = torch.float32) -> str:
    """Return what to do about a decoder that cannot run packed, as the end of a message. It can no longer be used packed.

    Padded rows are the way if they pass the probe. Without weights, on the ``meta`` device, they may be.
    """
    try:
        backbone = Backbone(decoder, padded=True)
        if any(parameter.is_meta for parameter in decoder.parameters()):
            return "try model.packing: padded"
        decoder.set_attn_implementation("sdpa" if decoder._supports_sdpa else "eager")
        _check(backbone, device, dtype)
    except InputError:
        return _OTHER_FAMILY
    return "set model.packing: padded"


@torch.no_grad()
def _probe(backbone: Backbone, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    decoder, name = backbone.decoder, type(backbone.decoder).__name__
    where = "in padded rows" if backbone.padded else "on packed segments"
    limit = getattr(decoder.config, "max_position_embeddings", None) or max(LENGTHS)
    lengths = [min(length, limit) for length in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, backbone.vocab_size, (len(lengths), max(lengths)), generator=generator)
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.eval()
    try:
        with placed(backbone, device, dtype):
            alone = _attempt(name, ALONE, lambda: _alone(backbone, rows.to(device), lengths))
            run = _padded if backbone.padded else _packed
            together = _attempt(name, where, lambda: run(backbone, rows, lengths, device))
            changed = together
            if tolerance == ROUNDED_TOLERANCE and not backbone.padded:
                rows[0] = (rows[0] + 1) % backbone.vocab_size
                changed = _attempt(name, where, lambda: run(backbone, rows, lengths, device))
    finally:
        for module, mode in modes:
            module.training = mode
    _compare(name, where, alone, together, lengths, tolerance, limit)
    _compare_second(name, together, changed, lengths, max(ROUNDINGS * torch.finfo(dtype).eps, SMALL))


def _attempt(name: str, where: str, run: Any) -> _Seen:
    kind = _NoReference if where == ALONE else _Refusal
    try:
        seen = run()
    except torch.OutOfMemoryError:
        raise
    except InputError as error:
        raise kind(str(error).removesuffix(f"; {_OTHER_FAMILY}")) from error
    except Exception as error:  # whatever a family's code raises on input that it was not made for
        raise kind(f"model: {name} cannot run {where} ({one_line(error)})") from error
    assert isinstance(seen, _Seen)
    return seen


def _compare(
    name: str, where: str, alone: _Seen, together: _Seen, lengths: list[int], tolerance: float, limit: int
) -> None:
    blocks = len(alone.states) - 1
    for number in range(blocks + 1):
        place = _place(number + 1, blocks)
        wanted, used = alone.windows.get(number), together.windows.get(number)
        if wanted and used and _effective(wanted, limit) != _effective(used, limit):
            raise _Refusal(
                f"model: {name} has a sliding window of {_text(wanted)} tokens in {place}, and {_text(used)} {where}"
            )
        pairs = zip(alone.states[number].split(lengths), together.states[number].split(lengths), strict=True)
        errors = [float(((b - a).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-30)).mean()) for a, b in pairs]
        worst = max(errors, key=lambda error: error if error == error else float("inf"))
        if not worst <= tolerance:
            raise _Refusal(
                f"model: {name} does not compute {where} what it computes on each alone: {place} is the first to differ, "
                f"by {worst:.2g} of its norm ({tolerance:g} is allowed)"
            )


def _compare_second(name: str, together: _Seen, changed: _Seen, lengths: list[int], tolerance: float) -> None:
    """Compare the states of the second segment in the first block where they differ: what follows may grow from rounding."""
    blocks = len(together.states) - 1
    for number, states in enumerate(zip(together.states, changed.states, strict=True), 1):
        before, after = (x.split(lengths)[1] for x in states)
        error = float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)).max())
        if error > tolerance:
            raise _Refusal(
                f"model: {name} lets a token of packed segments see the segment before its own: {_place(number, blocks)} differs by "
                f"{error:.2g} of its norm with other tokens there ({tolerance:.2g} is allowed)"
            )
        if error:
            return


def _place(number: int, blocks: int) -> str:
    return f"block {number} of {blocks}" if number <= blocks else "logits"


def _effective(windows: set[int | None], limit: int) -> set[int]:
    return {limit if window is None else min(window, limit) for window in windows}


def _text(windows: set[int | None]) -> str:
    return " and ".join("no" if window is None else str(window) for window in sorted(windows, key=lambda w: w or 0))


# ------------------------------------------------------------------------------------------------ the two forwards


def _alone(backbone: Backbone, rows: Tensor, lengths: list[int]) -> _Seen:
    """Run each segment alone. For a family that runs packed they are the rows of one batch: in attention, the tokens after a
    segment's end do not affect those before."""
    seen = _Seen()
    masks: dict[int, tuple[Any, int | None]] = {}  # the mask is kept, so that its id stays its own
    known = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    eager = known["eager"]

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        mask = eager(*args, **kwargs)
        masks[id(mask)] = (mask, kwargs.get("local_size"))
        return mask

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found = {masks[id(x)][1] for x in (*args, *kwargs.values()) if id(x) in masks}
        seen.windows.setdefault(seen.block, set()).update(found)

    def run(some: Tensor, its_lengths: list[int]) -> list[Tensor]:
        def cut(x: Tensor) -> Tensor:
            return torch.cat([row[:length] for row, length in zip(x.float().cpu(), its_lengths, strict=True)])

        seen.states = []
        with _watched(backbone, seen, cut, note):
            logits = decoder(some, use_cache=False).logits
        return [*seen.states, cut(logits)]

    with backbone.unpacked() as decoder:
        if decoder._can_set_attn_implementation():
            decoder.set_attn_implementation("eager")
        known["eager"] = make_mask
        try:
            if backbone.padded:
                parts = [run(row[None, :length], [length]) for row, length in zip(rows, lengths, strict=True)]
                seen.states = [torch.cat(states) for states in zip(*parts, strict=True)]
            else:
                seen.states = run(rows, lengths)
        finally:
            del known["eager"]
    return seen


def _segments(rows: Tensor, lengths: list[int], device: torch.device) -> PackedSequence:
    return pack_sequence(
        [Segment(row[:length].tolist(), "text") for row, length in zip(rows, lengths, strict=True)]
    ).to(device)


def _packed(backbone: Backbone, rows: Tensor, lengths: list[int], device: torch.device) -> _Seen:
    seen = _Seen()

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.windows.setdefault(seen.block, set()).add(window_of(module, kwargs))
        return packed_attention(module, *args, **kwargs)

    AttentionInterface.register(PACKED, attend)
    try:
        return _together(backbone, _segments(rows, lengths, device), seen)
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def _padded(backbone: Backbone, rows: Tensor, lengths: list[int], device: torch.device) -> _Seen:
    return _together(backbone, _segments(rows, lengths, device), _Seen())


def _together(backbone: Backbone, segments: PackedSequence, seen: _Seen) -> _Seen:
    with _watched(backbone, seen, lambda x: backbone.packed_states(x, segments).float().cpu(), lambda *_: None):
        hidden = backbone.hidden(segments)
    seen.states.append(backbone.logits(hidden).float().cpu())
    return seen


@contextmanager
def _watched(backbone: Backbone, seen: _Seen, rows: Any, note: Any) -> Iterator[None]:
    """Record each block's output, ``rows(output)``, and the number of the block that runs; call ``note`` at its begin."""

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.block = len(seen.states)
        note(module, args, kwargs)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seen.states.append(rows(output[0] if isinstance(output, tuple) else output))

    with ExitStack() as stack:
        for block in backbone.layers:
            stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end).remove)
        yield


@contextmanager
def placed(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make each block use copies of its tensors on the device while it runs, and the other modules throughout.

    Parameters are copied in ``dtype``, buffers in their own.
    """
    originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
    of_blocks = {module for block in backbone.layers for module in block.modules()}

    def place(modules: Any) -> None:
        copies: dict[Tensor, Tensor] = {}  # tied parameters stay one
        for module in modules:
            for own, to in ((module._parameters, dtype), (module._buffers, None)):
                originals.append((own, dict(own)))
                for key, tensor in own.items():
                    if tensor is not None:
                        if tensor not in copies:
                            copies[tensor] = tensor.detach().to(device, to if tensor.is_floating_point() else None)
                        own[key] = copies[tensor]

    def restore(down_to: int) -> None:
        while len(originals) > down_to:
            own, before = originals.pop()
            own.update(before)

    with ExitStack() as stack:
        stack.callback(restore, 0)
        place(module for module in backbone.modules() if module not in of_blocks)
        outside = len(originals)
        for block in backbone.layers:
            stack.callback(
                block.register_forward_pre_hook(lambda module, args: place(module.modules()), prepend=True).remove
            )
            stack.callback(block.register_forward_hook(lambda module, args, output: restore(outside)).remove)
        yield
