"""What leaves loads in transformers alone: same class, same logits, it generates, its tokenizer and templates are there."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jepa_scale import train
from jepa_scale.checkpoint import Manifest
from jepa_scale.convert.skeleton import llama_config
from jepa_scale.convert.to_hf import ExportOptions, export, metrics_at
from jepa_scale.data import load_data, parse_data
from jepa_scale.models.decoder import JepaDecoderConfig
from jepa_scale.utils.errors import InputError
from jepa_scale.utils.format import format_number
from tests.convert.runs import (
    GPT2,
    MODELS,
    NATIVE,
    config_file,
    give_code_of_its_own,
    logits,
    make_run,
    without_jepa_scale,
    write_checkpoint,
)
from tests.data.corpus import write_text

SEQUENCES = [[1, 5, 9, 2, 7, 7, 3], [4, 4, 8], [11, 3, 2, 30, 12]]
QUIET = ExportOptions(progress=False)
CLASSES = {
    "native": "LlamaForCausalLM",
    "native_tied": "JepaDecoderForCausalLM",
    "native_polar": "JepaDecoderForCausalLM",
    "native_bridge": "JepaDecoderForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
CHECK = """
import json
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM

root, sequences = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for folder in sorted(root.iterdir()):
    own = (folder / "modeling_jepa_decoder.py").exists()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=own, dtype=torch.float32, output_loading_info=True
    )
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    model.eval()
    with torch.no_grad():
        each = [model(torch.tensor([s])).logits[0] for s in sequences]
        longest = max(map(len, sequences))
        padded = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
        made = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        greedy = []
        for s in sequences:  # without the cache
            ids = list(s)
            for _ in range(4):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            greedy.append(ids[len(s):])
    torch.save(each, Path(sys.argv[3]) / f"{folder.name}.pt")
    found[folder.name] = {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "problems": problems,
        "generated": made[:, longest:].tolist() == greedy,
        "dtype": str(AutoConfig.from_pretrained(folder, trust_remote_code=own).dtype),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every family exported, and what a process without jepa_scale found."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "hf").mkdir()
    (folder / "logits").mkdir()
    modules = {}
    for name, model in MODELS.items():
        modules[name] = make_run(folder, name, model)
        export(folder / name, folder / "hf" / name, ExportOptions(progress=False, shard_bytes=20_000))
    found = without_jepa_scale(CHECK, str(folder / "hf"), json.dumps(SEQUENCES), str(folder / "logits"))
    return folder, modules, found


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_ours_where_jepa_scale_is_not_installed(exported, name):
    folder, modules, found = exported
    assert found[name]["class"] == CLASSES[name]
    assert found[name]["problems"] == []
    assert found[name]["dtype"] == "torch.float32"
    own = CLASSES[name] == "JepaDecoderForCausalLM"
    assert found[name]["module"].startswith("transformers_modules" if own else "transformers.models")
    for ours, theirs in zip(
        logits(modules[name].backbone, SEQUENCES), torch.load(folder / "logits" / f"{name}.pt"), strict=True
    ):
        assert ours.std() > 0.01  # else nothing could differ
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "llama"),
    [
        ({}, True),
        ({"drop_path": 0.3, "hidden_dropout": 0.1}, True),  # they matter to training alone
        ({"tie_word_embeddings": True}, False),  # they have a logit_scale
        ({"output_bias": True}, False),
        ({"position_embedding": "pope"}, False),
        ({"embedding_norm": True}, False),
        ({"bridge_after": 2}, False),
    ],
)
def test_it_leaves_as_a_llama_where_a_llama_computes_the_same(keys, llama):
    assert (llama_config(JepaDecoderConfig(**keys)) is not None) is llama


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_cache_and_padding_is_greedy_decoding(exported, name):
    assert exported[2][name]["generated"]


@pytest.mark.parametrize("name", MODELS)
def test_files_are_bounded_and_the_index_names_each_tensor_once(exported, name):
    out = exported[0] / "hf" / name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert [s.name for s in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    held = {}
    for shard in shards:
        tensors = load_file(shard)
        held |= {key: shard.name for key in tensors}
        largest = max(t.nbytes for t in tensors.values())
        assert sum(t.nbytes for t in tensors.values()) <= max(20_000, largest)
    assert held == index["weight_map"]
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())


def test_names_and_shapes_are_those_of_save_pretrained(exported, tmp_path):
    """Also where transformers holds a mixture's experts in one tensor and writes them one by one."""
    folder, modules, _ = exported
    for name in ("gpt2", "qwen3", "mixtral"):
        modules[name].backbone.decoder.save_pretrained(tmp_path / name)
        theirs = load_file(tmp_path / name / "model.safetensors")
        ours = {k: v for s in (folder / "hf" / name).glob("*.safetensors") for k, v in load_file(s).items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_trained_run_scores_in_transformers_what_its_own_evaluation_says(tmp_path, monkeypatch):
    """Training, its checkpoint and its metrics, all real."""
    write_text(tmp_path / "data", [30, 20], valid=9)
    data = {"source": "text", "path": str(tmp_path / "data"), "max_length": 64}
    steps = {"steps": 12, "batch_size": 8, "log_every": 4}
    file = config_file(
        tmp_path, "run", MODELS["native_tied"], data=data, train=steps, optim={"lr": 1e-2, "warmup_steps": 2}
    )
    monkeypatch.setattr("jepa_scale.training.run.quiet_libraries", lambda: None)
    assert train.main(["--config", str(file)]) == 0
    made = export(tmp_path / "run", tmp_path / "hf", QUIET)
    assert made.checkpoint.name == "step_00000012"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    valid = load_data(parse_data(data)).splits["valid"]
    for number in range(len(valid)):
        tokens, _ = valid[number].lm_sequence()
        ids = torch.tensor(list(map(int, tokens)))[None]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (told,) = [row["lm_loss"] for row in rows if row["split"] == "eval/valid"]
    assert total / count == pytest.approx(told, abs=1e-5) and told < 3.5
    assert f"| valid | lm_loss [nats/token] | {format_number(told)} |" in (tmp_path / "hf" / "README.md").read_text()


def test_bf16_is_the_rounded_model_in_one_file(tmp_path):
    module = make_run(tmp_path, "run", NATIVE)
    made = export(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="bfloat16", progress=False))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert made.files == 1 and not (tmp_path / "out" / "model.safetensors.index.json").exists()
    for name, parameter in module.backbone.decoder.named_parameters():
        assert torch.equal(tensors[name], parameter.to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_fp16_says_what_it_cannot_hold(tmp_path):
    module = make_run(tmp_path, "run", NATIVE)
    tensors = {f"model/{n}": p.detach().clone() for n, p in module.named_parameters()}
    tensors["model/backbone.decoder.model.norm.weight"][3] = 7e4
    write_checkpoint(tmp_path / "run", 8, tensors)
    with pytest.raises(InputError, match=r"model.norm.weight: holds 7e\+04, more than torch.float16 can.*bfloat16"):
        export(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float16", progress=False))


def test_heads_go_into_a_file_of_their_own(tmp_path):
    concept = {"name": "concept", "tap_layer": 1, "memory": True, "concept_dim": 8}
    module = make_run(tmp_path, "run", NATIVE, objective=concept)
    made = export(tmp_path / "run", tmp_path / "out", ExportOptions(heads=True, dtype="bfloat16", progress=False))
    heads = load_file(tmp_path / "out" / "jepa_heads.safetensors")
    wanted = {f"objective.{name}": p for name, p in module.objective.named_parameters()}
    assert made.heads and heads.keys() == wanted.keys() and len(wanted) > 2
    assert all(torch.equal(heads[name], wanted[name]) for name in wanted)  # not rounded: training goes on with them
    assert not [n for n in load_file(tmp_path / "out" / "model.safetensors") if n.startswith("objective")]
    assert "`jepa_heads.safetensors`" in (tmp_path / "out" / "README.md").read_text()
    horizon = {"name": "horizon", "tap_layer": 1, "horizons": [1, 2], "horizon_probs": [1, 1]}
    make_run(tmp_path, "horizon", NATIVE, objective=horizon)
    export(tmp_path / "horizon", tmp_path / "plain", QUIET)
    assert not (tmp_path / "plain" / "jepa_heads.safetensors").exists()
    make_run(tmp_path, "lm", NATIVE)
    assert not export(tmp_path / "lm", tmp_path / "lm_out", ExportOptions(heads=True, progress=False)).heads


def test_newest_whole_checkpoint_is_taken_and_a_damaged_one_named(tmp_path, caplog):
    module = make_run(tmp_path, "run", NATIVE, step=3)
    tensors = {f"model/{n}": p.detach() for n, p in module.named_parameters()}
    for step, change in ((10, 1.0), (20, 2.0)):
        write_checkpoint(tmp_path / "run", step, {n: t + change for n, t in tensors.items()})
    broken = tmp_path / "run" / "checkpoints" / "step_00000020" / "tensors" / "__0_0.distcp"
    raw = bytearray(broken.read_bytes())
    raw[len(raw) // 2] ^= 1
    broken.write_bytes(raw)
    made = export(tmp_path / "run", tmp_path / "out", QUIET)
    assert made.checkpoint.name == "step_00000010"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("jepa_scale")]
    assert ours == [f"{broken.parents[1]} is damaged and left out: {broken}: its checksum is wrong"]
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, tensors["model/backbone.decoder.model.norm.weight"] + 1.0)
    with pytest.raises(InputError, match=r"checksum is wrong \(1 in all\); give another checkpoint"):
        export(tmp_path / "run", tmp_path / "o2", ExportOptions(checkpoint="step_00000020", progress=False))
    path = str(tmp_path / "run" / "checkpoints" / "step_00000003")
    export(tmp_path / "run", tmp_path / "o3", ExportOptions(checkpoint=path, progress=False))
    norm = load_file(tmp_path / "o3" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, tensors["model/backbone.decoder.model.norm.weight"])


def test_checkpoint_of_another_model_is_refused(tmp_path):
    make_run(tmp_path, "run", NATIVE)
    make_run(tmp_path, "gpt2", GPT2)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())

    def refused(message: str, **model: object) -> None:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config, "model": {**config["model"], **model}}))
        with pytest.raises(InputError, match=message):
            export(tmp_path / "run", tmp_path / "out", QUIET)
        assert not (tmp_path / "out").exists()

    refused(r"no tensor backbone.decoder.model.layers.2.input_layernorm.weight and 8 others", num_hidden_layers=3)
    refused(r"has a tensor that the model lacks, backbone.decoder.model.layers.1.\S+ and 8 others", num_hidden_layers=1)
    refused(
        r"layers.0.mlp.gate_proj.weight has shape \(128, 32\), the model in config.yaml \(96, 32\)",
        intermediate_size=96,
    )
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "gpt2" / "config.yaml").read_text())
    with pytest.raises(
        InputError, match=r"step_00000007: the checkpoint has no tensor backbone.decoder.transformer.wte"
    ):
        export(tmp_path / "run", tmp_path / "out", QUIET)
    with pytest.raises(InputError, match="not a run directory"):
        export(tmp_path, tmp_path / "out", QUIET)


# -- tokenizers -------------------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "while",
    "it",
    "rained",
    "all",
    "day",
]
PIPELINE = """
import json
from pathlib import Path
from transformers import pipeline

found = {}
for name in ("text", "chat"):
    generator = pipeline("text-generation", model=str(Path(sys.argv[1]) / name), trust_remote_code=True, device="cpu")
    prompt = [{"role": "user", "content": "the quick"}] if name == "chat" else "the quick brown"
    found[name] = generator(prompt, max_new_tokens=5, do_sample=False)[0]["generated_text"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def with_tokenizers(tmp_path_factory):
    """A text run that leaves as itself and a chat run that leaves as a Llama, exported."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    chat = [[{"role": "user", "content": t[:20]}, {"role": "assistant", "content": t[20:]}] for t in text]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in chat))
    (folder / "hf").mkdir()
    datas = {}
    for name, model in (("text", MODELS["native_tied"]), ("chat", NATIVE)):
        data = {
            "source": name,
            "path": str(folder / f"{name}.jsonl"),
            "vocab_size": 280,
            "cache": str(folder / "cache"),
        }
        make_run(folder, name, model, data=data)
        export(folder / name, folder / "hf" / name, QUIET)
        datas[name] = load_data(parse_data(data))
    return folder, datas


def test_tokenizer_and_template_are_there_and_agree_with_the_model(with_tokenizers):
    folder, datas = with_tokenizers
    found = {}
    for name in ("text", "chat"):
        out = folder / "hf" / name
        tokenizer, config = AutoTokenizer.from_pretrained(out), AutoConfig.from_pretrained(out)
        generation = GenerationConfig.from_pretrained(out)
        found[name] = told = {
            "ids": tokenizer("the quick brown fox").input_ids,
            "template": tokenizer.chat_template,
            "stops": generation.eos_token_id,
            "pad": generation.pad_token_id,
            "config": [config.eos_token_id, config.pad_token_id],
            "vocabulary": [len(tokenizer), tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        }
        special = datas[name].special
        assert told["vocabulary"][:2] == [datas[name].vocab_size, special["eos"]]
        assert told["config"] == [special["eos"], special["pad"]] and told["pad"] == special["pad"]
        assert 3 <= len(told["ids"]) < 19  # words, not bytes
    assert found["text"]["stops"] == datas["text"].special["eos"]
    assert found["chat"]["stops"] == [datas["chat"].special["eos"], datas["chat"].special["end"]]
    assert found["chat"]["vocabulary"][2] == datas["chat"].special["end"]
    assert found["text"]["template"] is None and "<|assistant|>" in found["chat"]["template"]


@pytest.mark.matrix  # what is in the folder: above; the pipelines of transformers take long to import
def test_pipeline_generates_with_the_tokenizer_and_its_template(with_tokenizers):
    found = without_jepa_scale(PIPELINE, str(with_tokenizers[0] / "hf"))
    assert found["text"].startswith("the quick brown")
    assert [m["role"] for m in found["chat"]] == ["user", "assistant"]


def test_tokenizer_can_be_named_or_left_out(with_tokenizers, tmp_path):
    folder, datas = with_tokenizers
    export(folder / "chat", tmp_path / "none", ExportOptions(tokenizer="none", progress=False))
    assert not (tmp_path / "none" / "tokenizer.json").exists()
    assert "takes and gives token ids" in (tmp_path / "none" / "README.md").read_text()
    given = str(folder / "hf" / "chat")  # a whole model's folder: only the tokenizer's files are taken
    export(folder / "chat", tmp_path / "given", ExportOptions(tokenizer=given, progress=False))
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert kept <= {p.name for p in (tmp_path / "given").iterdir()}
    for name in kept:
        assert (tmp_path / "given" / name).read_bytes() == (folder / "hf" / "chat" / name).read_bytes()
    moved = make_run(tmp_path, "moved", NATIVE)
    assert moved
    config = yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())
    config["data"] = {"source": "text", "path": str(tmp_path / "gone.jsonl")}
    (tmp_path / "moved" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"gone.jsonl.*name the tokenizer's folder with --tokenizer"):
        export(tmp_path / "moved", tmp_path / "out", QUIET)
    with pytest.raises(InputError, match=r"tokenizer has 28\d ids, the model's embedding \d+ rows"):
        export(tmp_path / "moved", tmp_path / "out", ExportOptions(tokenizer=given, progress=False))


# -- the card ---------------------------------------------------------------------------------------------------------


def test_card_tells_metrics_of_the_step_and_config_without_private_paths(with_tokenizers, tmp_path):
    folder, _ = with_tokenizers
    rows = [
        {"step": 5, "split": "eval/valid", "tokens": 9, "ppl": 12.5},
        {"step": 7, "split": "train", "tokens": 9, "loss": 3.0},
        {"step": 7, "split": "eval/valid", "tokens": 9, "ppl": 11.25},
        {"step": 9, "split": "eval/valid", "tokens": 9, "ppl": 10.0},
    ]
    (folder / "chat" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(folder / "chat", tmp_path / "out", QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jepa_scale", "lm"]}
    assert "| valid | ppl | 11.25 |" in card and "12.5" not in card and "10.00" not in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["data"]["path"] == "…/chat.jsonl" and str(folder) not in card
    assert config["model"]["hidden_size"] == 32 and config["optim"]["lr"] == 1e-3
    assert "Optimizer step 7; fsdp (FSDP2 fp32) on 2 ranks. 1,234 tokens." in card
    assert "apply_chat_template" in card and "trust_remote_code=True" not in card
    assert "trust_remote_code=True" in (folder / "hf" / "text" / "README.md").read_text()


def test_metrics_of_a_run_without_rows(tmp_path):
    manifest = Manifest(step=4, engine="", layout="", world_size=1, updates=4, metrics={"eval/test/mrr": 0.5})
    assert metrics_at(tmp_path, manifest) == {"test": {"mrr": 0.5}}
    bare = Manifest(step=4, engine="", layout="", world_size=1, updates=4)
    assert metrics_at(tmp_path, bare) == {}
    summary = {"steps": 4, "final": {"train": {"loss": 1.0}, "eval/valid": {"ppl": 3.0}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert metrics_at(tmp_path, bare) == {"valid": {"ppl": 3.0}}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "steps": 5}))
    assert metrics_at(tmp_path, bare) == {}


def test_model_with_code_of_its_own_takes_it_along(tmp_path):
    """A run that began with ``pretrained`` and ``trust_remote_code``."""
    start = tmp_path / "start"
    make_run(tmp_path, "origin", MODELS["llama"])
    export(tmp_path / "origin", start, QUIET)
    give_code_of_its_own(start, "mine")
    model = {"family": "huggingface", "pretrained": str(start), "trust_remote_code": True}
    make_run(tmp_path, "run", model)
    made = export(tmp_path / "run", tmp_path / "out", QUIET)
    assert made.class_name == "MineForCausalLM"
    assert (tmp_path / "out" / "modeling_mine.py").read_text() == (start / "modeling_mine.py").read_text()
    auto_maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (tmp_path / "out", start)]
    assert auto_maps[0] == auto_maps[1] and auto_maps[0]["AutoConfig"] == "modeling_mine.MineConfig"


def test_tensor_files_are_what_the_library_writes(exported, tmp_path):
    shard = sorted((exported[0] / "hf" / "native").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    with safe_open(shard, "pt") as ours, safe_open(tmp_path / "theirs.safetensors", "pt") as theirs:
        assert ours.metadata() == theirs.metadata() and set(ours.keys()) == set(theirs.keys())
    assert shard.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size
