"""The disk tier: whole or not there, its owner's only, within its limit, and gone with its cache or its process."""

import copy
import gc
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

import kvfold
from driving import close, feed
from fakes import model_of, text
from kvfold.errors import BudgetError, FileError, PlanError
from kvfold.memory.accounting import account
from kvfold.memory.store import TierStore
from kvfold.place.tiers import disk
from kvfold.place.tiers.disk import DiskTier, remove_stale
from kvfold.plan import Plan
from without_model import feed as feed_memory
from without_model import memory_of

CPU = torch.device("cpu")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def takes(path, size):
    """Whether a file takes so many bytes on the disk, holes left out; the list of its pieces may take pages too."""
    return size <= path.stat().st_blocks * 512 <= size + 4 * 4096


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
    assert tier.path.stat().st_size <= 1 << 16


def test_a_limit_is_kept_and_says_so(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=10_000)
    before = tier.path.stat().st_size
    with pytest.raises(FileError, match="may have 10000; give a larger limit_bytes"):
        tier.buffer((1, 100_000, 8), torch.float32, CPU)
    assert tier.path.stat().st_size == before


def test_neighbours_that_are_free_are_one_place_and_the_last_one_leaves_the_file(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=None)
    first, second, third, last = (tier.buffer((1, 1024, 4), torch.float32, CPU) for _ in range(4))
    last.write(0, 0, torch.ones(1024, 4))
    length = tier.path.stat().st_size
    third.write(0, 0, torch.ones(1024, 4))
    del first, third, second
    assert tier.file_bytes == 4096 + 16384  # the mark, and the last one
    assert takes(tier.path, tier.file_bytes)
    joined = tier.buffer((1, 3 * 1024, 4), torch.float32, CPU)
    assert tier.path.stat().st_size == length
    assert not joined.tensor.any()
    assert last.tensor.eq(1).all()
    del last
    assert tier.path.stat().st_size == length - 16384
    del joined
    assert tier.file_bytes == tier.path.stat().st_size == 4096


def test_after_200_turns_the_file_takes_little_more_than_what_lies_in_it(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=None)
    stores = [TierStore(tier, CPU) for _ in range(3)]  # of three layers, with two heads each
    held = 0  # slots of each head
    for turn in range(200):
        more = 30 + turn % 40
        fresh = {"keys": torch.ones(2 * more, 32), "positions": torch.ones(2 * more, dtype=torch.int32)}
        stores = [store.append((held, held), fresh, [more, more]) for store in stores]
        held += more
        assert takes(tier.path, tier.file_bytes)
        assert turn < 20 or tier.file_bytes <= 1.3 * 3 * 2 * held * (32 * 4 + 4)
        tier.tidy()
        assert turn < 20 or tier.path.stat().st_size <= 1.3 * 3 * 2 * held * (32 * 4 + 4), "gaps count too"
        assert takes(tier.path, tier.file_bytes)


@pytest.mark.parametrize("plan", ["", "int8 + ", "dynakv + "])
def test_after_each_of_200_folds_the_length_of_the_file_is_that_of_what_lies_in_it(tmp_path, plan):
    memory = memory_of(Plan.parse(f"{plan}sentkv(budget=0.2, tier='disk', directory={str(tmp_path)!r})"))
    (path,) = tmp_path.iterdir()
    for turn in range(1, 201):
        feed_memory(memory, torch.ones(1, 8 * turn, dtype=torch.bool), 8)
        memory.fold()
        ledger = account(memory, plan="", device="cpu", other_bytes=0)
        # Each buffer takes whole pages: of so short a text that shows.
        assert path.stat().st_size <= 1.13 * ledger.file_bytes
    content = sum(line.stored_bytes - line.slack_bytes for line in ledger.parts if line.device == "disk")
    buffers = sum(len(list(layer.state.folded.table.stored.tensors())) for layer in memory.layers.values())
    assert path.stat().st_size <= 1.3 * content + 4096 * buffers


def test_buffers_that_move_hold_what_they_held_and_views_of_them_stay(tmp_path):
    generator = random.Random(3)
    tier, held = DiskTier(tmp_path, limit_bytes=None), {}
    for case in range(400):
        if held and generator.random() < 0.48:
            del held[generator.choice(sorted(held))]
        else:
            slots = generator.choice([1, 100, 900, 1024, 5000])
            buffer, numbers = tier.buffer((2, slots, 4), torch.float32, CPU), torch.randn(2, slots, 4)
            buffer.write(0, 0, numbers[0])
            buffer.write(1, 0, numbers[1])
            view = buffer.read(1, 0, slots) if generator.random() < 0.1 else None
            held[case] = (buffer, numbers, view)
        if generator.random() < 0.3:
            tier.tidy()
            if not any(view is not None for _, _, view in held.values()):
                assert tier.path.stat().st_size <= 1.125 * tier.file_bytes
        assert takes(tier.path, tier.file_bytes)
        for buffer, numbers, view in held.values():
            assert torch.equal(buffer.tensor, numbers)
            assert view is None or torch.equal(view, numbers[1])
    held.clear()
    del buffer, view
    gc.collect()
    tier.tidy()
    assert tier.file_bytes == tier.path.stat().st_size == 4096


def test_a_buffer_is_written_by_one_thread_while_another_closes_gaps(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=None)
    numbers = torch.arange(4096.0 * 4).view(1, 4096, 4)
    buffers, others = [], []
    for _ in range(8):
        buffers.append(tier.buffer((1, 4096, 4), torch.float32, CPU))
        others.append(tier.buffer((1, 512, 4), torch.float32, CPU))
    done = threading.Event()

    def write(buffer):
        for start in range(0, 4096, 16):
            buffer.write(0, start, numbers[0, start : start + 16])

    def tidy():
        while not done.is_set():
            tier.tidy()
            others.append(tier.buffer((1, 700, 4), torch.float32, CPU))
            others.pop(0)

    threads = [threading.Thread(target=write, args=(buffer,)) for buffer in buffers]
    closing = threading.Thread(target=tidy)
    for thread in (*threads, closing):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    closing.join()
    assert all(torch.equal(buffer.tensor, numbers) for buffer in buffers)


def test_a_limit_that_has_no_room_to_move_in_leaves_buffers_where_they_are(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=3 * 4096)
    held = [tier.buffer((1, 1024), torch.float32, CPU) for _ in range(3)]
    held[1].write(0, 0, torch.ones(1024))
    del held[0]
    tier.set_limit(2 * 4096)
    tier.tidy()
    assert held[0].tensor.eq(1).all()
    assert tier.file_bytes == 3 * 4096
    tier.set_limit(3 * 4096)
    tier.tidy()
    assert tier.path.stat().st_size == tier.file_bytes


def test_the_ledger_says_what_the_file_takes(tmp_path):
    model = model_of("llama")
    cache = kvfold.cache(model, f"sentkv(budget=0.5, tier='disk', directory='{tmp_path}')", prompt_tokens=0)
    feed(model, text(1, 60), cache)
    cache.fold()
    ledger = cache.ledger()
    assert takes(next(tmp_path.iterdir()), ledger.file_bytes)
    assert f"the file on disk takes {ledger.file_bytes} bytes" in str(ledger)
    assert kvfold.cache(model, "full").ledger().file_bytes == 0


def test_the_limit_counts_what_the_file_takes(tmp_path):
    tier = DiskTier(tmp_path, limit_bytes=5 * 4096)
    held = [tier.buffer((1, 1024), torch.float32, CPU) for _ in range(5)]
    with pytest.raises(FileError, match="it has 20480 and may have 20480"):
        tier.buffer((1, 1), torch.float32, CPU)
    del held[1], held[2]  # apart: no place of two pages
    held.append(tier.buffer((1, 2048), torch.float32, CPU))
    with pytest.raises(BudgetError, match="takes 20480 bytes already"):
        tier.set_limit(20479)


def test_a_disk_that_cannot_be_given_room_back_counts_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "give_back_room", lambda *where: False)
    tier = DiskTier(tmp_path, limit_bytes=3 * 4096)
    held = [tier.buffer((1, 1024), torch.float32, CPU) for _ in range(3)]
    held[1].write(0, 0, torch.ones(1, 1024)[0])
    del held[1]
    assert tier.file_bytes == 4 * 4096
    with pytest.raises(FileError, match="may have 12288"):
        tier.buffer((1, 2048), torch.float32, CPU)
    assert not tier.buffer((1, 1024), torch.float32, CPU).tensor.any()


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


def test_what_is_only_called_like_a_file_of_ours_stays(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    gone, mine = process.pid, os.getpid()
    mark = f"kvfold disk tier of process {gone}\n"
    theirs = {
        f"kvfold-{gone}-abcdefgh.far": "my thesis",
        f"kvfold-{gone}-abcdefgi.far": "",
        f"kvfold-{mine}-abcdefgj.far": mark,  # the mark of another
        "kvfold-notes.far": mark,
        "kvfold-.far": mark,
        f"kvfold-{os.getppid()}-abcdefgh.far": f"kvfold disk tier of process {os.getppid()}\n",  # it runs
    }
    for name, words in theirs.items():
        (tmp_path / name).write_text(words)
    os.mkfifo(tmp_path / f"kvfold-{gone}-abcdefgk.far")
    (tmp_path / f"kvfold-{gone}-abcdefgl.far").mkdir()
    (tmp_path / "elsewhere").write_text(mark)
    (tmp_path / f"kvfold-{gone}-abcdefgm.far").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path)
    for name in (f"kvfold-{gone}-abcdefgn.far", f"kvfold-{gone}-abcdefgo.far.new"):
        (tmp_path / name).write_text(mark + "slots")
    assert len(remove_stale(tmp_path)) == 2
    assert files(tmp_path) == before
    assert all((tmp_path / name).read_text() == words for name, words in theirs.items())


def test_what_a_copy_of_a_cache_writes_is_not_seen_by_the_cache(tmp_path):
    model = model_of("llama")
    plan = f"sentkv(budget=20, length=5, window=2, recent=2, tier='disk', directory='{tmp_path}')"
    alone, cache = (kvfold.cache(model, plan, stride=8) for _ in range(2))
    for one in (alone, cache):
        feed(model, text(1, 40), one)
    twin = copy.deepcopy(cache)
    feed(model, text(1, 30, seed=2), twin, sizes=(1,) * 29)
    found, wanted = (feed(model, text(1, 30, seed=1), one, sizes=(1,) * 29) for one in (cache, alone))
    assert close(found, wanted)  # slots are fetched anew, into other places: sums are rounded otherwise
