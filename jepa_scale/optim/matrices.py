"""Which parameters are matrices in Muon's sense, and what follows from the shape of one."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Matrix(NamedTuple):
    """A parameter that is stepped as a matrix.

    Attributes:
        name: of the parameter, the first one. rows, cols: as it is stored.
        transposed: stored as (inputs, outputs), as GPT-2 does; else as (outputs, inputs).
    """

    name: str
    rows: int
    cols: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def flops(self) -> int:
        """Of one Newton–Schulz iteration: three products, of which two have the longer side in them."""
        short, long = sorted((self.rows, self.cols))
        return 4 * short * short * long + 2 * short**3

    def lr_scale(self, adjust: str) -> float:
        """What the learning rate is multiplied with: √max(1, outputs / inputs) by ``original`` (Jordan et al. 2024),
        0.2·√max(outputs, inputs) by ``match_rms_adamw``, which gives an orthogonal update the root mean square that
        AdamW's usually have (Liu et al. 2025, arXiv 2502.16982, section 2.2)."""
        if adjust == "match_rms_adamw":
            return 0.2 * max(self.rows, self.cols) ** 0.5
        assert adjust == "original", adjust
        outputs, inputs = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        return max(1.0, outputs / inputs) ** 0.5


def linear_weights(module: nn.Module) -> dict[nn.Parameter, bool]:
    """The weights of linear layers → whether they are stored as (inputs, outputs).

    Without those of an LM head (``get_output_embeddings`` of any sub-module tells which that is), and without those that
    have another use too: as an embedding, for one.
    """
    others: set[nn.Parameter] = set()
    for part in module.modules():
        head = getattr(part, "get_output_embeddings", lambda: None)()
        others.update(head.parameters() if isinstance(head, nn.Module) else ())
    weights: dict[nn.Parameter, bool] = {}
    for part in module.modules():
        linear = isinstance(part, nn.Linear) or is_conv1d(part)
        for name, parameter in part.named_parameters(recurse=False):
            if linear and name == "weight" and parameter.ndim == 2 and parameter.numel() > 0:
                weights[parameter] = is_conv1d(part)
            else:
                others.add(parameter)
    return {parameter: transposed for parameter, transposed in weights.items() if parameter not in others}


def is_conv1d(module: nn.Module) -> bool:
    """transformers' linear layer of GPT-2, whose weight is (inputs, outputs); told by its name, as it need not be there."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)
