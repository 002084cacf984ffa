"""Does a decoder that runs in padded rows, or has recurrences, generate with its cache what it computes without one?

Such families keep states of their own in the cache, and some ignore the padding before a prompt or cannot go on from it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from jepa_scale.models.backbone import Backbone
from jepa_scale.models.families.probe import placed
from jepa_scale.utils.errors import InputError, one_line

PROMPTS, NEW = (7, 4), 3
"""Tokens of the two prompts, and how many are generated."""
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.3
"""Largest ‖with − without‖ / ‖without‖ of a token's logits, in fp32 where the weights are, and on the run's device in its dtype."""


class _CannotGenerate(InputError):
    """Generation fails, or the forward without a cache."""


def check_generation(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the logits of a batch of two random prompts, padded on the left, with those of each text alone.

    This is done where the weights are, and if the family's kernels do not run there, as the run computes. The decoder is whole and in
    fp32. Its modes and torch's global generator stay as they were.

    Args:
        device, dtype: those in which the run computes.

    Raises:
        InputError: they differ, or the family cannot generate so.
    """
    weight = backbone.decoder.get_output_embeddings().weight
    try:
        _check(backbone, TOLERANCE)
    except _CannotGenerate:
        if (weight.device.type, weight.dtype) == (device.type, dtype):
            raise
        with placed(backbone, device, dtype):
            _check(backbone, ROUNDED_TOLERANCE)


@torch.no_grad()
def _check(backbone: Backbone, tolerance: float) -> None:
    decoder: Any = backbone.decoder  # its class inherits `generate` from a mixin
    name = type(decoder).__name__
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, backbone.vocab_size, (len(PROMPTS), max(PROMPTS)), generator=generator)
    mask = torch.stack([torch.arange(max(PROMPTS)) >= max(PROMPTS) - n for n in PROMPTS]).long()
    wanted = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True
    )
    modes, own = [(module, module.training) for module in decoder.modules()], decoder.generation_config
    decoder.eval()
    decoder.generation_config = GenerationConfig()  # transformers takes what `wanted` leaves open from it
    try:
        device = decoder.get_output_embeddings().weight.device
        with backbone.unpacked(), torch.compiler.set_stance("force_eager"):
            found = decoder.generate(ids.to(device), attention_mask=mask.to(device), generation_config=wanted)
            for row, (text, n) in enumerate(zip(found.sequences, PROMPTS, strict=True)):
                alone = decoder(text[None, max(PROMPTS) - n : -1], use_cache=False).logits[0, -NEW:].float()
                with_cache = torch.stack([logits[row] for logits in found.logits]).float()
                error = float(((with_cache - alone).norm(dim=-1) / alone.norm(dim=-1).clamp(min=1e-30)).max())
                if not error <= tolerance:
                    raise InputError(
                        f"model: {name} does not compute with its cache what it computes without: the logits of a text of a batch differ "
                        f"by {error:.2g} of their norm ({tolerance:g} is allowed), so it cannot generate; choose another family"
                    )
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a family's code raises in a use that it was not made for
        raise _CannotGenerate(
            f"model: {name} cannot generate a batch of texts with its cache ({one_line(error)}); choose another family"
        ) from error
    finally:
        decoder.generation_config = own
        for module, mode in modes:
            module.training = mode
