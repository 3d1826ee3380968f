"""Which device and precision "auto" is."""

import pytest
import torch

from kvfold.hf import hardware


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """A machine without CUDA whose processor has these flags."""

    def made(flags):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu sse {flags}\n")
        monkeypatch.setattr(hardware, "_CPU_FLAGS", tmp_path / "cpuinfo")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        hardware._cpu_is_quick.cache_clear()

    yield made
    hardware._cpu_is_quick.cache_clear()


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 avx512f", "float32"), ("avx512_bf16", "bfloat16")])
def test_bfloat16_is_taken_where_the_processor_is_quick_in_it(processor, flags, dtype):
    processor(flags)
    assert hardware.settled(device="auto", dtype="auto") == ("cpu", dtype)


def test_what_is_named_stays(processor):
    processor("amx_bf16")
    assert hardware.settled(device="cuda:1", dtype="float16") == ("cuda:1", "float16")
    assert hardware.settled(device="cpu", dtype="float32") == ("cpu", "float32")


def test_a_machine_that_says_nothing_of_its_processor_computes_in_float32(processor, monkeypatch, tmp_path):
    processor("")
    monkeypatch.setattr(hardware, "_CPU_FLAGS", tmp_path / "nothing")
    hardware._cpu_is_quick.cache_clear()
    assert hardware.settled(device="cpu", dtype="auto") == ("cpu", "float32")
