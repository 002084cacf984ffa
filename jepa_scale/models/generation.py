"""Greedy generation in batches, by transformers' ``generate``: every rank its own prompts, all ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_scale.distributed.comm import Ranks, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts filled up on the left to the length of the longest.

    Attributes:
        ids: (B, L) int64.
        mask: (B, L) int64, 1 where there is a token of the prompt.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray]) -> Prompts:
        """At least one prompt, each (n,) of n ≥ 1 token ids."""
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        return cls(torch.from_numpy(ids), torch.from_numpy(mask))

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


class Generated(NamedTuple):  # a tuple, because the engines look for tensors in what the root module returns
    """tokens: (B, n) int64, what came after each prompt. lengths: (B,) int64, how many of them before a token that stops.
    stopped: (B,) bool, whether one came."""

    tokens: Tensor
    lengths: Tensor
    stopped: Tensor


class Answer(NamedTuple):
    """number: of the prompt. tokens: what was generated, without the token that stops. stopped: whether one came."""

    number: int
    tokens: list[int]
    stopped: bool


class Round(NamedTuple):
    """prompts: their numbers, to be dealt out to the ranks. room: tokens that each may be answered with."""

    prompts: list[int]
    room: int


def rounds(lengths: Sequence[int], new_tokens: int, positions: int | None, size: int) -> list[Round]:
    """Which prompts are answered together: those of like length, the longest first, so that what does not fit into the
    memory shows at once.

    All prompts of a round have the same room: ranks that have finished go on until the last one has, and none may pass
    the decoder's last position meanwhile. A prompt that leaves no room is in no round.

    Args:
        lengths: tokens of each prompt.
        new_tokens: room where the positions don't limit it.
        positions: that the decoder has; None = without limit.
        size: prompts in a round, over all ranks.
    """

    def room(number: int) -> int:
        return min(new_tokens, positions - lengths[number]) if positions is not None else new_tokens

    ordered = sorted((n for n in range(len(lengths)) if room(n) > 0), key=lambda n: -lengths[n])
    found = []
    for of_group, group in groupby(ordered, key=room):
        numbers = list(group)
        found += [Round(numbers[start : start + size], of_group) for start in range(0, len(numbers), size)]
    return found


def answer(
    call: Callable[..., Any], prompts: Sequence[np.ndarray], part: Round, stop: Sequence[int], ranks: Ranks
) -> list[Answer]:
    """This rank's answers of a round, every ``world_size``-th. Collective; a rank without any answers another one's prompt
    and drops what came of it.

    Args:
        call: ``call("generate", Prompts, stop, room)`` → :class:`Generated`, through the engine.
        stop: ids of tokens after which an answer is over.
    """
    mine = part.prompts[ranks.data_rank :: ranks.data_size]
    batch = Prompts.of([prompts[number] for number in mine or part.prompts[:1]])
    out = Generated(*(x.cpu() for x in call("generate", batch, tuple(stop), part.room)))
    rows = zip(out.tokens.tolist(), out.lengths.tolist(), out.stopped.tolist(), strict=True)
    return [Answer(n, tokens[:length], over) for n, (tokens, length, over) in zip(mine, rows, strict=False)]


@torch.no_grad()
def greedy(decoder: PreTrainedModel, prompts: Prompts, stop: Sequence[int], new_tokens: int) -> Generated:
    """The likeliest next token, again and again, with a key-value cache, until each row has met one that stops.

    Beside ``stop``, the decoder's own ``generation_config.eos_token_id`` stops. Nothing else of that configuration counts:
    a checkpoint's may ask for sampling or penalise repetition, which would not be greedy. Collective where there are
    several ranks: each forward of a sharded decoder is.

    Args:
        decoder: with ordinary attention (:meth:`jepa_scale.models.backbone.Backbone.unpacked`).
        new_tokens: at most, the one that stops included; ≥ 1.
    """
    from transformers import GenerationConfig

    own = decoder.generation_config
    ends = sorted({*stop, *_listed(own.eos_token_id)})
    wanted = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,  # behind a finished row; cut off below
    )
    decoder.generation_config = GenerationConfig()  # what `wanted` leaves open is filled in from there
    try:
        with torch.compiler.set_stance("force_eager"):  # the cache grows with every token: no shape comes twice
            model: Any = decoder  # its class has `generate` from a mixin
            whole = model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                generation_config=wanted,
                synced_gpus=world_size() > 1,
            )
    finally:
        decoder.generation_config = own
    tokens = whole[:, prompts.ids.shape[1] :]
    over = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device))
    stopped = over.any(dim=1)
    return Generated(tokens, torch.where(stopped, over.int().argmax(dim=1), tokens.shape[1]), stopped)


def _listed(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]
