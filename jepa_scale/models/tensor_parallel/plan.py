"""The tensor-parallel plan of a decoder: how each layer is split over a tensor-parallel group, by module name.

The names of the ways to split are those of transformers, whose model families have such a plan (``base_model_tp_plan``):

``colwise``
    Split by output channels: each rank has some rows of a linear layer's weight.
``rowwise``
    Split by input channels: each rank has some columns and computes one term of a sum.
``colwise_gather_output``, ``rowwise_split_input``
    The same, but between the two layers every rank has all channels and computes alike. For norms over all heads.
``replicated_with_grad_allreduce``
    Whole on every rank; each rank uses it for its own heads.
``headwise``
    (Not from transformers.) One-dimensional parameters whose elements are ordered by head.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from jepa_scale.models.decoder import JepaDecoderForCausalLM
from jepa_scale.utils.errors import InputError

NATIVE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.self_attn.pope": "headwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
WAYS = {
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "rowwise_split_input",
    "replicated_with_grad_allreduce",
    "headwise",
}


def plan_of(decoder: PreTrainedModel) -> dict[str, str]:
    """Return the plan: pattern of a module's name within the base model (``*`` = a block's number) → way to split.

    Raises:
        InputError: the family has no plan, or uses a way to split that is not supported.
    """
    if isinstance(decoder, JepaDecoderForCausalLM):
        return NATIVE
    plan: dict[str, str] = getattr(decoder.config, "base_model_tp_plan", None) or {}
    if not plan:
        raise InputError(
            f"engine.tp: transformers has no tensor-parallel plan for {type(decoder).__name__}; set engine.tp=1"
        )
    for pattern, way in plan.items():
        if way not in WAYS:
            raise InputError(
                f"engine.tp: {type(decoder).__name__} splits {pattern} {way!r}, which is not supported; set engine.tp=1"
            )
    return plan
