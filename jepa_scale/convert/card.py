"""The model card: description, usage, metrics and training of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from jepa_scale.checkpoint.manifest import Manifest
from jepa_scale.config.values import is_url
from jepa_scale.convert.standalone import FILE
from jepa_scale.data.files.addresses import redacted_url
from jepa_scale.telemetry.metrics import describe
from jepa_scale.utils.format import format_number


@dataclass(frozen=True, slots=True)
class Card:
    """Content of the model card.

    Attributes:
        name: name of the run. class_name: the model's class, in transformers or in the exported code.
        own_code: whether the exported code is needed.
        dtype: dtype of the weights, e.g. ``bfloat16``. parameters: number of parameters.
        tokenizer: whether the folder has a tokenizer. chat: whether the tokenizer has a chat template.
        heads: name of the file with the objective's own parameters, empty if there is none.
        adapter: whether only adapters were exported. rows: number of embedding rows of their base model.
        metrics: split → metric → value. config: the run's resolved config. checkpoint: manifest of the converted
            checkpoint. made_by: versions of the packages.
    """

    name: str
    class_name: str
    own_code: bool
    dtype: str
    parameters: int
    tokenizer: bool
    chat: bool
    heads: str
    adapter: bool
    rows: int
    metrics: Mapping[str, Mapping[str, float | None]]
    config: Mapping[str, Any]
    checkpoint: Manifest
    made_by: str

    def text(self) -> str:
        """Return the card as Markdown, with the metadata that the Hugging Face hub reads."""
        objective = self.config.get("objective", {}).get("name", "")
        head = {
            "library_name": "peft" if self.adapter else "transformers",
            **({"pipeline_tag": "text-generation"} if self.tokenizer else {}),
            "tags": ["jepa_scale", *([objective] if objective else [])],
        }
        code = f" Its code, `{FILE}`, is in the same folder." if self.own_code else ""
        what = f"LoRA adapters of a `{self.class_name}`" if self.adapter else "A causal language model"
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
            f"# {self.name}",
            f"{what}, {self.parameters:,} parameters in {self.dtype}, trained with jepa_scale's objective "
            f"`{objective}`." + ("" if self.adapter else f" It loads as `{self.class_name}`.{code}"),
            "## Use",
            f"```python\n{self._usage()}\n```",
        ]
        if not self.tokenizer:
            parts.append("The data had no tokenizer: the model takes and gives token ids, not text.")
        if self.heads:
            parts.append(f"`{self.heads}` holds the objective's own trained parameters; transformers does not read it.")
        if rows := self._rows():
            parts += ["## Metrics", "\n".join(["| split | metric | value |", "|---|---|--:|", *rows])]
        manifest = self.checkpoint
        parts += [
            "## Training",
            f"Optimizer step {manifest.step:,}; {manifest.engine} ({manifest.layout}) on {manifest.world_size} "
            f"rank{'s' if manifest.world_size != 1 else ''}."
            + (f" {manifest.state['tokens']:,} tokens." if isinstance(manifest.state.get("tokens"), int) else ""),
            f"```yaml\n{yaml.safe_dump(_public(self.config), sort_keys=False, allow_unicode=True, width=100)}```",
            f"Converted by {self.made_by}. `conversion.json` lists the files with their SHA-256.",
        ]
        return "\n\n".join(parts) + "\n"

    def _rows(self) -> list[str]:
        return [
            f"| {split} | {describe(name).label} | {format_number(value)} |"
            for split, values in self.metrics.items()
            for name, value in values.items()
            if value is not None
        ]

    def _usage(self) -> str:
        trust = ", trust_remote_code=True" if self.own_code else ""
        lines = [
            f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if self.tokenizer else ''}",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{"BASE" if self.adapter else "PATH"}"{trust})',
        ]
        if self.adapter:
            lines[0] = f"from peft import PeftModel\n{lines[0]}"
            lines += [
                f"if model.get_input_embeddings().num_embeddings < {self.rows}:",
                f"    model.resize_token_embeddings({self.rows})",
                'model = PeftModel.from_pretrained(model, "PATH")',
            ]
        if self.chat:
            lines += [
                f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})',
                'messages = [{"role": "user", "content": "Hello"}]',
                'ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
                "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))",
            ]
        elif self.tokenizer:
            lines += [
                f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})',
                'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
                "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
            ]
        return "\n".join(lines)


def _public(value: Any) -> Any:
    """Return a config without passwords and without the machine's folders, because cards are published."""
    if isinstance(value, Mapping):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if isinstance(value, str):
        if is_url(value):
            return "pipe:…" if value.startswith("pipe:") else redacted_url(value)
        if value.startswith(("/", "~")):
            return f"…/{PurePath(value).name}"
    return value
