"""Records made by hand for the tests of the bench: a shape with believable numbers, any field replaceable."""

from kvfold.bench.run.record import Record
from kvfold.bench.run.statistics import interval

VERSIONS = {"kvfold": "0.1.0", "torch": "2.13.0"}


def record(plan="snapkv(keep=0.5)", keep=0.5, outcomes=(1.0, 1.0, 0.0, 1.0), **others) -> Record:
    """A record of the chat suite whose score, interval and size follow from the outcomes."""
    score = sum(outcomes) / len(outcomes)
    values = {
        "suite": "chat",
        "suite_version": 1,
        "settings": {"turns": [16, 24]},
        "model": "tiny",
        "fingerprint": "abc123",
        "dtype": "float32",
        "device": "cpu",
        "threads": 2,
        "query_aware": False,
        "seed": 0,
        "by_family": {"recall": score},
        "full": 0.9,
        "none": 0.05,
        "shortcut": 0.3,
        "shortcut_by_family": {"recall": 0.3},
        "retained": min(1.0, score / 0.9),
        "stored": 1.0 if keep is None else keep,
        "resident": 1.0 if keep is None else keep,
        "attended": 1.0 if keep is None else keep,
        "stored_bytes": 1000,
        "resident_bytes": 1000,
        "full_bytes": 2000,
        "ttft_seconds": 0.01,
        "tpot_seconds": 0.002,
        "wall_seconds": 1.5,
        "git": "0" * 40,
        "versions": VERSIONS,
    }
    made = {"plan": plan, "keep": keep, "outcomes": tuple(outcomes), "score": score, "n": len(outcomes)}
    made["interval"] = interval(outcomes)
    return Record(**(values | made | others))


def run() -> list[Record]:
    """A whole run: the ceiling, the floor, one method in two scopes and two sizes, one heuristic without scope."""
    good, fair, bad = (1.0,) * 18 + (0.0,) * 2, (1.0, 0.0) * 10, (0.0,) * 19 + (1.0,)
    return [
        record("full", None, good),
        record("none", None, bad, stored=0.01, resident=0.01, attended=0.01),
        record('snapkv(keep=0.5, scope="history")', 0.5, fair),
        record('snapkv(keep=0.5, scope="turn")', 0.5, good),
        record('snapkv(keep=0.2, scope="history")', 0.2, fair),
        record('snapkv(keep=0.2, scope="turn")', 0.2, bad),
        record("streaming_llm(keep=0.5)", 0.5, fair),
    ]
