"""The disk tier: whole or not there, its owner's only, within its limit, and gone with its cache or its process."""

import copy
import gc
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.errors import FileError, PlanError
from kvfold.place.tiers.disk import DiskTier, remove_stale

CPU = torch.device("cpu")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_and_the_file_goes_with_its_tier(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=None)
    buffer = tier.buffer((2, 10, 3), torch.bfloat16, CPU)
    assert not buffer.tensor.any()
    buffer.write(1, 4, torch.ones(2, 3, dtype=torch.bfloat16))
    assert buffer.tensor[1, 4:6].eq(1).all()
    assert int(buffer.tensor.sum()) == 6
    assert stat.S_IMODE(tier.path.stat().st_mode) == 0o600
    del buffer, tier
    gc.collect()
    assert files(tmp_path) == []


def test_room_that_was_given_back_is_used_again_and_empty(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=1 << 16)
    for _ in range(20):
        buffer = tier.buffer((1, 1000, 8), torch.float32, CPU)
        assert not buffer.tensor.any()
        buffer.write(0, 0, torch.ones(1000, 8))
        del buffer
        gc.collect()
    assert tier.path.stat().st_size <= 1 << 16


def test_a_limit_is_kept_and_says_so(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=10_000)
    with pytest.raises(FileError, match="may have 10000; give a larger limit_bytes"):
        tier.buffer((1, 100_000, 8), torch.float32, CPU)
    assert tier.path.stat().st_size == 0


def test_a_full_disk_is_one_clear_line_and_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    model = model_of("llama")
    cache = kvfold.cache(model, f"sentkv(budget=40, length=5, window=2, recent=2, tier='disk', directory='{tmp_path}')")
    feed(model, text(1, 60), cache)
    before = cache.ledger()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FileError, match="no space left on device"):
        feed(model, text(1, 80, seed=3), cache)
    monkeypatch.undo()
    assert cache.ledger() == before
    feed(model, text(1, 80, seed=3), cache)


@pytest.mark.parametrize("where", ["missing", "a file"])
def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path, where):
    (tmp_path / "a file").write_text("")
    with pytest.raises(FileError, match=r"give directory= a folder that can be written to"):
        kvfold.cache(model_of("llama"), f"sentkv(tier='disk', directory='{tmp_path / where}')")
    assert files(tmp_path) == ["a file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="permission denied"):
        DiskTier(tmp_path, limit_bytes=None)


def test_an_unknown_tier_and_a_tier_without_folder_are_refused():
    with pytest.raises(PlanError, match=r"there is no such tier; give one of device, .*disk, host"):
        kvfold.Plan.parse("sentkv(tier='tape')")
    with pytest.raises(PlanError, match="give tier='disk' and directory= together"):
        kvfold.Plan.parse("sentkv(tier='disk')")


KILLED = """
import sys, torch
from pathlib import Path
from kvfold.place.tiers.disk import DiskTier
tier = DiskTier(Path(sys.argv[1]), limit_bytes=None)
buffer = tier.buffer((1, 1 << 20, 64), torch.float32, torch.device("cpu"))
print("ready", flush=True)
while True:
    buffer.write(0, 0, torch.ones(1 << 20, 64))
"""


def test_files_of_killed_processes_are_removed_at_the_next_start_and_those_of_living_ones_stay(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    assert remove_stale(tmp_path) == []
    time.sleep(0.1)  # in the middle of writing
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(files(tmp_path)) == 1
    tier = DiskTier(tmp_path, limit_bytes=None)
    assert files(tmp_path) == [tier.path.name]


def test_a_copy_of_a_cache_has_buffers_of_its_own(tmp_path):
    model = model_of("llama")
    plan = f"sentkv(budget=20, length=5, window=2, recent=2, tier='disk', directory='{tmp_path}')"
    cache = kvfold.cache(model, plan, stride=8)
    feed(model, text(1, 40), cache)
    twin = copy.deepcopy(cache)
    assert len(files(tmp_path)) == 1
    stores = [one.memory.layers[0].state.folded.table.stored.store for one in (cache, twin)]
    assert stores[0].buffers["keys"].tensor.data_ptr() != stores[1].buffers["keys"].tensor.data_ptr()
    assert torch.equal(feed(model, text(1, 9, seed=1), twin, sizes=(1,) * 8), feed(model, text(1, 9, seed=1), cache,
                       sizes=(1,) * 8))  # fmt: skip
