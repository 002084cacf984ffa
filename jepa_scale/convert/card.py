"""The model card: description, usage, metrics and training of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import yaml

from jepa_scale.checkpoint.manifest import Manifest
from jepa_scale.config.values import is_url
from jepa_scale.convert.standalone import FILE
from jepa_scale.data.files.addresses import redacted_url
from jepa_scale.telemetry.metrics import describe
from jepa_scale.utils.format import format_number

Form = Literal["causal_lm", "sentence_encoder", "heads"]
"""What a model leaves as; ``heads`` = its decoder and the objective's own parameters, for another run."""
_TASKS = {"causal_lm": "text-generation", "sentence_encoder": "sentence-similarity"}
_LIBRARIES = {"causal_lm": "transformers", "sentence_encoder": "sentence-transformers", "heads": "jepa_scale"}


@dataclass(frozen=True, slots=True)
class Card:
    """Content of the model card.

    Attributes:
        form: what the model leaves as. pooling: of the states of a sentence encoder.
        name: name of the run. class_name: the model's class, in transformers or in the exported code.
        own_code: whether the exported code is needed.
        dtype: dtype of the weights, e.g. ``bfloat16``. parameters: number of parameters.
        tokenizer: whether the folder has a tokenizer. chat: whether the tokenizer has a chat template.
        heads: name of the file with the objective's own parameters, empty if there is none.
        adapter: whether only adapters were exported. rows: number of embedding rows of their base model.
        metrics: split → metric → value. config: the run's resolved config. checkpoint: manifest of the converted
            checkpoint. made_by: versions of the packages.
    """

    form: Form
    pooling: str
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
        library = "peft" if self.adapter else _LIBRARIES[self.form]
        tags = ["sentence-transformers", "feature-extraction"] if self.form == "sentence_encoder" else []
        head = {
            "library_name": library,
            **({"pipeline_tag": _TASKS[self.form]} if self.tokenizer and self.form in _TASKS else {}),
            "tags": [*tags, "jepa_scale", *([objective] if objective else [])],
        }
        parts = [
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
            f"# {self.name}",
            f"{self._what()}, {self.parameters:,} parameters in {self.dtype}, trained with jepa_scale's objective "
            f"`{objective}`.{self._loads()}",
            "## Use",
            self._usage(),
        ]
        if not self.tokenizer and self.form == "causal_lm":
            parts.append("The data had no tokenizer: the model takes and gives token ids, not text.")
        if self.heads and self.form == "causal_lm":
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

    def _what(self) -> str:
        if self.adapter:
            return f"LoRA adapters of a `{self.class_name}`"
        if self.form == "sentence_encoder":
            return f"An encoder of texts: the {self.pooling} of the states of a `{self.class_name}`"
        return (
            "A causal language model" if self.form == "causal_lm" else f"The decoder, a `{self.class_name}`, of a run"
        )

    def _loads(self) -> str:
        code = f" Its code, `{FILE}`, is in the same folder." if self.own_code else ""
        if self.adapter:
            return ""
        if self.form == "heads":
            return (
                f" The run answers by the objective's own parameters, which are in `{self.heads}`: loaded in transformers, the "
                f"decoder alone does not do what the run does.{code}"
            )
        return code if self.form == "sentence_encoder" else f" It loads as `{self.class_name}`.{code}"

    def _usage(self) -> str:
        if self.form == "heads":
            return (
                "With jepa_scale, and the config below as `config.yaml`, it begins another run:\n\n"
                "```bash\njepa-scale convert PATH --from hf --config config.yaml --out runs/again\n```"
            )
        return (
            "```python\n"
            + "\n".join(self._encodes() if self.form == "sentence_encoder" else self._generates())
            + "\n```"
        )

    def _encodes(self) -> list[str]:
        return [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("PATH"{", trust_remote_code=True" if self.own_code else ""})',
            'embeddings = model.encode(["The lake is frozen.", "There is ice on the lake.", "The train was late."])',
            "print(model.similarity(embeddings, embeddings))",
        ]

    def _generates(self) -> list[str]:
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
        if self.tokenizer:
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})')
        if self.chat:
            lines += [
                'messages = [{"role": "user", "content": "Hello"}]',
                'ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
                "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))",
            ]
        elif self.tokenizer:
            lines += [
                'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids',
                "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
            ]
        else:
            lines[0] = f"import torch\n{lines[0]}"
            lines.append("print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5))")
        return lines


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
