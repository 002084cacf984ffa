"""Keys of other programs, and of ours in the wrong section, are refused with the key that is meant and the page about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from jepa_scale.cli.main import main
from jepa_scale.config.foreign import JEPA_LLM, LIT_JEPA, PLACES, PROGRAMS
from jepa_scale.config.loading import load_config
from jepa_scale.config.translate import NOT_CARRIED
from jepa_scale.experiment import validate
from jepa_scale.utils.errors import InputError
from tests.docs.test_keys import KNOWN

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = ["data.source=text", "data.path=corpus.txt", "objective.name=lm"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"optim.learning_rate: unknown key; TRL's learning_rate is optim.lr here \(docs/mig"),
        ("model.lora.r=8", "model.lora.r: unknown key; TRL's r is model.lora.rank here"),
        ("model.lora_alpha=8", "model.lora_alpha: unknown key; TRL's lora_alpha is model.lora.alpha here"),
        (
            "engine.load_in_4bit=true",
            "engine.load_in_4bit: unknown key; TRL's load_in_4bit is model.load_in_4bit, beside model.lora",
        ),
        (
            "objective.lbd=1",
            r"objective.lbd: unknown key; jepa-llm's lbd is objective.jepa_weight here \(.*#jepa-llm\)",
        ),
        (
            "model.tap_layer=2",
            r"model.tap_layer: unknown key; it is objective.tap_layer \(docs/migration.md#python--m-srctrain-fit\)",
        ),
        ("train.gradient_checkpointing=true", "is engine.activation_checkpointing=full here"),
        ("train.lr=1", "train.lr: unknown key; it is optim.lr"),
        ("epochs=3", "epochs: unknown key; it is train.epochs"),
        ("lora.rank=3", "lora: unknown key; it is model.lora"),
        ("model.tokenizer=x", "model.tokenizer: unknown key; it is data.tokenizer"),
        ("optim.warmup_step=3", "optim.warmup_step: unknown key; did you mean 'warmup_steps'"),
        ("objective.tap_layer=3", "objective.tap_layer: unknown key; there are no keys here"),
    ],
)
def test_the_key_that_is_meant_is_named(override, message, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {}\ndata: {}\nobjective: {}\n")
    with pytest.raises(InputError, match=message):
        validate(load_config(tmp_path / "run.yaml", [*TEXT, override]))


def test_every_key_that_is_named_exists_and_every_page_has_the_section():
    page = (REPOSITORY / "docs/migration.md").read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^## (.*)$", page, re.M)
    }
    for program in PROGRAMS:
        assert program.section in anchors
        for ours in program.keys.values():
            for section, key in re.findall(r"\b([a-z]+)\.([a-z_0-9]+)", ours):
                assert key in KNOWN[section], ours
    for section, keys in PLACES.items():
        assert set(keys) <= KNOWN[section]


FULL = {
    JEPA_LLM: {
        "general": {"debug": 0, "finetune_seed": 82, "use_wandb": True, "wandb_project": "p", "wandb_entity": "me"},
        "model": {"name": "some/model", "use_lora": True, "lora_rank": 8, "pretrain": False, "cache_dir": None},
        "dataset": {"train_file": "a.jsonl", "eval_file": "b.jsonl", "eval_split": 0.2, "predictors": 2, "max_items": None},
        "training": {
            "output_dir": "./artifacts/llama3", "batch_size": 4, "grad_accum": 3, "learning_rate": 2e-5, "num_epochs": 3,
            "eval_steps": 10, "lbd": 0.1, "gamma": 1.0, "last_token": -1, "regular": False, "dtype": "bfloat16",
        },
    },
    LIT_JEPA: {
        "seed_everything": 1337,
        "trainer": {"max_steps": 3000, "log_every_n_steps": 25, "precision": "bf16-mixed", "devices": "auto"},
        "model": {
            "vocab_size": 1000, "d_model": 64, "n_layers": 6, "n_heads": 8, "dropout": 0.1, "ff_multiplier": 4, "use_rope": True,
            "jepa": {"tap_layer": 2, "horizons": [8, 32], "horizon_probs": [0.5, 0.5], "ema_momentum": 0.995,
                     "predictor_hidden_multiplier": 1.5, "jepa_weight": 0.1, "lm_weight_use_scheduler": True,
                     "lm_warmup_steps": 100},
            "optimizer": {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.95], "warmup_steps": 200},
        },
        "data": {"module": "tiny_shakespeare", "block_size": 256, "batch_size": 8, "num_workers": 2, "data_dir": "data/"},
    },
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(values):
        (tmp_path / "my-run.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "my-run.yaml"

    return write


def translated(program, file, capsys, *overrides):
    assert main(["config", "--from", program.flag, str(file), *overrides]) == 0
    out = capsys.readouterr().out
    made = file.with_name("ours.yaml")
    made.write_text(out)
    return validate(load_config(made)), out


@pytest.mark.parametrize("program", FULL, ids=lambda program: program.flag)
def test_a_config_of_theirs_is_refused_with_the_command_that_translates_it(program, file):
    path = file(FULL[program])
    with pytest.raises(
        InputError, match=f"is a config of {program.name}; jepa-scale config --from {program.flag} {path} writes"
    ):
        load_config(path)


def test_a_config_of_jepa_llm_becomes_ours(file, capsys):
    ours, out = translated(JEPA_LLM, file(FULL[JEPA_LLM]), capsys)
    assert (ours.run.seed, ours.run.dir, ours.run.name) == (82, "artifacts", "llama3")
    assert (ours.model.pretrained, ours.model.lora.rank, ours.data.tokenizer) == ("some/model", 8, "some/model")
    assert (ours.data.path, ours.data.valid_path, ours.data.valid_fraction) == ("a.jsonl", "b.jsonl", 0.0)
    assert ours.data.remove_thinking  # their default
    assert (ours.train.batch_size, ours.train.accumulation, ours.train.epochs, ours.train.eval_every) == (12, 3, 3, 10)
    assert (ours.optim.lr, ours.optim.schedule, ours.engine.precision, ours.checkpoint.every) == (
        2e-5,
        "linear",
        "bf16",
        10,
    )
    objective = ours.objective.options
    assert (objective.jepa_weight, objective.last_token, objective.predictor_tokens) == (0.1, -2, 2)
    assert "# not carried over: general.wandb_entity: me (W&B reads WANDB_ENTITY)" in out
    assert "multiply it by the number of ranks" in out


def test_without_lora_all_is_trained_and_overrides_count(file, capsys):
    values = FULL[JEPA_LLM] | {"model": {"name": "m", "use_lora": False, "lora_rank": 8}}
    ours, _ = translated(JEPA_LLM, file(values), capsys, "optim.lr=0.5")
    assert ours.model.lora is None and ours.optim.lr == 0.5


def test_a_config_of_litjepa_becomes_ours(file, capsys):
    ours, out = translated(LIT_JEPA, file(FULL[LIT_JEPA]), capsys)
    assert (ours.run.seed, ours.train.steps, ours.train.log_every, ours.engine.precision) == (1337, 3000, 25, "bf16")
    model = ours.model
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers, model.num_attention_heads) == (
        64,
        256,
        6,
        8,
    )
    assert (model.hidden_dropout, model.bridge_dropout) == (0.1, 0.1)
    objective = ours.objective.options
    assert (objective.tap_layer, objective.horizons, objective.dropout) == (3, [8, 32], 0.1)  # from 1 here
    assert (objective.ema.momentum, objective.ema.schedule) == (0.995, "constant")
    assert (objective.projector_multiple, objective.predictor_multiple) == (1.5, 1.5)
    assert (objective.lm_start, objective.lm_ramp, objective.jepa_weight) == (100, 2900, 0.1)
    assert (ours.data.max_length, ours.train.batch_tokens, ours.data.path) == (256, 2048, "tiny_shakespeare")
    assert (ours.optim.lr, ours.optim.warmup_steps) == (3e-4, 200)
    assert "not carried over: data.data_dir" in out


def test_a_baseline_of_litjepa_is_next_token_prediction(file, capsys):
    values = {
        **FULL[LIT_JEPA],
        "model": FULL[LIT_JEPA]["model"] | {"jepa": {"run_baseline": True, "grad_barrier": True}},
    }
    ours, _ = translated(LIT_JEPA, file(values), capsys)
    assert ours.objective.name == "lm" and not ours.model.bridge_grad_barrier


@pytest.mark.parametrize(
    ("program", "section", "values", "message"),
    [
        (JEPA_LLM, "training", {"lbdd": 1}, "training.lbdd: is no key of jepa-llm that can be translated"),
        (JEPA_LLM, "training", {"optimizer": "adamw_8bit"}, "training.optimizer: 'adamw_8bit': optim.method is"),
        (JEPA_LLM, "training", {"dtype": "int3"}, "training.dtype: 'int3': must be one of"),
        (JEPA_LLM, "training", {"batch_size": 4, "learning_rate": -1}, "optim.lr: input should be greater than 0"),
        (LIT_JEPA, "model", {"d_model": 64, "use_rope": False}, "model.use_rope: False: the decoder always has"),
        (LIT_JEPA, "model", {"d_model": 64, "jepa": {"simple_recurrence_steps": 2}}, "recurrence_steps: 2: is not"),
        (LIT_JEPA, "data", {"batch_size": 8}, "data.batch_size: 8: needs data.block_size beside it"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_name(program, section, values, message, file, capsys):
    path = file(FULL[program] | {section: values})
    assert main(["config", "--from", program.flag, str(path)]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out and said.err.count("\n") == 1


def test_the_tables_know_each_key_once():
    for program in (JEPA_LLM, LIT_JEPA):
        assert not program.keys.keys() & NOT_CARRIED[program.name].keys()


# -- base: -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A config with a base: its keys count, and the base's others stay."""
    (tmp_path / "small.yaml").write_text("hidden_size: 32\nnum_hidden_layers: 3\n")
    (tmp_path / "parent.yaml").write_text(
        "run: {name: parent, seed: 5}\nmodel: small.yaml\ndata: {source: reversal, entities_a: 50, comb: 5}\n"
        "objective: {name: concept, bridge_width: 8}\noptim: {lr: 0.1, overrides: {backbone: {lr: 1.0}}}\n"
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: parent.yaml\nmodel: {hidden_size: 64}\noptim:\n  warmup_steps: 3\n")
    return child


def test_a_config_changes_single_keys_of_its_base(pair):
    ours = validate(load_config(pair, ["train.steps=7"]))
    assert (ours.run.name, ours.run.seed) == ("child", 5)  # two configs are two runs
    assert (ours.model.hidden_size, ours.model.num_hidden_layers) == (64, 3)
    assert (ours.optim.lr, ours.optim.warmup_steps, ours.optim.overrides["backbone"].lr) == (0.1, 3, 1.0)
    assert (ours.data.entities_a, ours.objective.options.bridge_width, ours.train.steps) == (50, 8, 7)


def test_another_objective_takes_the_place_of_the_bases(pair):
    pair.write_text(pair.read_text() + "objective: {name: lm}\n")
    assert validate(load_config(pair)).objective.name == "lm"


def test_config_prints_the_keys_of_the_base_with_their_lines(pair, capsys):
    assert main(["config", str(pair), "optim.eps=1e-6"]) == 0
    out = capsys.readouterr().out
    origin = {line.split(":")[0].strip(): line.rpartition("#")[2].strip() for line in out.splitlines() if "#" in line}
    assert origin["hidden_size"].endswith("child.yaml, line 2") and origin["warmup_steps"].endswith(
        "child.yaml, line 4"
    )
    assert origin["num_hidden_layers"].endswith("small.yaml, line 2")
    assert (
        "  seed: 5" in out
        and origin["bridge_width"].endswith("parent.yaml, line 4")
        and origin["eps"] == "command line"
    )
    assert origin["name"] and "name: child" in out and "base" not in origin
    made = pair.with_name("printed.yaml")
    made.write_text(out)
    assert validate(load_config(made)) == validate(load_config(pair, ["optim.eps=1e-6"]))


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("base: nowhere.yaml\n", [], "base: no file 'nowhere.yaml'"),
        ("base: [a, b]\n", [], r"base: must be the name of a config file, not \['a', 'b'\]"),
        ("base: child.yaml\n", [], "base: child.yaml has a base itself, and there is one level"),
        ("base: parent.yaml\noptim: {lrr: 1}\n", [], "optim.lrr: unknown key"),
        ("model: {}\n", ["base=parent.yaml"], "base: stands in a config file; on the command line"),
    ],
)
def test_a_base_that_cannot_be_is_refused(pair, text, overrides, message):
    file = pair.with_name("other.yaml")
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(file, overrides)


def test_a_shipped_config_may_be_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("base: configs/reversal.yaml\ntrain: {batch_size: 8}\n")
    ours, theirs = (validate(load_config(name)) for name in ("mine.yaml", "configs/reversal.yaml"))
    assert ours.train.batch_size == 8 and ours.run.name == "mine" and ours.optim == theirs.optim
