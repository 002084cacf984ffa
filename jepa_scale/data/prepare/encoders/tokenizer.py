"""Tokenizers: a BPE tokenizer trained on the data and cached, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_scale.utils.errors import InputError
from jepa_scale.utils.file_names import check_tokenizer_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TRAINED_ON = 64 * 2**20
"""Largest number of bytes of text that a tokenizer is trained on; later text is not used."""
EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'tool' else '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_bpe(texts: Iterator[str], vocab_size: int, cache: Path, chat: bool) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on the texts' first ``TRAINED_ON`` bytes. Equal texts give equal tokenizers.

    It is cached in ``cache/tokenizers/<SHA-256 of everything it depends on>`` and loaded from there the next time.

    Args:
        vocab_size: wanted size, special tokens and the 256 bytes included. The result is smaller if no pair is left that
            occurs twice, and larger if special tokens and bytes alone exceed it.
        chat: add the special tokens and the template of conversations.

    Raises:
        InputError: there is no text.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    kept = _first_bytes(texts, TRAINED_ON)
    if not kept:
        raise InputError("data.tokenizer: bpe has no readable text to train on; check which records were skipped")
    special = [EOS, PAD, MASK, *(CHAT if chat else ())]
    name = _digest(kept, [vocab_size, special, CHAT_TEMPLATE if chat else "", tokenizers.__version__])
    folder = cache / "tokenizers" / name
    if not folder.is_dir():
        trained = PreTrainedTokenizerFast(
            tokenizer_object=_train(kept, vocab_size, special),
            eos_token=EOS,
            pad_token=PAD,
            mask_token=MASK,
            extra_special_tokens=list(CHAT) if chat else [],
            clean_up_tokenization_spaces=False,
            model_max_length=10**30,  # no warnings about long documents, which are cut later
        )
        if chat:
            trained.chat_template = CHAT_TEMPLATE
        _save_atomic(trained, folder)
    return load_tokenizer(str(folder))


def _first_bytes(texts: Iterator[str], limit: int) -> list[str]:
    kept, left = [], limit
    for text in texts:
        data = text.encode()
        kept.append(text if len(data) <= left else data[:left].decode(errors="ignore"))
        left -= len(data)
        if left <= 0:
            break
    return [text for text in kept if text]


def _digest(texts: list[str], choices: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(choices).encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    return digest.hexdigest()


def _train(texts: list[str], vocab_size: int, special: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save_atomic(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the folder atomically; if another process has saved it first, that one is kept."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp creates it for its owner only
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer by name or from a folder.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_tokenizer_config(Path(name_or_path))
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, KeyError, ImportError …, depending on the fault
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"data.tokenizer: {name_or_path!r} cannot be loaded ({reason}); give a local folder made by save_pretrained, a "
            f"name on the Hugging Face hub that this machine can reach, or bpe"
        ) from None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id of a tokenizer. Its length is smaller if ids between are left out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of ``eos``, ``pad`` (the id of ``eos`` if there is none), ``bos`` and ``mask``, if the tokenizer has them."""
    names = ("eos", "pad", "bos", "mask")
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    if found["pad"] is None:
        found["pad"] = found["eos"]
    return {name: int(i) for name, i in found.items() if i is not None}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256, in hex, of all that determines the ids: pipeline, vocabulary, chat template and special ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content |= {"truncation": None, "padding": None}  # state of the last call, not of the tokenizer
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    rest = [getattr(tokenizer, "chat_template", None), special_ids(tokenizer)]
    return hashlib.sha256(json.dumps([content, *rest], sort_keys=True).encode()).hexdigest()
