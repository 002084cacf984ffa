"""Self-speculative generation: a head of the objective drafts tokens, and one forward of the decoder checks them all.

Each forward gives one token of the decoder's own and the drafts that it agrees with (Leviathan et al., arXiv 2211.17192). Without
drafts this is ordinary generation with a key-value cache. The result does not depend on the drafts: greedy tokens are the same, up to
ties within rounding, and samples have the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.generation.acceptance import accept, distributions, sample

Choose = Callable[[Tensor], tuple[int, Tensor]]
"""Function from (V,) logits to a token and the distribution, (V,), that it was drawn from."""


class Drafter(Protocol):
    """A head that proposes the tokens after the next one. It is used for one text, from its beginning."""

    @property
    def tap(self) -> int:
        """Number of the block whose states it reads; 0 = only those after the final norm."""

    @property
    def most(self) -> int | None:
        """Most tokens of a draft; None = no limit."""

    def observe(self, hidden: Tensor, tapped: Tensor | None) -> None:
        """Read the states of the text's next m tokens: (m, d) after the final norm, and (m, d) after block ``tap``."""

    def draft(self, token: int, count: int, choose: Choose) -> tuple[list[int], list[Tensor]]:
        """Return ``count`` tokens that may follow ``token``, which follows the states read, and their distributions."""


@dataclass(slots=True)
class Generation:
    """Tokens that follow a prompt.

    Attributes:
        tokens: without the stop token.
        stopped: whether a stop token was generated.
        drafted, accepted: number of drafts, and of those kept.
        forwards: number of forwards of the decoder after that of the prompt.
    """

    tokens: list[int]
    stopped: bool = False
    drafted: int = 0
    accepted: int = 0
    forwards: int = 0


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompt: Sequence[int],
    stop: Collection[int],
    new_tokens: int,
    drafter: Drafter | None = None,
    drafts: int = 0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Generate the tokens after a prompt of at least one token.

    Args:
        stop: ids of the tokens that end the text.
        new_tokens: the most tokens to generate, the stop token included; ≥ 1.
        drafter: a new one for each prompt. drafts: tokens that it drafts at a time.
        temperature: 0 = the likeliest token, 1 = the model's distribution.
        generator: of random numbers, on the decoder's device.
    """
    device = backbone.decoder.get_output_embeddings().weight.device

    def choose(logits: Tensor) -> tuple[int, Tensor]:
        chances = distributions(logits, temperature)
        return sample(chances, generator), chances

    with _reading(backbone, drafter.tap if drafter else 0) as reader:
        hidden, tapped = reader.read(prompt)
        reader.forget(0)
        if drafter is not None:
            drafter.observe(hidden, tapped)
        token, _ = choose(backbone.logits(hidden[-1:])[0])
        found = Generation([token])
        while token not in stop and (left := new_tokens - len(found.tokens)) > 0:
            count = min(drafts, left - 1) if drafter is not None else 0
            proposed, chances = drafter.draft(token, count, choose) if drafter is not None and count else ([], [])
            hidden, tapped = reader.read([token, *proposed])
            actual = distributions(backbone.logits(hidden), temperature)
            kept, following = accept(
                torch.tensor(proposed, dtype=torch.int64, device=device),
                torch.stack(chances) if chances else actual[:0],
                actual,
                generator,
            )
            reader.forget(count - kept)
            if drafter is not None:
                drafter.observe(hidden[: kept + 1], None if tapped is None else tapped[: kept + 1])
            found.forwards += 1
            found.drafted += count
            found.accepted += kept
            for token in (*proposed[:kept], following):
                found.tokens.append(token)
                if token in stop:
                    break
    if token in stop:
        found.tokens.pop()
        found.stopped = True
    return found


class _Reader:
    """Reads a text in parts, with a key-value cache."""

    def __init__(self, decoder: Any, tap: int) -> None:
        self._decoder, self._tap = decoder, tap
        self._tapped: Tensor | None = None
        self._cache = DynamicCache(config=decoder.config)
        self._cache.activate_past_recording()  # a sliding window keeps what it may have to go back to

    def read(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Read the text's next m tokens; return their states after the final norm and after block ``tap``, (m, d) each."""
        ids = torch.tensor([list(tokens)], dtype=torch.int64, device=self._decoder.device)
        out = self._decoder.base_model(input_ids=ids, past_key_values=self._cache, use_cache=True, return_dict=True)
        return out.last_hidden_state[0], self._tapped

    def forget(self, count: int) -> None:
        """Go back by ``count`` tokens; to be called after each :meth:`read`."""
        self._cache.crop(-count)

    def record(self, block: Any, args: Any, output: Any) -> None:
        self._tapped = (output[0] if isinstance(output, tuple) else output)[0]


@contextmanager
def _reading(backbone: Backbone, tap: int) -> Iterator[_Reader]:
    with backbone.unpacked() as decoder:
        reader = _Reader(decoder, tap)
        handle = backbone.layers[tap - 1].register_forward_hook(reader.record) if tap else None
        try:
            yield reader
        finally:
            if handle is not None:
                handle.remove()
