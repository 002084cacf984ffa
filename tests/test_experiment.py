"""A validated config: its options are typed and frozen, and no code reads a section by a string key."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jepa_scale.config.loading import load_config
from jepa_scale.config.schema import Config, Section
from jepa_scale.data import load_data, parse_data
from jepa_scale.data.options import SOURCES, ChatOptions, MixtureOptions, ReversalOptions, TextOptions, TextPart
from jepa_scale.evaluation.options import ChatEvalOptions, EvalOptions, PerplexityOptions
from jepa_scale.experiment import OBJECTIVES, Experiment, objective_options, validate
from jepa_scale.utils.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "jepa_scale"
EXPERIMENTS = sorted((REPOSITORY / "configs").glob("*.yaml"))
AS_WRITTEN = {
    "config.loading",
    "config.parsing",
    "experiment",
    "cli.config.schema",
    "cli.config.reference",
    "convert.to_hf",
}
"""Modules that see a config as it is written: it is read there, made an experiment, described, its keys named in errors, or, where a run is
exported without its objective, parsed in parts."""
MAPPINGS = ("model", "data", "objective", "eval")
OTHER_CONFIGS = {"convert.skeleton", "models.compiling", "objectives.span.predictor"}
"""Modules that write into a ``config`` of transformers or torch."""
HOLDERS = ("config", "experiment", "plan")


def experiment_of(*overrides: str) -> Experiment:
    return validate(load_config(REPOSITORY / "configs/reversal.yaml", overrides))


# -- types ------------------------------------------------------------------------------------------------------------


def test_an_experiment_has_the_sections_of_a_config():
    assert [field.name for field in fields(Experiment)] == list(Config.model_fields)
    assert list(experiment_of().resolved()) == list(Config.model_fields)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_each_section_has_the_options_of_what_it_names(path):
    values, experiment = yaml.safe_load(path.read_text()), validate(load_config(path))
    assert type(experiment.data) is SOURCES[values["data"]["source"]]
    assert type(experiment.objective.options) is objective_options(experiment.objective.name)
    expected = {ReversalOptions: EvalOptions, ChatOptions: ChatEvalOptions}
    assert type(experiment.eval) is expected.get(type(experiment.data), PerplexityOptions)


def test_the_parts_of_a_mixture_are_options_of_their_sources():
    given = [
        {"source": "text", "path": "a", "weight": 2},
        {"path": "b", "source": "chat", "name": 7, "train_all": True},
    ]
    mixture = parse_data({"source": "mixture", "parts": given})
    assert isinstance(mixture, MixtureOptions)
    text, chat = mixture.parts
    assert isinstance(text, TextPart) and isinstance(text, TextOptions) and isinstance(chat, ChatOptions)
    assert (text.weight, text.name, text.max_length) == (2, None, 512)
    assert (chat.weight, chat.name, chat.train_all) == (1, "7", True)
    resolved = mixture.resolved()
    assert resolved["parts"] == [given[0], {**given[1], "name": "7"}]  # as given, without defaults
    assert parse_data(resolved).resolved() == resolved


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (3, r"^data\.parts\.0: input should be a valid dictionary, got 3$"),
        (
            {"source": "text", "path": "a", "weight": "much"},
            r"^data\.parts\.0\.weight: must be a number above 0, got 'much'$",
        ),
        (
            {"source": "mixture", "parts": []},
            r"^data\.parts\.0\.source: mixture cannot be part of a mixture; use text, chat or grids$",
        ),
        ({"source": "text"}, r"^data\.parts\.0\.path: required key is missing$"),
    ],
)
def test_a_bad_part_of_a_mixture_is_named_before_anything_is_read(part, message):
    with pytest.raises(InputError, match=message):
        parse_data({"source": "mixture", "parts": [part]})


def test_the_generators_keys_go_where_the_facts_come_from_files():
    """A config of generated facts may be given a path by an override; the keys are refused where both are meant."""
    experiment = experiment_of("data.path=nowhere")
    assert not {"entities_a", "comb"} & experiment.resolved()["data"].keys()
    with pytest.raises(InputError, match="no file"):
        load_data(experiment.data)
    with pytest.raises(InputError, match=r"^data\.comb: has no meaning"):
        load_data(parse_data({"source": "reversal", "path": "nowhere", "comb": 3}))


# -- frozen -----------------------------------------------------------------------------------------------------------


def test_nothing_writes_into_an_experiment():
    experiment = experiment_of()
    with pytest.raises(FrozenInstanceError):
        experiment.train = experiment.train
    with pytest.raises(FrozenInstanceError):
        experiment.objective.name = "lm"
    sections = {field.name: getattr(experiment, field.name) for field in fields(experiment)}
    sections["objective"] = experiment.objective.options
    for name, section in sections.items():
        for key in type(section).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(section, key, getattr(section, key))
            assert key in section.model_dump(), name


def test_every_section_is_frozen():
    for module in pkgutil.walk_packages([str(PACKAGE)], "jepa_scale."):
        if module.name.rpartition(".")[2] in ("options", "config", "schema", "base") or module.name.endswith(
            "_options"
        ):
            importlib.import_module(module.name)
    waiting, found = [Section], set()
    while waiting:
        cls = waiting.pop()
        found.add(cls)
        waiting += cls.__subclasses__()
    assert len(found) > 30 and all(cls.model_config["frozen"] for cls in found)
    assert {objective_options(name) for name in OBJECTIVES} < found


def test_another_experiment_leaves_the_first_one_alone():
    first = experiment_of()
    second = replace(first, engine=first.engine.model_copy(update={"tp": 2}))
    assert (first.engine.tp, second.engine.tp) == (1, 2) and second.data is first.data
    assert first == experiment_of() != second


# -- the source -------------------------------------------------------------------------------------------------------


def trees() -> dict[str, ast.AST]:
    """Module without ``jepa_scale.`` → its source."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}


def holds_config(node: ast.AST) -> bool:
    """``config``, ``self.config``, ``run.experiment`` …"""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in HOLDERS


def test_no_code_reads_a_section_by_a_string_key():
    wrong = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            read = node.value if isinstance(node, ast.Subscript) else None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
                read = node.func.value
            if isinstance(read, ast.Attribute) and read.attr in MAPPINGS and holds_config(read.value):
                wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_a_config_as_it_is_written_goes_no_further_than_its_validation():
    users = {
        module
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "Config"
    }
    assert users == AS_WRITTEN


def test_nothing_assigns_to_options():
    """The type checker sees it where it sees the type; this is for what is ``Any`` to it."""
    wrong = []
    for module, tree in trees().items():
        if module in OTHER_CONFIGS:
            continue
        for node in ast.walk(tree):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AugAssign)
                else []
            )
            for target in ast.walk(ast.Module(targets, [])):  # type: ignore[arg-type]
                if not (isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)):
                    continue
                owner = target.value
                if holds_config(owner) or isinstance(owner, ast.Attribute) and holds_config(owner.value):
                    wrong.append(f"{module}, line {node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_validators_read_no_files():
    for module in ("config.schema", "config.parsing"):
        source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
        assert not {"open", "read_text", "Path", "json"} & {getattr(n, "id", "") for n in ast.walk(ast.parse(source))}
