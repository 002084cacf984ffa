"""The table of families is what its script writes, and no family trains that computes otherwise."""

from __future__ import annotations

import json

import pytest
import transformers

from benchmarks.families import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, REPOSITORY, VARIANTS, measure, outcome, table

FILE, PAGE = REPOSITORY / "benchmarks/results/families.json", REPOSITORY / "docs/results/families.md"


def test_the_page_has_the_table_of_every_family():
    found = json.loads(FILE.read_text())
    assert PAGE.read_text().endswith("<!-- measured -->\n" + table(found))
    assert not [name for name, of in found["families"].items() if of["result"] == "different"]
    if found["transformers"] == transformers.__version__:
        assert list(found["families"]) == [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


@pytest.mark.parametrize(
    ("name", "result", "reason"),
    [
        ("qwen3", "equal", ""),
        ("qwen2 with a window", "equal", ""),
        ("nemotron", "padded", "NemotronForCausalLM cannot run on packed segments"),
        ("mamba", "padded", "MambaForCausalLM does not compute on packed segments"),
        ("openai-gpt", "refused", "does not support another attention"),
        ("gemma3", "refused", "is not a single stack of blocks with a final norm"),  # too large to be made
    ],
)
def test_a_family_of_each_kind(name, result, reason):
    found = outcome(name)
    assert found["result"] == result and reason in found.get("reason", "")


@pytest.mark.matrix
def test_no_family_of_the_installed_transformers_computes_otherwise():
    found = measure()
    assert not {name: of for name, of in found.items() if of["result"] == "different"}
    assert sum(of["result"] == "equal" for of in found.values()) > 60
