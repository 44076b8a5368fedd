"""Config: every setting is explained and classed, and a run's name follows from what changes its result alone."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from dist_kd.cli.names import kinds
from dist_kd.config import RUN, TRACK, Config
from dist_kd.experiment import DATA, DEFAULT_LR, METHOD, MODELS, OPTIM, Optimizer

FIELDS = Config.model_fields


def another(name: str) -> object:
    """A valid value of the field `name` that is not its default."""
    kind, default = kinds(name)[0], FIELDS[name].default
    for value in (*get_args(kind), True, False, 7, 64, 0.25, 1, "other"):
        fits = value in get_args(kind) or type(value) is kind
        if fits and value != default:
            try:
                Config.model_validate({name: value})
            except ValidationError:
                continue
            return value
    raise AssertionError(f"no other value known for {name}")


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_is_classed_and_explained(name):
    field = FIELDS[name]
    extra = field.json_schema_extra
    assert set(extra) == {"group", "unit", "result", "aliases"}
    assert isinstance(extra["result"], bool)
    assert extra["group"] in (DATA, MODELS, METHOD, OPTIM, RUN, TRACK)
    assert field.description and field.description.endswith(".") and field.description.isascii()
    assert kinds(name)[0] in (bool, int, float, str) or get_args(kinds(name)[0])
    if kinds(name)[0] in (int, float):
        assert any(hasattr(rule, "ge") or hasattr(rule, "gt") for rule in field.metadata), "needs a lower limit"
    if name.endswith(("steps", "epochs")):
        assert extra["unit"] == name.split("_")[-1]


def test_groups_stand_together():
    groups = [field.json_schema_extra["group"] for field in FIELDS.values()]
    assert list(dict.fromkeys(groups)) == [DATA, MODELS, METHOD, OPTIM, RUN, TRACK]
    assert groups == sorted(groups, key=[DATA, MODELS, METHOD, OPTIM, RUN, TRACK].index)


def test_defaults_are_valid():
    config = Config()
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("name", FIELDS)
def test_the_name_follows_from_what_changes_the_result_and_from_nothing_else(name):
    changed = Config.model_validate({name: another(name)})
    assert (changed.default_name != Config().default_name) == FIELDS[name].json_schema_extra["result"]


def test_the_name_is_the_same_in_another_process_and_a_single_folder():
    config = Config(arch="timm/resnet18", method="kd")
    assert config.default_name.startswith("timm-resnet18-kd-") and "/" not in config.default_name
    assert Config(arch="timm/resnet18", method="kd").default_name == config.default_name


def test_frozen_and_closed():
    with pytest.raises(ValidationError):
        Config().T = 3
    with pytest.raises(ValidationError):
        Config(temprature=3)
    with pytest.raises(ValidationError):
        Config(epochs=float("inf"))


def test_every_optimizer_has_its_learning_rate():
    assert set(DEFAULT_LR) == set(get_args(Optimizer))
    assert Config().peak_lr == 0.1 and Config(optimizer="adam").peak_lr == 1e-3
    assert Config(lr=0.5).peak_lr == 0.5
