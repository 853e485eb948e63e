"""The collector's settings inside and after a run."""

import gc

import pytest

from finetune.features.garbage import garbage_control


def test_rare_inside_and_as_before_outside() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(KeyError), garbage_control():
        assert gc.get_threshold()[0] > before[0] and gc.get_freeze_count() > frozen
        raise KeyError
    assert gc.get_threshold() == before and gc.get_freeze_count() == frozen


def test_untouched_when_the_device_cache_is_emptied_or_the_collector_is_off() -> None:
    before = gc.get_threshold()
    with garbage_control(4):
        assert gc.get_threshold() == before
    gc.disable()
    try:
        with garbage_control():
            assert gc.get_threshold() == before
        assert not gc.isenabled()
    finally:
        gc.enable()
