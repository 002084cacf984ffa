"""A run that is loaded again computes what it computed in training, whoever sharded it and whatever texts are batched with."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import jepa_scale
from jepa_scale import checkpoint
from jepa_scale.cli import encode, generate
from jepa_scale.config.loading import load_config
from jepa_scale.data.examples import Document
from jepa_scale.data.sampling.rng import SampleRNG
from jepa_scale.distributed.comm import ParallelContext
from jepa_scale.experiment import validate
from jepa_scale.inference import LoadedRun, _device, load
from jepa_scale.models.loading import build_backbone
from jepa_scale.models.options import ModelOptions
from jepa_scale.packing import pack
from jepa_scale.training.build import build
from jepa_scale.utils.errors import InputError
from tests.convert.runs import GPT2, huggingface, make_run
from tests.distributed.launch import run_ranks
from tests.distributed.small_runs import checkpoint as checkpoint_of
from tests.distributed.test_runs import train_runs
from tests.distributed.toy import small_buckets
from tests.objectives.helpers import alone
from tests.text_runs import NATIVE, config_file, data_section, write_corpus

TEXTS = ["the wave", "judge of the law with a trial", "ship", "a goat near the barn and the milk", "corn in the field"]


# --------------------------------------------------------------------------------------------- after training on ranks


def train_and_encode(ranks: ParallelContext, config: str, ids: list[list[int]]) -> dict[str, torch.Tensor]:
    """Train, build the run anew, and encode with the engine what its checkpoint holds, in the order of the texts."""
    train_runs(ranks, [(config, None)])
    run = build(validate(load_config(config)), ranks)
    found = checkpoint.find(Path(run.experiment.run.dir) / run.experiment.run.name, "auto")
    assert found is not None
    checkpoint.load(found, run.parts)
    run.engine.eval()
    views = [run.objective.text_views(Document(np.array(tokens)), SampleRNG(0, 0, 0, 0)) for tokens in ids]
    batch = pack(views)
    with torch.no_grad():
        out = run.engine.forward("encode", batch)
    return {name: out[name][batch.segments["text"]] for name in ("mean", "last")}


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_states_are_those_of_the_engine_that_trained(tmp_path, engine):
    sharded = {} if engine == "fsdp" else {"name": "deepspeed", "deepspeed": str(small_buckets(engine, str(tmp_path)))}
    config = str(config_file(tmp_path, engine=sharded))
    ids = [[7, 30, 12, 100, 41], [9], [50, 60, 70]]
    expected = run_ranks(train_and_encode, 2, config, ids)[0]
    before = torch.get_rng_state()
    run = jepa_scale.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before) and not dist.is_initialized()
    assert run.checkpoint.name == "step_00000004" and not run.module.training
    for pooling in ("mean", "last"):
        np.testing.assert_allclose(run.encode(ids, pooling), expected[pooling], atol=2e-6, rtol=1e-5)
    assert run.tokenizer("the wave")["input_ids"]


# --------------------------------------------------------------------------------------------- any backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a corpus and a run on it."""
    folder = tmp_path_factory.mktemp("inference")
    write_corpus(folder)
    make_run(folder, "native", NATIVE, data=data_section(folder), eval={})
    return folder


@pytest.fixture(scope="module")
def run(folder) -> LoadedRun:
    return jepa_scale.load(folder / "native")


def one_by_one(run: LoadedRun, texts: list[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [alone(run.module.backbone, run.tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("name", ["gpt2", "llama", "lora"])
def test_backbones_of_transformers_load_too(folder, tmp_path, name):
    model: dict[str, Any] = {"gpt2": GPT2}.get(name) or huggingface("llama", rms_norm_eps=1e-5)
    if name == "lora":
        torch.manual_seed(4)
        build_backbone(ModelOptions(**model), 290).decoder.save_pretrained(tmp_path / "base")
        lora = {"rank": 3, "targets": ["q_proj", "down_proj"]}
        model = {"family": "huggingface", "pretrained": str(tmp_path / "base"), "lora": lora}
    module = make_run(tmp_path, "run", model, data=data_section(folder), eval={})
    run = jepa_scale.load(tmp_path / "run")
    for (key, got), (_, expected) in zip(run.module.state_dict().items(), module.state_dict().items(), strict=True):
        torch.testing.assert_close(got, expected, atol=0, rtol=0, msg=key)
    expected = torch.stack([states.mean(0) for states in one_by_one(run, TEXTS)])
    np.testing.assert_allclose(run.encode(TEXTS), expected, atol=1e-5, rtol=1e-5)
    if name == "lora":  # 300 ids, of which the base has no more than 290: the rows of both parts count
        assert run.unembed(np.zeros((1, 32))).shape == (1, 300)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert len(base.get_input_embeddings().weight) == 290


# --------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("batch_tokens", [1, 9, 8192])
def test_rows_are_those_of_texts_one_by_one_however_batched(run, batch_tokens):
    states = one_by_one(run, TEXTS)
    mean, last = (run.encode(TEXTS, pooling, batch_tokens) for pooling in (None, "last"))
    assert mean.dtype == np.float32 and mean.shape == (5, 32)
    np.testing.assert_allclose(mean, torch.stack([s.mean(0) for s in states]), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(last, torch.stack([s[-1] for s in states]), atol=1e-5, rtol=1e-5)
    for got, expected in zip(run.tokens(TEXTS, batch_tokens), states, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_more_of_encode(run):
    unit = run.encode(TEXTS, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        unit * np.linalg.norm(run.encode(TEXTS), axis=1, keepdims=True), run.encode(TEXTS), atol=1e-5
    )
    ids = [run.tokenizer(text)["input_ids"] for text in TEXTS]
    np.testing.assert_array_equal(run.encode(ids), run.encode(TEXTS))
    assert run.encode([]).shape == (0, 32) and run.tokens([]) == []
    assert run.max_tokens == 128 and run.vocab_size == 300 and run.hidden_size == 32


def test_a_special_tokens_name_in_a_text_is_text(run):
    eos = run.tokenizer.eos_token
    assert run.data.special["eos"] not in run.tokenize([f"wave {eos} wave"]).tokens[0]


def test_a_text_that_is_too_long_is_cut_only_if_asked(run):
    long = "wave " * 200
    with pytest.raises(InputError, match=r"texts\[1\]: has \d{3} tokens, the model takes 128; .*truncate"):
        run.encode(["sea", long])
    ids = run.tokenizer(long)["input_ids"][:128]
    np.testing.assert_array_equal(run.encode([long], truncate=True), run.encode([ids]))
    assert len(run.tokens([long], truncate=True)[0]) == 128


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], r"texts\[1\]: is an empty text"),
        ([[1], []], r"texts\[1\]: is an empty text"),
        ([[1, 300]], r"texts\[0\]: token id 300 is outside the vocabulary of 300"),
        ([[1, -1]], r"texts\[0\]: token id -1 is outside"),
        ([[0.5]], r"texts\[0\]: must be a string, or a sequence of token ids"),
        (["a", None], r"texts\[1\]: must be a string, or a sequence of token ids"),
        ("a", "texts: is one string; give a list"),
    ],
)
def test_texts_that_cannot_be_encoded_are_named(run, texts, message):
    with pytest.raises(InputError, match=message):
        run.encode(texts)


def test_bad_arguments(run):
    with pytest.raises(InputError, match="pooling: must be mean or last, got 'max'"):
        run.encode(["a"], "max")
    with pytest.raises(InputError, match="batch_tokens: must be at least 1"):
        run.encode(["a"], batch_tokens=0)


def test_unembedding_is_by_the_embeddings(run):
    states = run.tokens(["the wave and the ship"])[0]
    weight = run.module.backbone.decoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(run.unembed(states), states @ weight.T, atol=1e-4, rtol=1e-4)


def test_without_a_tokenizer_ids_can_be_encoded(run):
    bare = LoadedRun(run.experiment, run.checkpoint, run.module, run.data, None, run.device)
    np.testing.assert_array_equal(bare.encode([[5, 6, 7]]), run.encode([[5, 6, 7]]))
    with pytest.raises(InputError, match=r"texts\[0\]: is a text, but the run's data have no tokenizer"):
        bare.encode(["a"])


# --------------------------------------------------------------------------------------------- what it says


def test_generation_goes_on_with_the_likeliest_token(run):
    prompts = ["the wave", "a judge and the", "milk"]
    stop = run.data.special["eos"]
    expected = []
    for prompt in prompts:
        ids = run.tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(run.module.backbone.logits(alone(run.module.backbone, ids)[-1:]).argmax()))
        ids = ids[: ids.index(stop, start)] if stop in ids[start:] else ids
        expected.append(run.tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :])
    assert run.generate(prompts, max_new_tokens=6, batch_size=2) == expected
    assert run.generate([]) == []


@pytest.mark.parametrize("objective", ["next_latent", "mtp"])
def test_drafts_change_no_text_and_are_counted(folder, tmp_path, objective):
    make_run(tmp_path, "run", NATIVE, data=data_section(folder), eval={}, objective={"name": objective})
    run = jepa_scale.load(tmp_path / "run")
    prompts = ["the wave", "a judge and the", "milk"]
    plain = run.generations(prompts, max_new_tokens=12)
    found = run.generations(prompts, max_new_tokens=12, draft=3)
    assert [text for text, _ in found] == [text for text, _ in plain] == run.generate(prompts, 12, draft=3)
    assert [g.tokens for _, g in found] == [g.tokens for _, g in plain]
    assert all(g.drafted and 0 <= g.accepted <= g.drafted <= 3 * g.forwards for _, g in found)
    with pytest.raises(InputError, match="^draft -1, temperature 0.0: must be 0 or more"):
        run.generate(prompts, draft=-1)
    if objective == "mtp":
        with pytest.raises(InputError, match="^draft: 4 is more than the 3 tokens that 'mtp' drafts"):
            run.generate(prompts, draft=4)


def test_samples_follow_the_seed_and_the_prompts_number(run):
    sample = lambda seed, prompts: run.generate(prompts, 20, temperature=3.0, seed=seed)  # noqa: E731
    first = sample(0, ["the wave"] * 3)
    assert first == sample(0, ["the wave"] * 3) and first[:2] == sample(0, ["the wave"] * 2)
    assert len({*first, *sample(1, ["the wave"] * 3)}) == 6
    with pytest.raises(InputError, match="^draft: objective 'lm' has no head that drafts tokens"):
        run.generate(["the wave"], draft=1)


def test_prompts_that_cannot_be_answered(run, monkeypatch):
    with pytest.raises(InputError, match=r"prompts\[1\]: is empty"):
        run.generate(["a", " "])
    with pytest.raises(
        InputError, match=r"prompts\[1\]: its \d+ tokens leave no room for an answer; the model has 128"
    ):
        run.generate(["a", "wave " * 200])
    monkeypatch.setattr(run.module.objective, "predicts_tokens", False)
    with pytest.raises(InputError, match="objective 'lm' trains no next-token prediction"):
        run.generate(["a"])


# --------------------------------------------------------------------------------------------- runs that are not whole


def test_shards_may_be_missing_but_not_the_tokenizer(folder, tmp_path):
    prepared = next((folder / "cache" / "prepared").iterdir())
    shutil.copytree(prepared, tmp_path / "shards")
    data = {"source": "text", "path": str(tmp_path / "shards"), "max_length": 64}
    make_run(tmp_path, "run", NATIVE, data=data, eval={})
    expected = jepa_scale.load(tmp_path / "run").encode(TEXTS)
    for file in (tmp_path / "shards").glob("*.tar"):
        file.unlink()
    np.testing.assert_array_equal(jepa_scale.load(tmp_path / "run").encode(TEXTS), expected)
    shutil.rmtree(tmp_path / "shards" / "tokenizer")
    with pytest.raises(InputError, match=r"tokenizer is missing.* \(the tokenizer of the run comes with its data\)"):
        jepa_scale.load(tmp_path / "run")


def test_damaged_checkpoints_and_folders_that_are_no_run(folder, tmp_path, capsys):
    with pytest.raises(InputError, match=r"not a run directory \(no config.yaml\)"):
        jepa_scale.load(tmp_path / "nowhere")
    shutil.copytree(folder / "native", tmp_path / "run")
    old = checkpoint_of(tmp_path / "run", 7)
    new = checkpoint_of(tmp_path / "run", 9)
    shutil.copytree(old, new)
    shard = next((new / "tensors").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    manifest = (new / "manifest.json").read_text()
    assert jepa_scale.load(tmp_path / "run", old).checkpoint == old
    assert jepa_scale.load(tmp_path / "run", old.name).checkpoint == old
    (new / "manifest.json").write_text(manifest.replace('"step": 7', '"step": 9'))  # its own checksum is wrong now
    assert jepa_scale.load(tmp_path / "run").checkpoint == old
    with pytest.raises(InputError, match="its checksum is wrong"):
        jepa_scale.load(tmp_path / "run", new)
    shutil.rmtree(old)
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        jepa_scale.load(tmp_path / "run")
    with pytest.raises(InputError, match="no checkpoint at step_00000001"):
        jepa_scale.load(tmp_path / "run", "step_00000001")


def test_importing_the_package_loads_nothing():
    code = "import sys, jepa_scale; jepa_scale.__version__, jepa_scale.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("there", "device"), [(True, "cuda:0"), (False, "cpu")])
def test_the_gpu_is_taken_where_there_is_one(monkeypatch, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert _device("auto") == torch.device(device) and _device("cpu") == torch.device("cpu")
    commands = [(encode, ["run", "texts.txt", "--out", "rows.npy"]), (generate, ["run", "a prompt"])]
    assert [command.parser().parse_args(words).device for command, words in commands] == ["auto", "auto"]
    assert inspect.signature(load).parameters["device"].default == "auto"
