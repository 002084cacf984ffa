"""What an engine may run of an objective."""

import inspect
from typing import Any

import pytest
from torch import nn

from jepa_scale.experiment import OBJECTIVES, objective_class
from jepa_scale.objectives.base import JepaModel, Objective
from jepa_scale.objectives.lm import LanguageModeling
from jepa_scale.objectives.tasks import TASKS


class Counting(LanguageModeling):
    own_tasks = ("count",)

    def __init__(self):
        Objective.__init__(self)

    def count(self, backbone, number):
        return backbone, number

    def uncounted(self, backbone):
        return backbone


def test_every_task_is_a_method_that_takes_the_backbone_first():
    classes = [Objective, *map(objective_class, OBJECTIVES)]
    for task in TASKS:
        methods = [getattr(cls, task) for cls in classes if hasattr(cls, task)]
        assert methods, task
        for method in methods:
            assert list(inspect.signature(method).parameters)[:2] == ["self", "backbone"], method


def test_what_is_no_task_is_refused():
    backbone: Any = nn.Identity()
    backbone.router_loss, backbone.padded = None, False
    model = JepaModel(backbone, Counting())
    assert model("count", 3) == (model.backbone, 3)
    for name in ("uncounted", "state_dict", "los", "view_transform"):
        with pytest.raises(
            AssertionError, match=rf"^'{name}' is no task of Counting; there are count, decode_logits, diagnose, encode"
        ):
            model(name)
