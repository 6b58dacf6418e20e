"""Pools lie in plain memory, whatever the user has torch do with the rest."""

import pytest
import torch

from disagg_ray.transfer.segments import grow_segments, plain_segments

read = getattr(torch._C, "_accelerator_getAllocatorSettings", None)  # torch 2.11 has none

pytestmark = pytest.mark.skipif(read is None, reason="this torch does not tell its settings")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_are_plain_for_a_while_and_other_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read()
    settings = "roundup_power2_divisions:[256:1,512:2],expandable_segments: True,max_split_size_mb:64"
    monkeypatch.setenv(name, settings)
    try:
        with pytest.raises(ZeroDivisionError), plain_segments():
            assert read() == settings.replace("True", "False")
            raise ZeroDivisionError
        assert read() == settings
    finally:
        torch._C._accelerator_setAllocatorSettings(before)


@pytest.mark.parametrize("settings", ["", "max_split_size_mb:64", "expandable_segments:False"])
def test_other_settings_are_left_alone(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", settings)
    before = read()
    with plain_segments():
        assert read() == before
    assert read() == before


def test_segments_grow_unless_the_user_has_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    before = read()
    try:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
        grow_segments()
        assert read() == before
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
        grow_segments()
        assert read() == "expandable_segments:True"
        with plain_segments():
            assert read() == "expandable_segments:False"
    finally:
        torch._C._accelerator_setAllocatorSettings(before)
