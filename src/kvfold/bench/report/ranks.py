"""A picture of ranks: a text with each token shaded by how much of it is kept, layer by layer.

One self-contained page, drawn from a cache that has read the text and folded it. Any layout can be asked; one that
keeps all of every slot gives an even page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean as mean
from typing import Any

import torch

_STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #111 }
.text { white-space: pre-wrap } .text span { border-radius: 2px }
.bar { display: flex; align-items: center; gap: .6em; font-size: 13px } .bar i { background: #3b6fd4; height: .8em }
.bar b { width: 4em; text-align: right; font-weight: normal } table { border-collapse: collapse }
td, th { padding: .1em .8em; text-align: right } td:first-child, th:first-child { text-align: left }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a cache keeps of each token of a text."""

    plan: str
    tokens: tuple[str, ...]
    layers: Mapping[int, tuple[float, ...]]  # by layer, a share of each token's numbers; 0 where it was dropped


def shares_of(model: Any, tokenizer: Any, plan: str, text: str) -> Shares:
    """Read a text in one forward, fold it, and look what is kept."""
    from kvfold.open import cache

    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    held = cache(model, plan)
    with torch.no_grad():
        model(ids, past_key_values=held, logits_to_keep=1)
    held.fold()
    layers = {}
    for index, layer in held.memory.layers.items():
        shares = [0.0] * ids.shape[1]
        for part in (layer.state.sinks, layer.state.folded):
            for position, share in () if part is None else _of_part(part):
                shares[position] = share
        tail = layer.state.tail
        for position in [] if tail is None else tail.positions[0, : tail.length].tolist():
            shares[position] = 1.0
        layers[index] = tuple(shares)
    return Shares(plan=str(held.plan), tokens=tuple(tokenizer.decode([one]) for one in ids[0].tolist()), layers=layers)


def _of_part(part: Any) -> list[tuple[int, float]]:
    """List the position of each token that a part holds, and the share of its numbers that is kept."""
    heads = len(part.counts[0])
    positions = [part.read(slice(head, head + 1)).positions[0, 0].tolist() for head in range(heads)]
    shares = part.usage().shares
    if shares is not None:
        return list(zip(positions[0], shares[0].tolist(), strict=True))
    # Whole slots: the share of heads that hold the token.
    every = [position for of_head in positions for position in of_head]
    return [(position, every.count(position) / heads) for position in set(every)]


def page(shares: Shares) -> str:
    """The page."""
    count = len(shares.tokens)
    together = tuple(mean([layer[at] for layer in shares.layers.values()]) for at in range(count))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(shares.plan)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(shares.plan)}</h1>",
        f"<p>{count} tokens, {mean(together):.3f} of their numbers kept. Darker keeps more.",
        _text(shares.tokens, together),
        f"<h2>Tokens that keep most and least</h2>{_words(shares.tokens, together)}",
    ]
    for index, own in shares.layers.items():
        inside = _histogram(own) + _text(shares.tokens, own)
        parts.append(f"<details><summary>Layer {index}: {mean(own):.3f}</summary>{inside}</details>")
    return "\n".join(parts) + "\n"


def _text(tokens: Sequence[str], shares: Sequence[float]) -> str:
    spans = (
        f'<span style="background: rgba(59, 111, 212, {share:.2f})" title="{share:.2f}">{escape(token)}</span>'
        for token, share in zip(tokens, shares, strict=True)
    )
    return f"<p class=text>{''.join(spans)}</p>"


def _histogram(shares: Sequence[float]) -> str:
    values = sorted({round(share, 3) for share in shares})
    counts = {value: sum(round(share, 3) == value for share in shares) for value in values}
    most = max(counts.values())
    return "".join(
        f'<div class=bar><b>{value:.3f}</b><i style="width: {20 * count / most:.2f}em"></i>{count}</div>'
        for value, count in counts.items()
    )


def _words(tokens: Sequence[str], shares: Sequence[float]) -> str:
    """The tokens that come at least three times, by how much they keep on average."""
    seen: dict[str, list[float]] = {}
    for token, share in zip(tokens, shares, strict=True):
        if token.strip():
            seen.setdefault(token.strip(), []).append(share)
    often = sorted(((mean(kept), token, len(kept)) for token, kept in seen.items() if len(kept) > 2), reverse=True)
    if not often:
        return "<p>No token comes three times."
    rows = [
        f"<tr><td>{escape(token)}<td>{kept:.3f}<td>{count}"
        for kept, token, count in (often if len(often) <= 24 else often[:12] + often[-12:])
    ]
    return f"<table><tr><th>token<th>kept<th>times{''.join(rows)}</table>"
