"""Which causal families of transformers compute packed, or in padded rows, what transformers computes for each segment alone.

    python benchmarks/families.py --json benchmarks/results/families.json
    python benchmarks/families.py --only llama gemma2                      # print these alone
    python benchmarks/families.py --json benchmarks/results/families.json --render docs/results/families.md

Each family is made with random weights in a tiny size. The reference is transformers' own forward with the family's ``eager``
attention where it can be chosen, one segment at a time; ours is the forward of all segments, packed and, for a family that is refused
so, in padded rows. Both are fp32 on the CPU, in evaluation mode. A family is ``equal`` if no logit of the packed forward differs by more
than 1e-4 of the largest; ``padded`` if that holds of the padded rows alone; ``refused`` if the checks of a run's start refuse both, with
the message about packed; ``different`` if none of these; ``not tried`` if no tiny model of it could be made, with the reason. A family whose class is
refused at any size is tried at its default size without weights. The gradient of an equal family is computed once, in training mode.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import multiprocessing
import resource
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from jepa_scale.models.backbone import Backbone  # noqa: E402
from jepa_scale.models.families.probe import probe  # noqa: E402
from jepa_scale.models.generation.cache_check import check_generation  # noqa: E402
from jepa_scale.models.loading import check_packable  # noqa: E402
from jepa_scale.packing import Segment, pack_sequence  # noqa: E402
from jepa_scale.utils.errors import InputError  # noqa: E402

LENGTHS = (9, 1, 5, 5, 12)
LARGEST = 3_400_000
"""Most parameters of a tiny model."""
MEMORY = 8 << 30
CLOSE = 1e-4
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
SIZES = {
    # width and depth, under the names of all families; a family takes those that it knows
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 99),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size", "index_topk"), 4),
    # mixtures
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "encoder_layers"), 1),
    # state spaces
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads"), 8),
    # what makes a forward random
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "dropout"), 0.0),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
}
SAME_HEADS = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), SAME_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "kimi_linear"), SAME_HEADS),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "reformer": {"is_decoder": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_ngroups": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kimi_linear": {**SAME_HEADS, "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["full_attention"] * 4, "num_dense_layers": 1},
}
"""Keys that a family needs to be small."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2 without a cap": ("gemma2", {"attn_logit_softcapping": None}),
    "lfm2 with convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2_moe with a window": ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 4}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 4}),
}
"""Further rows: name → family, and the keys that make it compute otherwise than by default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of families; default: all of the installed transformers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--render", type=Path, help="write the page's table again from the JSON; nothing is run")
    args = parser.parse_args()
    if args.render:
        found = json.loads(args.json.read_text())
    else:
        found = {"transformers": transformers.__version__, "families": measure(args.only)}
        if args.json:
            args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if args.render:
        before, mark, _ = args.render.read_text().partition("<!-- measured -->\n")
        args.render.write_text(before + mark + table(found))
    elif not args.json:
        print(table(found))


def measure(names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return name → ``result``, and ``difference`` or ``reason``; each family in a process of its own."""
    found: dict[str, dict[str, Any]] = {}
    fork = multiprocessing.get_context("fork")
    for name in names or [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(name, theirs))
        process.start()
        theirs.close()
        process.join(300)
        process.kill()
        found[name] = (
            ours.recv() if ours.poll() else {"result": "not tried", "reason": f"ended with {process.exitcode}"}
        )
    return found


def _child(name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe.send(outcome(name))


def outcome(name: str) -> dict[str, Any]:
    """Compare one family, or variant, by its name."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    failure: Exception | None = None
    for tokens in (NO_TOKENS, TOKENS):
        try:
            return _compare(name, tokens)
        except Refused as error:
            return {"result": "refused", "reason": _reason(error)}
        except Exception as error:  # whatever the family's code raises on a size that it was not made for
            failure = error
    try:  # is it refused whatever its size?
        with torch.device("meta"):
            _backbone(AutoModelForCausalLM.from_config(CONFIG_MAPPING[VARIANTS.get(name, (name,))[0]]()), padded=False)
    except Refused as error:
        if not str(error).endswith(MAY_BE):
            return {"result": "refused", "reason": _reason(error)}
    except Exception:
        pass
    return {"result": "not tried", "reason": " ".join(f"{type(failure).__name__}: {failure}".split())[:160]}


MAY_BE = "; try model.packing: padded"


def _reason(error: Exception) -> str:
    """Return why, without what to do."""
    return str(error).removeprefix("model: ").rpartition("; ")[0]


class Refused(Exception):
    """The checks at the start of a run have refused the family."""


def _compare(name: str, tokens: dict[str, Any]) -> dict[str, Any]:
    family, own = VARIANTS.get(name, (name, {}))
    cls = CONFIG_MAPPING[family]
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map}
    keys = {key: value for key, value in {**SIZES, **tokens}.items() if key in known}
    config = cls(**{**keys, **OWN.get(family, {}), **own})
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters at least")
    try:
        return {"result": "equal", **_trial(config, padded=False)}
    except Refused as refusal:
        with suppress(Refused):
            return {"result": "padded", **_trial(config, padded=True), "reason": _reason(refusal)}
        raise


def _trial(config: Any, padded: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is zero or one hides mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, config.get_text_config().vocab_size, (n,), generator=generator) for n in LENGTHS]
    usual = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    if padded and model._can_set_attn_implementation():
        model.set_attn_implementation(usual)
    backbone = _backbone(model, padded)
    try:
        probe(backbone, torch.device("cpu"), torch.float32)
    except InputError as error:
        raise Refused(error) from None
    stream = pack_sequence([Segment(row.tolist(), "text") for row in rows])
    ours = backbone.logits(backbone.hidden(stream))
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    backbone.decoder.train()
    backbone.logits(backbone.hidden(stream)).logsumexp(dim=-1).sum().backward()
    found: dict[str, Any] = {"difference": difference}
    if difference > CLOSE:
        found["result"] = "different"
    if padded:
        try:
            check_generation(backbone, torch.device("cpu"), torch.float32)
            found["generates"] = True
        except InputError:
            found["generates"] = False
    return found


def _backbone(model: Any, padded: bool) -> Backbone:
    try:
        if not padded:
            check_packable(model)
        return Backbone(model, padded)
    except InputError as error:
        raise Refused(error) from None


def table(found: dict[str, Any]) -> str:
    """Return the page's tables, in Markdown."""
    families = found["families"]
    of = {result: {n: f for n, f in families.items() if f["result"] == result} for result in RESULTS}
    counts = ", ".join(f"{len(of[result])} {result}" for result in RESULTS)
    largest = max((f["difference"] for result in RESULTS[:2] for f in of[result].values()), default=0.0)
    lines = [
        f"transformers {found['transformers']}: {counts}. The largest difference among the equal and the padded ones is "
        f"{largest:.0e} of the largest logit.",
        "",
        f"**Equal**, packed: {', '.join(f'`{name}`' for name in of['equal'])}.",
    ]
    if of["padded"]:
        lines += ["", "| padded | generates | why not packed |", "|---|---|---|"]
        lines += [
            f"| `{n}` | {'yes' if f['generates'] else 'no'} | {_cell(f['reason'])} |" for n, f in of["padded"].items()
        ]
    for result in RESULTS[2:]:
        if of[result]:
            lines += ["", f"| {result} | why |", "|---|---|"]
            lines += [
                f"| `{n}` | {_cell(f.get('reason') or format(f['difference'], '.1e'))} |" for n, f in of[result].items()
            ]
    return "\n".join(lines) + "\n"


RESULTS = ("equal", "padded", "different", "refused", "not tried")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
