"""The figures of docs/how-to/no-last-position.md: perplexity along one long talk, by how positions are kept.

`python docs/make/long_talk.py --data DIR` reads one talk of many dialogues (DIR holds sgd.dev.jsonl.xz) by the stock
cache and by plans whose positions are kept or compact, all of them piece by piece beside one another. It writes a line
of JSON for each stretch and way to docs/records/no-last-position/stretches.jsonl; no text goes there.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvfold
from kvfold.data.files import read_rows
from kvfold.errors import ModelError
from kvfold.hf.argument import given
from kvfold.hf.generation import stock_cache

RECORD = Path(__file__).resolve().parents[1] / "records" / "no-last-position" / "stretches.jsonl"
PLANS = ("snapkv(tokens=1024)", "streaming_llm(tokens=1024)")
PIECE = 256  # tokens at least that are read between two folds: whole messages
SAID = "<|im_start|>{role}\n{content}<|im_end|>\n"


@dataclass(kw_only=True)
class Way:
    """One cache that reads the talk, and what it has measured in the running stretch."""

    plan: str
    positions: str
    cache: Any
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    has_ended: bool = False  # at the model's last position

    def read(self, model: Any, ids: Tensor) -> Tensor | None:
        """Read a piece and fold it; log-probabilities [tokens, vocabulary], None beyond the last position."""
        started = time.perf_counter()
        try:
            logits = model(input_ids=ids, use_cache=True, **given(model, self.cache)).logits[0]
        except ModelError:
            self.has_ended = True
            return None
        if self.plan != "stock":
            self.cache.fold()
        self.sums["seconds"] += time.perf_counter() - started
        return logits.float().log_softmax(dim=-1)

    def note(self, said: Tensor, stock: Tensor, truth: Tensor) -> None:
        """Add up what was said of the true next tokens, and how far it is from the stock cache."""
        self.sums["tokens"] += len(truth)
        self.sums["nats"] -= float(said.gather(1, truth[:, None]).sum())
        self.sums["kl"] += float((stock.exp() * (stock - said)).sum())
        self.sums["agree"] += float((stock.argmax(dim=-1) == said.argmax(dim=-1)).sum())

    def stretch(self, start: int) -> dict[str, Any]:
        """Say what the stretch from `start` on has shown, and begin the next one."""
        sums, self.sums = self.sums, defaultdict(float)
        tokens = sums["tokens"]
        if not tokens:
            return {}
        is_ours = self.plan != "stock"
        return {
            "plan": self.plan,
            "positions": self.positions,
            "start": start,
            "tokens": int(tokens),
            "perplexity": round(math.exp(sums["nats"] / tokens), 3),
            "kl_from_stock": round(sums["kl"] / tokens, 4),
            "top1_as_stock": round(sums["agree"] / tokens, 4),
            "next_position": self.cache.next_position if is_ours else self.cache.get_seq_length(),
            "stored_bytes": self.cache.ledger().stored_bytes if is_ours else None,
            "seconds": round(sums["seconds"], 1),
        }


def pieces(path: Path, tokenizer: Any, tokens: int) -> Iterator[list[int]]:
    """Give the ids of a talk of `tokens` tokens, whole messages together."""
    piece: list[int] = []
    total = 0
    for row in read_rows(path, fields=("messages",)):
        for message in row["messages"]:
            ids = tokenizer(SAID.format(**message), add_special_tokens=False).input_ids
            piece, total = piece + ids, total + len(ids)
            if len(piece) >= PIECE or total >= tokens:
                yield piece
                piece = []
            if total >= tokens:
                return


def ways(model: Any, plans: list[str]) -> list[Way]:
    """Open the stock cache, then each plan both ways."""
    found = [Way(plan="stock", positions="kept", cache=stock_cache(model))]
    for plan in plans:
        for positions in ("kept", "compact"):
            cache = kvfold.cache(model, plan, prompt_tokens=0, positions=positions)
            found.append(Way(plan=plan, positions=positions, cache=cache))
    return found


def measured(model: Any, talk: Iterator[list[int]], readers: list[Way], stretch: int) -> Iterator[dict[str, Any]]:
    """Read the talk by all caches; yield what each stretch has shown."""
    read = start = 0
    for ids in talk:
        columns = torch.tensor([ids])
        stock = readers[0].read(model, columns)
        assert stock is not None, "the stock cache knows no last position"
        readers[0].note(stock[:-1], stock[:-1], columns[0, 1:])
        for way in readers[1:]:
            said = None if way.has_ended else way.read(model, columns)
            if said is not None:
                way.note(said[:-1], stock[:-1], columns[0, 1:])
        read += len(ids)
        if read - start >= stretch:
            yield from filter(None, [way.stretch(start) for way in readers])
            start = read
    yield from filter(None, [way.stretch(start) for way in readers])


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sgd.dev.jsonl.xz, or such a file")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--stretch", type=int, default=2_000)
    parser.add_argument("--plan", action="append", help=f"default: {', '.join(PLANS)}")
    parser.add_argument("--out", type=Path, default=RECORD)
    asked = parser.parse_args()
    file = asked.data / "sgd.dev.jsonl.xz" if asked.data.is_dir() else asked.data
    model, tokenizer = kvfold.load(asked.model)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), asked.out.open("w", encoding="utf-8") as out:
        readers = ways(model, asked.plan or list(PLANS))
        for row in measured(model, pieces(file, tokenizer, asked.tokens), readers, asked.stretch):
            line = json.dumps({"model": asked.model, "dtype": str(model.dtype), "kvfold": kvfold.__version__, **row})
            print(line, flush=True)
            print(line, file=out, flush=True)


if __name__ == "__main__":
    main()
