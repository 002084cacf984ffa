"""A card offers what the model does, and its example runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from jepa_scale.checkpoint import store
from jepa_scale.cli.main import main
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.utils.errors import InputError
from tests.convert.runs import MODELS, NATIVE, make_run, without_jepa_scale
from tests.text_runs import data_section, write_corpus

CONCEPT = {"name": "concept", "tap_layer": 1}
EXAMPLES = """
import contextlib, io, json
found = {}
for name, code in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    found[name] = out.getvalue()
print(json.dumps(found))
"""


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def block(text: str, language: str) -> str:
    (found,) = [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]
    return found


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """A folder for each kind of card: name → its metadata and text."""
    folder = tmp_path_factory.mktemp("cards")
    write_corpus(folder)
    messages = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(12)]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    text = data_section(folder)
    chat = {"source": "chat", "path": str(folder / "chat.jsonl"), "vocab_size": 300, "cache": str(folder / "cache")}
    make_run(folder, "text", MODELS["native_polar"], data=text, eval={})
    make_run(folder, "chat", NATIVE, data=chat, eval={})
    make_run(folder, "ids", NATIVE)
    make_run(folder, "next_latent", NATIVE, data=text, eval={}, objective={"name": "next_latent"})
    make_run(folder, "origin", MODELS["llama"], data=text, eval={})
    export(folder / "origin", folder / "base", ExportOptions(progress=False))
    pretrained = {"family": "huggingface", "pretrained": str(folder / "base"), "lora": {"rank": 4}}
    make_run(folder, "adapter", pretrained, data=text, eval={})
    make_run(folder, "encoder", NATIVE, data=text, eval={}, objective={"name": "span"})
    make_run(folder, "own_encoder", MODELS["native_polar"], data=text, eval={})
    options = {
        "next_latent": {"heads": True},
        "adapter": {"adapter": True},
        "encoder": {"to": "sentence-transformers"},
        "own_encoder": {"to": "sentence-transformers"},
    }
    names = ("text", "chat", "ids", "next_latent", "adapter", "encoder", "own_encoder")
    for name in names:
        export(folder / name, folder / "out" / name, ExportOptions(progress=False, **options.get(name, {})))
    return folder, {name: card_of(folder / "out" / name) for name in names}


def test_examples_run_as_they_stand(cards):
    folder, found = cards
    encoders = ("encoder", "own_encoder")
    codes = {}
    for name, (_, text) in found.items():
        code = block(text, "python").replace("PATH", str(folder / "out" / name)).replace("BASE", str(folder / "base"))
        assert "trust_remote_code=True" in code or name not in ("text", "own_encoder")
        codes[name] = code
    said = without_jepa_scale(EXAMPLES, json.dumps({n: code for n, code in codes.items() if n not in encoders}))
    assert all(said.values())
    assert said["text"].startswith("Once upon a time") and "<|user|>Hello" in said["chat"]
    assert re.match(r"tensor\(\[\[ ?1, +2, +3, +\d+, ", said["ids"])
    pytest.importorskip("sentence_transformers")
    said = without_jepa_scale(EXAMPLES, json.dumps({name: codes[name] for name in encoders}))
    for name in encoders:
        rows = torch.tensor(json.loads(said[name].partition("tensor(")[2].rpartition(")")[0]))
        torch.testing.assert_close(rows.diagonal(), torch.ones(3), atol=1e-3, rtol=0)  # it prints four digits


def test_metadata_names_library_and_task(cards):
    heads = {name: head for name, (head, _) in cards[1].items()}
    text = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert heads["text"] == {**text, "tags": ["jepa_scale", "lm"]}
    assert heads["next_latent"] == {**text, "tags": ["jepa_scale", "next_latent"]}
    assert heads["adapter"] == {**text, "library_name": "peft", "tags": ["jepa_scale", "lm"]}
    assert heads["ids"] == {"library_name": "transformers", "tags": ["jepa_scale", "lm"]}
    assert heads["encoder"] == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "jepa_scale", "span"],
    }


def test_a_card_offers_nothing_else(cards):
    texts = {name: text for name, (_, text) in cards[1].items()}
    assert "Once upon" not in texts["encoder"] and "causal" not in texts["encoder"].lower().split("```yaml")[0]
    assert "An encoder of texts: the last of the states of a `LlamaModel`" in texts["encoder"]
    assert "An encoder of texts: the mean of the states of a `JepaDecoderModel`" in texts["own_encoder"]
    assert "`modeling_jepa_decoder.py`, is in the same folder" in texts["own_encoder"]
    assert "`jepa_heads.safetensors` holds the objective's own trained parameters" in texts["next_latent"]


def test_decoder_and_heads_alone_are_for_another_run(tmp_path, capsys):
    """Their card's command, with the card's own config, gives back every tensor."""
    module = make_run(tmp_path, "run", NATIVE, objective=CONCEPT)
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / "run"), "--to", "hf", "--heads", "--out", str(out), "--no-progress"]) == 0
    head, text = card_of(out)
    assert head == {"library_name": "jepa_scale", "tags": ["jepa_scale", "concept"]}
    assert "A causal" not in text and "python" not in text
    assert "the decoder alone does not do what the run does" in text
    assert not (out / "generation_config.json").exists()
    (tmp_path / "config.yaml").write_text(block(text, "yaml"))
    command = block(text, "bash").replace("PATH", str(out)).replace("config.yaml", str(tmp_path / "config.yaml"))
    assert main(command.replace("runs/again", str(tmp_path / "again")).split()[1:]) == 0
    tensors = tmp_path / "again" / "checkpoints" / "step_00000000" / "tensors"
    names = {f"model/{name}": parameter for name, parameter in module.named_parameters()}
    back = store.read_whole(tensors, list(names))
    assert all(torch.equal(back[name], parameter) for name, parameter in names.items())
    capsys.readouterr()


# -- what is refused --------------------------------------------------------------------------------------------------

AGAIN = "or give its decoder and heads to another run by --to hf --heads"
REFUSED = [
    (
        "concept",
        ["--to", "hf"],
        "--to hf: objective 'concept' answers by its predictor and its bridge, which a decoder alone lacks, so its model cannot "
        f"leave as a causal language model; ask the run by jepa-scale generate RUN --subject … --relation …, {AGAIN}",
    ),
    (
        "concept",
        ["--to", "sentence-transformers"],
        "cannot leave as a sentence encoder; ask the run by jepa-scale generate",
    ),
    (
        "span",
        ["--to", "hf"],
        "--to hf: objective 'span' trains no next-token prediction, so its model cannot leave as a causal language model; "
        f"export it by --to sentence-transformers, {AGAIN}",
    ),
    (
        "grid",
        ["--to", "hf"],
        "objective 'grid' trains no next-token prediction and no decoder, so its model cannot leave as a causal language model; "
        f"evaluate the run by jepa-scale eval RUN, {AGAIN}",
    ),
    ("span", ["--to", "sentence-transformers", "--heads"], "--heads: belongs to --to hf; leave it out"),
    ("span", ["--to", "sentence-transformers", "--adapter"], "--adapter: belongs to --to hf; leave it out"),
    ("lm", ["--to", "hf", "--prompt", "query=x"], "--prompt: belongs to --to sentence-transformers; leave it out"),
    ("lm", ["--to", "sentence-transformers", "--prompt", "query"], "--prompt query: must be NAME=TEXT, such as"),
    ("lm", ["--to", "sentence-transformers", "--prompt", "=x"], "--prompt =x: must be NAME=TEXT, such as"),
    (
        "lm",
        ["--to", "sentence-transformers", "--prompt", "q=x", "--prompt", "q=y"],
        "--prompt q=y: q is given twice; remove one",
    ),
    ("lm", ["--to", "sentence-transformers", "--tokenizer", "none"], "the data have no tokenizer, and a sentence"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    write_corpus(folder)
    text = data_section(folder)
    make_run(folder, "lm", NATIVE, data=text, eval={})
    make_run(folder, "span", NATIVE, data=text, eval={}, objective={"name": "span"})
    make_run(folder, "concept", NATIVE, objective=CONCEPT)
    frames = [[[i % 3, 1], [0, 2]] for i in range(4)]
    (folder / "frames.jsonl").write_text(json.dumps({"frames": frames}) + "\n")
    grids = {"source": "grids", "path": str(folder / "frames.jsonl")}
    make_run(folder, "grid", NATIVE, data=grids, eval={}, objective={"name": "grid", "dim": 16, "vq_codes": 8})
    return folder


@pytest.mark.parametrize(("name", "flags", "message"), REFUSED)
def test_a_form_that_an_objective_lacks_is_refused_with_the_way_that_works(runs, capsys, name, flags, message):
    assert main(["convert", str(runs / name), *flags, "--out", str(runs / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jepa-scale: ") and error.count("\n") == 1 and message in error, error
    assert not (runs / "out").exists()


def test_adapters_of_a_model_that_is_no_language_model_are_refused(tmp_path):
    """With ``--heads`` too: no run takes adapters without their model."""
    write_corpus(tmp_path)
    text = data_section(tmp_path)
    make_run(tmp_path, "origin", MODELS["llama"], data=text, eval={})
    export(tmp_path / "origin", tmp_path / "base", ExportOptions(progress=False))
    pretrained = {"family": "huggingface", "pretrained": str(tmp_path / "base"), "lora": {"rank": 4}}
    module = make_run(tmp_path, "run", pretrained, data=text, eval={}, objective={"name": "span"})
    for heads in (False, True):
        with pytest.raises(InputError, match="'span' trains no next-token prediction"):
            export(tmp_path / "run", tmp_path / "out", ExportOptions(adapter=True, heads=heads, progress=False))
    assert not (tmp_path / "out").exists() and module is not None


def test_a_span_that_also_predicts_tokens_leaves_as_both(tmp_path):
    write_corpus(tmp_path)
    objective = {"name": "span", "lm_weight": 1.0}
    make_run(tmp_path, "run", NATIVE, data=data_section(tmp_path), eval={}, objective=objective)
    for to, library in (("hf", "transformers"), ("sentence-transformers", "sentence-transformers")):
        export(tmp_path / "run", tmp_path / to, ExportOptions(to=to, progress=False))
        assert card_of(tmp_path / to)[0]["library_name"] == library
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
