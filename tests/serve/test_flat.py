"""Memory stays flat over very many short requests: that of the process, what chats hold, and what lies on disk.

Of three requests one begins a chat, one goes on in it, and one is a completion, of which nothing is held. Budgets are
so small that chats leave memory and disk all the time. KVFOLD_FAULTS=20 (`make faults`) sends ten thousand.
"""

import concurrent.futures
import os

import httpx2
import pytest

from kvfold.serve.load import Load, ledger, resident_bytes
from serve.conftest import user
from serve.process import process

ROUNDS = 60 if os.environ.get("KVFOLD_FAULTS", "1") == "1" else 3334  # of three requests each
CLIENTS = 8
WINDOWS = 10  # after each of them memory is looked at
WARM = 3  # of them, in which buffers and arenas of the allocator grow to their size
GROWTH_BYTES = 8 << 20  # of the process after that, at most: a leak of 1 KB a request would be 7 MB in ten thousand
MEMORY_BYTES, STORE_BYTES = 1_000_000, 600_000


def ask_thrice(http, url, number) -> None:
    """Begin a chat, go on in it, and let a text be completed."""
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    said = [user(f"Parcel {number} is for Anna, who lives in Turin.")]
    for _ in range(2):
        answer = http.post(f"{url}/v1/chat/completions", json={**body, "messages": said})
        assert answer.status_code == 200, answer.text
        said = [*said, answer.json()["choices"][0]["message"], user("Whose is it?")]
    answer = http.post(f"{url}/v1/completions", json={**body, "prompt": f"Parcel {number}"})
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
def test_memory_is_flat_over_very_many_short_requests(tmp_path):
    store = tmp_path / "store"
    options = ("--memory", str(MEMORY_BYTES), "--store", str(store), "--store-limit", str(STORE_BYTES))
    resident, held, chats, on_disk = [], [], [], []
    with (
        process(tmp_path / "log", *options) as server,
        httpx2.Client(timeout=300) as http,
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        load = Load(url=f"{server.url}/v1", model="tiny")
        for window in range(WINDOWS):
            numbers = range(window * ROUNDS // WINDOWS, (window + 1) * ROUNDS // WINDOWS)
            list(pool.map(lambda number: ask_thrice(http, server.url, number), numbers))
            counted = ledger(http, load)
            resident.append(resident_bytes(server.pid)[0])
            held.append(counted["held_bytes"] + counted["promised_bytes"])
            chats.append(sum(counted[f'chats{{where="{place}"}}'] for place in ("memory", "disk")))
            on_disk.append(sum(path.stat().st_size for path in store.rglob("*.kvfold")))
    print(f"{3 * ROUNDS} requests; after each tenth of them:")
    print("MB of the process:", *(f"{size / 1e6:.1f}" for size in resident))
    print("KB of chats:", *(f"{size / 1e3:.0f}" for size in held))
    print("chats:", *(f"{count:.0f}" for count in chats), "KB on disk:", *(f"{size / 1e3:.0f}" for size in on_disk))
    assert max(resident[WARM:]) - max(resident[:WARM]) < GROWTH_BYTES
    assert max(held) <= MEMORY_BYTES
    assert max(on_disk) <= STORE_BYTES
    assert max(chats) < ROUNDS / 2, "chats were to leave the disk, too"
