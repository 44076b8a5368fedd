"""Which changes between two starts are refused, what the refusal offers, and which flag allows which."""

from pathlib import Path

import pytest

from dist_kd.config import Config
from dist_kd.errors import CheckpointError, ConfigError
from dist_kd.resume import Start, check_layout, check_same_run

SMALL = {"batch_size": 12, "device_batch_size": 6}


def started(world_size: int, micro_batch: int, **settings) -> Start:
    """A checkpoint of step 5 that so many processes made."""
    layout = {"streams": 1, "window": 100, "world_size": world_size, "micro_batch": micro_batch, "left_out": 0}
    facts = {"layout": layout, "settings": Config(**SMALL | settings).result_settings(), "data": "abc"}
    return Start(Path("run/checkpoints/step_00000005"), facts, 5)


def test_another_number_of_processes_is_refused_with_those_that_work():
    with pytest.raises(ConfigError) as error:
        check_layout(Config(**SMALL), started(2, 6), 3)
    for words in ("2 -> 3 processes", "micro-batch 6 -> 4", "--allow-reshard", "1, 2, 3, 4, 6, 12 processes"):
        assert words in str(error.value)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_number_that_does_not_divide_the_batch_is_always_refused(allowed):
    with pytest.raises(ConfigError) as error:
        check_layout(Config(allow_reshard=allowed, **SMALL), started(2, 6), 5)
    for words in ("2 -> 5 processes", "`12`", "1, 2, 3, 4, 6, 12 processes"):
        assert words in str(error.value)


def test_numbers_without_a_valid_micro_batch_are_not_offered():
    """Pairs for mixup: an odd share is none. At most 8 at once: 2 x 11 rows would be worked off one by one."""
    with pytest.raises(ConfigError, match=r" 1, 2, 3, 6 processes"):
        check_layout(Config(mixup=0.2, **SMALL), started(1, 6), 4)
    with pytest.raises(ConfigError, match=r" 11, 22 processes"):
        check_layout(Config(batch_size=22, device_batch_size=8), started(1, 6), 3)


def test_with_the_flag_it_goes_on_and_says_what_is_not_the_same():
    allowed = Config(allow_reshard=True, **SMALL)
    assert "2 -> 3 processes" in check_layout(allowed, started(2, 6), 3)
    assert "batch norm works over 4 rows" in check_layout(allowed, started(2, 6), 3)
    assert "batch norm" not in check_layout(allowed, started(2, 6), 1)
    assert check_layout(allowed, started(2, 6), 2) is None
    assert check_layout(Config(**SMALL), Start(None, {}, 0), 7) is None


def test_another_micro_batch_is_the_same_question():
    smaller = SMALL | {"device_batch_size": 3}
    with pytest.raises(ConfigError, match=r"micro-batch 6 -> 3.*--allow-reshard"):
        check_layout(Config(**smaller), started(2, 6), 2)
    assert "batch norm works over 3" in check_layout(Config(allow_reshard=True, **smaller), started(2, 6), 2)
    # only what follows from it counts: 6 rows a process are 6 rows at once, whatever more would be allowed
    larger = Config(**SMALL | {"device_batch_size": 9})
    check_same_run(larger, started(2, 6), larger.result_settings(), "abc")
    assert check_layout(larger, started(2, 6), 2) is None


def test_a_setting_younger_than_the_checkpoint_had_its_default():
    old = started(2, 6)
    del old.facts["settings"]["freeze"]
    same, frozen = Config(**SMALL), Config(**SMALL, freeze="backbone")
    check_same_run(same, old, same.result_settings(), "abc")
    with pytest.raises(ConfigError, match="freeze: 'none' -> 'backbone'"):
        check_same_run(frozen, old, frozen.result_settings(), "abc")


def test_settings_are_another_question():
    """--allow-reshard allows no other batch, and --allow-changes no other processes."""
    other = Config(allow_reshard=True, **SMALL | {"batch_size": 24})
    with pytest.raises(ConfigError, match=r"batch_size: 12 -> 24.*--allow-changes"):
        check_same_run(other, started(2, 6), other.result_settings(), "abc")
    with pytest.raises(ConfigError, match="--allow-reshard"):
        check_layout(Config(allow_changes=True, **SMALL), started(2, 6), 3)
    still = {"optimizer": "rmsprop", "momentum": 0}
    for was, asked in (({}, {"optimizer": "adam"}), (still, {"optimizer": "rmsprop"})):
        other = Config(allow_changes=True, **SMALL | asked)
        with pytest.raises(ConfigError, match=r"has what `.*` remembers, with which `.*` cannot go on"):
            check_same_run(other, started(2, 6, **was), other.result_settings(), "abc")
    changed = Config(allow_changes=True, **SMALL | {"lr": 0.5})
    check_same_run(changed, started(2, 6), changed.result_settings(), "abc")
    with pytest.raises(CheckpointError, match="fingerprint abc, now xyz"):
        check_same_run(changed, started(2, 6), changed.result_settings(), "xyz")
