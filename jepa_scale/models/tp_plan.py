"""Which layers of a decoder are split in which way over a team of ranks: a plan beside the model, by the names of its modules.

The names of the ways are transformers', whose families carry such a plan themselves (``base_model_tp_plan``):

``colwise``
    output channels: each rank has some of a linear layer's rows.
``rowwise``
    input channels: each rank has some of its columns, and gives a part of a sum.
``colwise_gather_output``, ``rowwise_split_input``
    the same, with all channels on every rank in between, which compute alike: for norms over all heads.
``replicated_with_grad_allreduce``
    whole on every rank, and each uses it for its own heads.
``headwise``
    (our own) any parameters of one dimension, heads first.
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
    """Pattern of a module's name within the base model (``*`` stands for a block's number) → way.

    Raises:
        InputError: the family has no plan, or splits something in a way that is not offered.
    """
    if isinstance(decoder, JepaDecoderForCausalLM):
        return NATIVE
    plan: dict[str, str] = getattr(decoder.config, "base_model_tp_plan", None) or {}
    if not plan:
        raise InputError(
            f"engine.tp: transformers has no tensor-parallel plan for {type(decoder).__name__}; set it to 1"
        )
    for pattern, way in plan.items():
        if way not in WAYS:
            raise InputError(
                f"engine.tp: {type(decoder).__name__} splits {pattern} {way!r}, which is not offered; set it to 1"
            )
    return plan
