"""An exported encoder gives, in sentence-transformers and without jepa_scale, the vectors of ``jepa-scale encode``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import jepa_scale
from jepa_scale.convert.sentence_encoder import tokenizer_of_texts
from jepa_scale.convert.to_hf import ExportOptions, export
from jepa_scale.convert.tokenizer import named_tokenizer
from jepa_scale.data.prepare.encoders.chat_tokens import encode_text
from jepa_scale.data.prepare.encoders.tokenizer import train_bpe
from jepa_scale.utils.errors import InputError
from tests.convert.runs import MODELS, give_code_of_its_own, make_run, without_jepa_scale
from tests.text_runs import data_section, write_corpus

ENCODER = ExportOptions(to="sentence-transformers", progress=False)
TEXTS = ["the wave", " judge of the law ", "a goat near the barn", "<|endoftext|> is text", "wave " * 90, "a\n\nb"]
RUNS = {
    "span_llama": ("native", "span"),
    "span_own": ("native_polar", "span"),
    "span_qwen3": ("qwen3", "span"),
    "two_view_own": ("native_tied", "two_view"),
    "two_view_gpt2": ("gpt2", "two_view"),
    "lm_own": ("native_bridge", "lm"),
    "lm_mixtral": ("mixtral", "lm"),
}
"""Each objective on native decoders and on those of transformers."""
CHECK = """
import json
from pathlib import Path
import numpy as np
from sentence_transformers import SentenceTransformer

root, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for folder in sorted(root.iterdir()):
    model = SentenceTransformer(str(folder), trust_remote_code=(folder / "modeling_jepa_decoder.py").exists(), device="cpu")
    np.save(Path(sys.argv[3]) / f"{folder.name}.npy", model.encode(texts, batch_size=4, show_progress_bar=False))
    one = model.encode([texts[0]], prompt_name="query", show_progress_bar=False)
    np.save(Path(sys.argv[3]) / f"{folder.name}_query.npy", one)
    found[folder.name] = [type(model[0].model).__name__, model.prompts, str(model.similarity_fn_name)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    write_corpus(folder)
    rows = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "the sea"}]} for t in TEXTS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {"source": "chat", "path": str(folder / "chat.jsonl"), "vocab_size": 300, "cache": str(folder / "cache")}
    for name, (model, objective) in RUNS.items():
        data = chat if objective == "two_view" else data_section(folder)
        make_run(folder, name, MODELS[model], data=data, eval={}, objective={"name": objective})
        options = ExportOptions(to="sentence-transformers", progress=False, prompts={"query": "a ship: "})
        export(folder / name, folder / "hf" / name, options)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    pytest.importorskip("sentence_transformers")
    (folder / "rows").mkdir()
    return without_jepa_scale(CHECK, str(folder / "hf"), json.dumps(TEXTS), str(folder / "rows"))


@pytest.mark.parametrize("name", RUNS)
def test_rows_are_those_of_encode_where_jepa_scale_is_not_installed(folder, found, name):
    """Texts of several lengths in one padded batch, one of them too long, two with what tokenizers like to change."""
    run = jepa_scale.load(folder / name)
    ours = run.encode(TEXTS, truncate=True)
    assert ours.std() > 0.1
    np.testing.assert_allclose(np.load(folder / "rows" / f"{name}.npy"), ours, rtol=0, atol=1e-5)
    query = np.load(folder / "rows" / f"{name}_query.npy")
    np.testing.assert_allclose(query, run.encode([f"a ship: {TEXTS[0]}"]), rtol=0, atol=1e-5)
    other = run.encode(TEXTS, "mean" if run.module.objective.pooling == "last" else "last", truncate=True)
    assert np.abs(other - ours).max() > 0.1


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_says_what_it_is(folder, name):
    out = folder / "hf" / name
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    chosen = [mode for mode, on in pooling.items() if mode.startswith("pooling_mode") and on]
    assert chosen == ["pooling_mode_lasttoken" if name.startswith("span") else "pooling_mode_mean_tokens"]
    assert pooling["word_embedding_dimension"] == 32
    settings = json.loads((out / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "a ship: ", "document": ""} and settings["similarity_fn_name"] == "cosine"
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] in (64, 512, 32768, 131072)
    assert not {"chat_template.jinja", "generation_config.json"} & {path.name for path in out.iterdir()}
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    (class_name,) = json.loads((out / "config.json").read_text())["architectures"]
    assert "CausalLM" not in class_name
    assert json.loads((out / "conversion.json").read_text())["options"]["to"] == "sentence-transformers"


def test_the_library_loads_the_same_class_and_settings(folder, found):
    for name in RUNS:
        (wanted,) = json.loads((folder / "hf" / name / "config.json").read_text())["architectures"]
        assert found[name] == [wanted, {"query": "a ship: ", "document": ""}, "cosine"]


def test_names_are_those_of_the_model_without_its_head(folder, tmp_path):
    """As ``save_pretrained`` of that class writes them, so that no loader has to look for a prefix."""
    from safetensors import safe_open

    for name in ("span_qwen3", "two_view_gpt2", "lm_mixtral"):
        AutoModel.from_pretrained(folder / "hf" / name).save_pretrained(tmp_path / name)
        keys = []
        for place in (folder / "hf" / name, tmp_path / name):
            with safe_open(place / "model.safetensors", "pt") as file:
                keys.append(set(file.keys()))
        assert keys[0] == keys[1] and not any("lm_head" in key for key in keys[0])


# -- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer(folder: Path, template: str = "", **special: str) -> str:
    """A BPE tokenizer that puts ``template`` around a text by default."""
    trained = train_bpe(iter(["the wave of the sea, a ship and a sail " * 3]), 280, folder / "cache", chat=False)
    made = PreTrainedTokenizerFast(tokenizer_object=trained.backend_tokenizer, **special)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    if template:
        ids = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    made.chat_template = "{{ messages[0]['content'] }}"
    made.padding_side = "left"
    made.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


@pytest.mark.parametrize(
    ("template", "bos"), [("", False), ("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False)]
)
def test_a_text_becomes_the_ids_that_a_run_encodes(tmp_path, template, bos):
    """No EOS, whatever the tokenizer adds; BOS if it begins texts with it; no special token out of a text's own words."""
    name = tokenizer(tmp_path, template)
    made = tokenizer_of_texts(named_tokenizer(name), 40)
    for path, content in made.files.items():
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / path).write_bytes(content)
    given, saved = AutoTokenizer.from_pretrained(name), AutoTokenizer.from_pretrained(tmp_path / "made")
    texts = ["the wave", " a  ship\n", "a </s> b <s> c <|endoftext|>"]
    wanted = [[*([given.bos_token_id] if bos else []), *encode_text(given, text)] for text in texts]
    assert [saved(text)["input_ids"] for text in texts] == wanted
    assert saved.eos_token_id not in sum(wanted, [])
    batch = saved(texts, padding=True)
    lengths = [sum(mask) for mask in batch["attention_mask"]]
    assert [ids[:n] for ids, n in zip(batch["input_ids"], lengths, strict=True)] == wanted  # padded on the right
    assert saved.model_max_length == 40 and saved.chat_template is None and not made.chat
    assert (
        saved("the wave " * 90, truncation=True)["input_ids"]
        == [
            *([given.bos_token_id] if bos else []),
            *encode_text(given, "the wave " * 90),
        ][:40]
    )


def test_a_run_without_a_tokenizer_is_no_encoder_of_texts(tmp_path):
    make_run(tmp_path, "run", MODELS["native"])
    message = (
        "the data have no tokenizer, and a sentence encoder takes texts; name one by --tokenizer DIR, or use --to hf"
    )
    with pytest.raises(InputError, match=message):
        export(tmp_path / "run", tmp_path / "out", ENCODER)
    assert not (tmp_path / "out").exists()


def test_code_of_its_own_must_name_a_class_for_states(tmp_path):
    make_run(tmp_path, "origin", MODELS["llama"])
    start = tmp_path / "start"
    export(tmp_path / "origin", start, ExportOptions(progress=False))
    give_code_of_its_own(start, "mine2")
    make_run(tmp_path, "run", {"family": "huggingface", "pretrained": str(start), "trust_remote_code": True})
    with pytest.raises(InputError, match="AutoModel of transformers has no class for the states of a MineForCausalLM"):
        export(tmp_path / "run", tmp_path / "out", ENCODER)
    assert not (tmp_path / "out").exists()
