"""The learning rate schedule."""

from __future__ import annotations

import math

from jepa_scale.config.schema import OptimConfig


def lr_factor(step: int, options: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0 … total_steps − 1) as a fraction of the peak.

    With n = step + 1 and w = warmup_steps: n / w while n ≤ w; after that, with t = (n − w) / (total_steps − w) in (0, 1],
    ``cosine`` is f + (1 − f)·½(1 + cos πt), ``linear`` is f + (1 − f)(1 − t) and ``constant`` is 1, where f = final_lr.
    ``wsd`` (warm-up, stable, decay: Hu et al., arXiv 2404.06395) is 1, and ``linear`` in the last ``decay_steps``, a tenth of all
    steps if that is 0. The peak is reached at step w − 1 and ``final_lr`` at the last step.
    """
    n, warmup, final = step + 1, options.warmup_steps, options.final_lr
    if n <= warmup:
        return n / warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "wsd":
        decay = options.decay_steps or math.ceil(total_steps / 10)
        warmup = max(warmup, total_steps - decay)
        if n <= warmup:
            return 1.0
    t = min(1.0, (n - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * t)) if options.schedule == "cosine" else 1 - t
    return final + (1 - final) * shape
