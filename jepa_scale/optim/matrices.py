"""Selection of the parameters that Muon can update, and quantities that depend on their shape."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Matrix(NamedTuple):
    """A parameter that Muon updates as a matrix.

    Attributes:
        name: first name of the parameter. rows, cols: its shape as stored.
        transposed: whether it is stored as (inputs, outputs), as in GPT-2; otherwise as (outputs, inputs).
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
        """FLOPs of one Newton–Schulz iteration: three products, two of which contain the longer side."""
        short, long = sorted((self.rows, self.cols))
        return 4 * short * short * long + 2 * short**3

    def lr_scale(self, adjust: str) -> float:
        """Factor of the learning rate.

        It is √max(1, outputs / inputs) for ``original`` (Jordan et al. 2024) and 0.2·√max(outputs, inputs) for
        ``match_rms_adamw``. The latter gives an orthogonal update the root mean square that is usual for AdamW (Liu et
        al. 2025, arXiv 2502.16982, section 2.2). It is 1 for ``none``.
        """
        if adjust == "none":
            return 1.0
        if adjust == "match_rms_adamw":
            return 0.2 * max(self.rows, self.cols) ** 0.5
        assert adjust == "original", adjust
        outputs, inputs = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        return max(1.0, outputs / inputs) ** 0.5


def linear_weights(module: nn.Module) -> dict[nn.Parameter, bool]:
    """Map each weight of a linear layer to whether it is stored as (inputs, outputs).

    The weights of an LM head (returned by ``get_output_embeddings`` of any sub-module) are left out. So are weights that
    have a further use, for example as an embedding.
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
    """Return whether the module is the linear layer of GPT-2 in transformers, whose weight is (inputs, outputs).

    It is recognised by name, because transformers need not be installed.
    """
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)
