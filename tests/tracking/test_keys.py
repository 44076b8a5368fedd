from pathlib import Path

import pytest
import yaml

from dist_kd.tracking.keys import KEYS, check_known

ROOT = Path(__file__).parents[2]
UNITS = {"", "%", "nats", "ms", "s", "samples", "epochs", "steps", "images/s", "bytes", "reads", "classes"}


def test_every_key_has_section_unit_and_meaning():
    for name, key in KEYS.items():
        section, _, rest = name.partition("/")
        assert section in {"train", "time", "data", "val", "test", "teacher"} and rest
        assert key.unit in UNITS
        assert len(key.meaning) > 10 and "\n" not in key.meaning and key.meaning.isascii()


def test_units_named_in_a_key_are_its_units():
    suffixes = {"_ms": "ms", "_bytes": "bytes", "/seconds": "s", "_per_s": "images/s", "/epoch": "epochs"}
    for name, key in KEYS.items():
        for suffix, unit in suffixes.items():
            if name.endswith(suffix):
                assert key.unit == unit, name


def test_unknown_keys_are_named():
    check_known({"train/loss": 1.0, "val/top1": 50.0})
    with pytest.raises(AssertionError, match="train/accuracy"):
        check_known({"train/loss": 1.0, "train/accuracy": 0.5})


def test_dashboard_panels_use_known_keys_and_every_key_has_a_panel():
    sections = yaml.safe_load((ROOT / "configs/wandb/kd.yaml").read_text())["sections"]
    shown = [key for section in sections for panel in section["panels"] for key in panel["keys"]]
    assert set(shown) <= KEYS.keys()
    # teacher/classes is a fact, not a curve
    assert KEYS.keys() - set(shown) == {"teacher/classes"}
    for section in sections:
        assert section["name"] and all(panel["title"] and panel["keys"] for panel in section["panels"])


def test_panels_do_not_mix_units():
    sections = yaml.safe_load((ROOT / "configs/wandb/kd.yaml").read_text())["sections"]
    for panel in (panel for section in sections for panel in section["panels"]):
        assert len({KEYS[key].unit for key in panel["keys"]}) == 1, panel["title"]
