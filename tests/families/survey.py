"""Judges every family, each in a process of its own, and writes down what was found: verdicts.json and docs/models.md.

`python tests/families/survey.py` judges all, `... survey.py NAME NAME` some of them; the others' verdicts stay. A
family that takes too long or ends its process is wrong.
"""

import json
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
VERDICTS = Path(__file__).with_name("verdicts.json")
PAGE = TESTS.parent / "docs" / "models.md"
LIMIT_SECONDS = 300

_INTRODUCTION = """# Models

What kvfold does with each family of decoders in transformers {version}, tried on small random models with the names of
`AutoModelForCausalLM`. This page is generated: `make families` judges all families anew.

- **right**: with plan `full`, tokens and logits are those of the model's own cache (logits to {near:g} of their size in
  float32), also for a second turn in one piece and for a batch padded on the left; undone, forked and saved caches go
  on alike; the plans {plans} run; and the model is as before afterwards.
- **refused**: `kvfold.cache(model)` says in one line why not, and the model is as before.
- **not built**: transformers could not build or run a small model of it, so nothing is known.

Layers that slide over a window, recurrent layers and convolutions stay as transformers keeps them: what folds are the
layers of full attention.
"""


def verdicts(names: Iterable[str], note: Callable[[str, str, str], None]) -> dict[str, list[str]]:
    """Judge families one by one; `note` is called with each verdict."""
    found: dict[str, list[str]] = {}
    for name in names:
        found[name] = list(_apart(name))
        note(name, *found[name])
    return found


def _apart(name: str) -> tuple[str, str]:
    """Judge one family in a process of its own."""
    context = multiprocessing.get_context("fork")  # torch and transformers are there already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_judge_into, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(LIMIT_SECONDS):
            return ours.recv()
        return "wrong", f"not judged within {LIMIT_SECONDS} seconds"
    except EOFError:
        return "wrong", "its process ended"
    finally:
        process.kill()
        process.join()


def _judge_into(name: str, pipe: Any) -> None:
    from families.judge import judge

    _silence()
    verdict = judge(name)
    pipe.send((verdict.kind, verdict.reason))


def _silence() -> None:
    """Families warn of much that is not asked for here."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)


def page(found: dict[str, list[str]]) -> str:
    """Write the page of all verdicts."""
    import transformers

    from families.judge import NEAR, PLANS

    plans = ", ".join(f"`{plan.partition('(')[0]}`" for plan in PLANS)
    version = transformers.__version__
    counts = {kind: sum(verdict[0] == kind for verdict in found.values()) for kind in ("right", "refused", "not built")}
    lines = [_INTRODUCTION.format(version=version, near=NEAR, plans=plans)]
    lines += [f"{counts['right']} are right, {counts['refused']} refused, {counts['not built']} not built.\n"]
    lines += ["| family | verdict | why |", "|---|---|---|"]
    lines += [f"| {name} | {kind} | {_why(kind, reason)} |" for name, (kind, reason) in sorted(found.items())]
    return "\n".join(lines) + "\n"


def _why(kind: str, reason: str) -> str:
    """Give the middle of a refusal: what is true, without what was asked and what to do."""
    parts = reason.split("; ")
    if kind == "refused" and len(parts) >= 3:
        reason = "; ".join(parts[1:-1])
    return reason.replace("|", "/")


def main(names: Sequence[str]) -> None:
    """Judge families, and write what was found."""
    from families.builder import NAMES

    _silence()
    known = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    found = verdicts(names or NAMES, lambda *verdict: print(*verdict, flush=True))
    known = {name: (known | found)[name] for name in NAMES if name in known | found}
    VERDICTS.write_text(json.dumps(known, indent=1) + "\n")
    PAGE.write_text(page(known))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main(sys.argv[1:])
