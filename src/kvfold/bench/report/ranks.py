"""A picture of ranks: a text with each token shaded by how much of it is kept, layer by layer.

One self-contained page, drawn from a cache that has read the text and folded it. It works for any plan; one that
keeps all of every slot gives an even page.
"""

from collections import Counter
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
    """The share of each token of a text that a cache keeps."""

    plan: str
    tokens: tuple[str, ...]
    layers: Mapping[int, tuple[float, ...]]  # by layer, a share of each token's numbers; 0 where it was dropped


def shares_of(model: Any, tokenizer: Any, plan: str, text: str) -> Shares:
    """Read a text in one forward, fold it, and measure what is kept of each token."""
    from kvfold.hf.argument import given
    from kvfold.hf.kept import kept_shares
    from kvfold.open import cache

    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    folded = cache(model, plan, least=0)
    with torch.no_grad():
        model(ids, logits_to_keep=1, **given(model, folded))
    folded.fold()
    tokens = ids[0].tolist()
    return Shares(
        plan=str(folded.plan),
        tokens=tuple(tokenizer.decode([token]) for token in tokens),
        layers=kept_shares(folded, len(tokens)),
    )


def page(shares: Shares) -> str:
    """Write the page."""
    together = tuple(mean(each) for each in zip(*shares.layers.values(), strict=True))  # over layers
    style = f"<style>{_STYLE}</style>"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(shares.plan)}</title>{style}",
        f"<h1>{escape(shares.plan)}</h1>",
        f"<p>{len(shares.tokens)} tokens, {mean(together):.3f} of their numbers kept. Darker keeps more.",
        _text(shares.tokens, together),
        f"<h2>Tokens that keep most and least</h2>{_words(shares.tokens, together)}",
    ]
    for index, of_layer in shares.layers.items():
        inside = _histogram(of_layer) + _text(shares.tokens, of_layer)
        parts.append(f"<details><summary>Layer {index}: {mean(of_layer):.3f}</summary>{inside}</details>")
    return "\n".join(parts) + "\n"


def _text(tokens: Sequence[str], shares: Sequence[float]) -> str:
    spans = []
    for token, share in zip(tokens, shares, strict=True):
        colour = f"rgba(59, 111, 212, {share:.2f})"
        spans.append(f'<span style="background: {colour}" title="{share:.2f}">{escape(token)}</span>')
    return f"<p class=text>{''.join(spans)}</p>"


def _histogram(shares: Sequence[float]) -> str:
    counts = Counter(round(share, 3) for share in shares)
    most = max(counts.values())
    bars = []
    for value, count in sorted(counts.items()):
        width = 20 * count / most
        bars.append(f'<div class=bar><b>{value:.3f}</b><i style="width: {width:.2f}em"></i>{count}</div>')
    return "".join(bars)


def _words(tokens: Sequence[str], shares: Sequence[float]) -> str:
    """The tokens that come at least three times, by how much they keep on average."""
    seen: dict[str, list[float]] = {}
    for token, share in zip(tokens, shares, strict=True):
        word = token.strip()
        if word:
            seen.setdefault(word, []).append(share)
    often = [(mean(kept), word, len(kept)) for word, kept in seen.items() if len(kept) > 2]
    often.sort(reverse=True)
    if not often:
        return "<p>No token comes three times."
    shown = often if len(often) <= 24 else often[:12] + often[-12:]
    rows = []
    for kept, word, count in shown:
        rows.append(f"<tr><td>{escape(word)}<td>{kept:.3f}<td>{count}")
    return f"<table><tr><th>token<th>kept<th>times{''.join(rows)}</table>"
