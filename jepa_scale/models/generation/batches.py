"""Greedy generation in batches, by transformers' ``generate``. Each rank generates for its own prompts, and all ranks run the
same number of forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_scale.distributed.comm import ParallelContext, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts, padded on the left to the length of the longest.

    Attributes:
        ids: (B, L) int64.
        mask: (B, L) int64, 1 at a token of the prompt and 0 at padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray]) -> Prompts:
        """Pad a batch of at least one prompt, each (n,) of n ≥ 1 token ids."""
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        return cls(torch.from_numpy(ids), torch.from_numpy(mask))

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))


class Generated(NamedTuple):  # a tuple: the engines find tensors in the root module's output only in such containers
    """Generated tokens of a batch of prompts.

    Attributes:
        tokens: (B, n) int64, the tokens after each prompt.
        lengths: (B,) int64, the number of them before the first stop token.
        stopped: (B,) bool, whether a stop token was generated.
    """

    tokens: Tensor
    lengths: Tensor
    stopped: Tensor


Ended = Callable[[Tensor], Tensor]
"""Function from the tokens generated so far, (B, n), to whether each row has come to its end, (B,) bool."""


class Answer(NamedTuple):
    """Answer to one prompt.

    Attributes:
        number: index of the prompt.
        tokens: the generated tokens, without the stop token.
        stopped: whether a stop token was generated.
    """

    number: int
    tokens: list[int]
    stopped: bool


class Round(NamedTuple):
    """Prompts that are answered together.

    Attributes:
        prompts: their indices, to be split over the ranks.
        room: the most tokens that may be generated for each.
    """

    prompts: list[int]
    room: int


def rounds(lengths: Sequence[int], new_tokens: int, positions: int | None, size: int) -> list[Round]:
    """Group prompts of similar length into rounds, the longest first, so that a lack of memory shows in the first round.

    All prompts of a round have the same room: ranks that have finished continue until the last one has, and none may exceed
    the decoder's last position meanwhile. A prompt that leaves no room is in no round.

    Args:
        lengths: number of tokens of each prompt.
        new_tokens: room where the positions do not limit it.
        positions: number of positions of the decoder; None = no limit.
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
    call: Callable[..., Any],
    prompts: Sequence[np.ndarray],
    part: Round,
    stop: Sequence[int],
    ranks: ParallelContext,
    ended: Ended | None = None,
) -> list[Answer]:
    """Return this rank's answers of a round: those of every ``dp_size``-th prompt. Collective.

    A rank without a prompt generates for the round's first one and discards the result.

    Args:
        call: ``call("generate", Prompts, stop, room)`` → :class:`Generated`, through the engine; ``ended`` follows if it is given.
        stop: ids of the tokens that end an answer. ended: see :func:`greedy`.
    """
    mine = part.prompts[ranks.dp_rank :: ranks.dp_size]
    batch = Prompts.of([prompts[number] for number in mine or part.prompts[:1]])
    more = () if ended is None else (ended,)
    out = Generated(*(x.cpu() for x in call("generate", batch, tuple(stop), part.room, *more)))
    rows = zip(out.tokens.tolist(), out.lengths.tolist(), out.stopped.tolist(), strict=True)
    return [Answer(n, tokens[:length], over) for n, (tokens, length, over) in zip(mine, rows, strict=False)]


@torch.no_grad()
def greedy(
    decoder: PreTrainedModel, prompts: Prompts, stop: Sequence[int], new_tokens: int, ended: Ended | None = None
) -> Generated:
    """Generate the most likely next token, with a key-value cache, until each row has a stop token.

    Besides ``stop``, the decoder's own ``generation_config.eos_token_id`` is a stop token. The rest of that configuration is
    ignored: a checkpoint's may request sampling or a repetition penalty, which would not be greedy. With several ranks this
    is collective, as each forward of a sharded decoder is.

    Args:
        decoder: a decoder with ordinary attention (:meth:`jepa_scale.models.backbone.Backbone.unpacked`).
        new_tokens: the most tokens to generate, the stop token included; ≥ 1.
        ended: also ends a row. The tokens after its end are stop tokens, if there are any.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    prompt_tokens, rules = prompts.ids.shape[1], StoppingCriteriaList()
    if ended is not None:
        rules.append(lambda ids, scores, **_: ended(ids[:, prompt_tokens:]))  # type: ignore[arg-type, return-value]

    own = decoder.generation_config
    ends = sorted({*stop, *listed(own.eos_token_id)})
    wanted = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,  # after the end of a finished row; removed below
    )
    decoder.generation_config = GenerationConfig()  # transformers takes what `wanted` leaves open from it
    try:
        with torch.compiler.set_stance("force_eager"):  # every token lengthens the cache: no shape occurs twice
            model: Any = decoder  # its class inherits `generate` from a mixin
            whole = model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                generation_config=wanted,
                stopping_criteria=rules,
                synced_gpus=world_size() > 1,
            )
    finally:
        decoder.generation_config = own
    tokens = whole[:, prompt_tokens:]
    over = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device))
    stopped = over.any(dim=1)
    return Generated(tokens, torch.where(stopped, over.int().argmax(dim=1), tokens.shape[1]), stopped)


def listed(ids: int | list[int] | None) -> list[int]:
    """Return the stop tokens of a generation config as a list."""
    if ids is None:
        return []
    return list(ids) if isinstance(ids, list | tuple) else [ids]
