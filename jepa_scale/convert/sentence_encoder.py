"""The files beside a decoder's own that make it a sentence encoder, as sentence-transformers loads it.

They are written in the layout that every version since 2.0 reads, so that package is not needed for an export.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jepa_scale.convert.tokenizer import Tokenizer, read_files
from jepa_scale.data.prepare.encoders.chat_tokens import bos_prefix, encode_text
from jepa_scale.data.prepare.encoders.tokenizer import load_tokenizer
from jepa_scale.utils.errors import InputError

POOLING_FOLDER = "1_Pooling"
PROMPTS = {"query": "", "document": ""}
"""Prompts by name without any given: ``encode_query`` and ``encode_document`` encode the text alone."""
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_POOLED_BY: dict[Literal["mean", "last"], str] = {"mean": "mean_tokens", "last": "lasttoken"}
_NO_LIMIT = 10**30


def module_files(
    pooling: Literal["mean", "last"], hidden_size: int, most_tokens: int | None, prompts: Mapping[str, str]
) -> dict[str, str]:
    """Return the files that list the modules of a sentence encoder and their options, by path.

    Args:
        pooling: how the states (n, hidden_size) of a text's tokens become one vector.
        most_tokens: longer texts are cut; None = no limit.
        prompts: name → text that is put before each text which is encoded under that name.
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": "sentence_transformers.models.Pooling"},
    ]
    modes = {f"pooling_mode_{mode}": mode == _POOLED_BY[pooling] for mode in _MODES}
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {**PROMPTS, **prompts},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    contents: dict[str, Any] = {
        "modules.json": modules,
        "config_sentence_transformers.json": settings,
        "sentence_bert_config.json": {"max_seq_length": most_tokens, "do_lower_case": False},
        f"{POOLING_FOLDER}/config.json": {"word_embedding_dimension": hidden_size, **modes, "include_prompt": True},
    }
    return {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in contents.items()}


def tokenizer_of_texts(tokenizer: Tokenizer, most_tokens: int | None) -> Tokenizer:
    """Return a tokenizer that makes of a text, by default, the ids with which a run encodes it.

    They begin with BOS if the tokenizer adds it and have no EOS; names of special tokens within a text are text. There is no chat
    template: sentence-transformers would render a text by it. Padding is on the right, where it changes no causal state.

    Raises:
        InputError: there is no tokenizer, or its class cannot be made to give these ids.
    """
    if not tokenizer.files:
        raise InputError(
            "--to sentence-transformers: the data have no tokenizer, and a sentence encoder takes texts; name one by "
            "--tokenizer DIR, or use --to hf"
        )
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given"), Path(folder, "made")
        for name, content in tokenizer.files.items():
            (given / name).parent.mkdir(parents=True, exist_ok=True)
            (given / name).write_bytes(content)
        own: Any = load_tokenizer(str(given))
        texts = ["a", " The quick\tbrown fox, naïve.\n", *(f"a {token} b" for token in own.all_special_tokens)]
        wanted = [[*bos_prefix(own), *encode_text(own, text)] for text in texts]
        own.chat_template = None
        settings = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": True}
        for name, value in {**settings, "model_max_length": most_tokens or _NO_LIMIT}.items():
            setattr(own, name, value)
            own.init_kwargs[name] = value  # what save_pretrained writes
        if own.pad_token is None:
            own.pad_token = own.eos_token or own.bos_token or own.unk_token or own.convert_ids_to_tokens(0)
        if own.is_fast and own("a")["input_ids"] != wanted[0]:
            own.backend_tokenizer.post_processor = _begins_with_bos(own)
        own.save_pretrained(made)
        saved: Any = load_tokenizer(str(made))  # as sentence-transformers will
        if [list(saved(text)["input_ids"]) for text in texts] != wanted:
            raise InputError(
                f"--to sentence-transformers: the tokenizer's class {type(saved).__name__} adds other tokens to a text than "
                "jepa-scale encode; give another by --tokenizer DIR, or use --to hf"
            )
        return Tokenizer(read_files(made), tokenizer.special, tokenizer.size)


def _begins_with_bos(tokenizer: Any) -> Any:
    """Return a post-processor that adds BOS, if this tokenizer begins texts with it, and nothing else."""
    from tokenizers.processors import TemplateProcessing

    if not bos_prefix(tokenizer):
        return TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    bos = tokenizer.bos_token
    return TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
