"""What a finished training run leaves behind: the model in bfloat16, and a card that is its training record.

The weights are rounded before they are scored, so that the card describes what ships. Knows nothing of the loop.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvfold.data import FAMILIES
from kvfold.data.real import SHIPPED
from kvfold.train.base.score import Answerer, score_chats, score_needles
from kvfold.train.base.settings import BaseSettings


def export(model: Any, folder: Path) -> None:
    """Write config, generation config and weights; the model at hand is rounded to bfloat16 too, and stays float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    model.to(torch.float32)


def held_out(answerer: Answerer, *, n: int = 100) -> dict[str, Any]:
    """Scores on the held-out split: the families at 16 to 24 turns, needles at 2,048 and 4,096 tokens."""
    answerer.model.eval()
    chats = score_chats(answerer, n=n)
    kinds = ("single", "multikey", "multivalue", "multiquery", "variable")
    answerer.batch = 4
    return {
        "n": n,
        "families": {name: [score.score, score.none, score.shortcut] for name, score in chats.items()},
        "needles": {
            2048: score_needles(answerer, kinds=kinds, tokens=2048, n=n // 2),
            4096: score_needles(answerer, kinds=kinds[:2], tokens=4096, n=n // 2),
        },
    }


def write_card(folder: Path, *, preset: str, settings: BaseSettings, scores: Mapping[str, Any]) -> None:
    """README.md of a model: what it is, how it was trained, what it scores, and the data with their licences."""
    records = [json.loads(line) for line in (folder / "record.jsonl").read_text(encoding="utf-8").splitlines()]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = "\n".join([*_head(preset, config), *_training(settings, records), *_scores(scores), *_data(settings)])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def _head(preset: str, config: Mapping[str, Any]) -> list[str]:
    shape = (
        f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, {config['num_attention_heads']} query "
        f"heads and {config['num_key_value_heads']} key/value heads of {config['head_dim']}, feed-forward "
        f"{config['intermediate_size']}, vocabulary {config['vocab_size']}, tied embeddings"
    )
    return [
        "---",
        "license: apache-2.0",
        "language: en",
        "---",
        "",
        f"# kvfold {preset}",
        "",
        "A very small language model whose only purpose is to show, on any machine, what folding a key-value cache",
        "does to a chat. It answers questions about facts, references, prices and rules told many turns before; it",
        "knows nothing of the world and is no assistant.",
        "",
        f"Stock `LlamaForCausalLM`: {shape}. Weights in bfloat16. Byte-level BPE with single digits; the chat",
        "template is in `tokenizer_config.json`.",
        "",
    ]


def _training(settings: BaseSettings, records: list[dict]) -> list[str]:
    last = records[-1]
    lines = [
        "## Training record",
        "",
        f"`kvfold train base --preset {settings.preset} --seed {settings.seed}`: {last['tokens']:,} tokens (padding "
        f"counted), {last['step']:,} steps, {last['seconds'] / 60:.0f} minutes.",
        f"Muon at {settings.loop.matrix_rate} for matrices, AdamW at {settings.loop.other_rate} for embeddings "
        f"and norms; flat to {settings.loop.flat_until:.0%}, then linear to {settings.loop.last_rate:.0%}; "
        f"running average of the weights "
        f"({settings.loop.average}).",
        "The first three layers start with heads that look back (`train/base/warmstart.py`)."
        if settings.start is None
        else "The run started from the weights of an earlier one, every ladder at its top (`docs/log/tiny.md`).",
        *(["The weights are the mean of this run's and of those that it started from."] if settings.soup else []),
        "",
        "Share of scored replies right on the highest rung of each ladder, while training (rung: share):",
        "",
        "| minutes | tokens | " + " | ".join(f"chat/{name}" for name in FAMILIES) + " | needle/multikey |",
        "|---|---|" + "---|" * (len(FAMILIES) + 1),
    ]
    for record in records[:: max(1, len(records) // 16)]:
        cells = []
        for name in [*(f"chat/{family}" for family in FAMILIES), "needle/multikey"]:
            at, right, _ = record["ladders"].get(name, (None, 0.0, 0))
            cells.append("-" if at is None else f"{at}: {right:.2f}")
        lines.append(f"| {record['seconds'] / 60:.0f} | {record['tokens']:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Held-out scores",
        "",
        f"Greedy replies of the rounded weights with the stock cache; {scores['n']} dialogues a family of 16 to 24",
        "turns, every question a collision; `none` sees the question only, `shortcut` is the best reader without",
        "bindings.",
        "",
        "| family | full | none | shortcut |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} |" for name, (a, b, c) in scores["families"].items()]
    lines += ["", "| needles | tokens | right |", "|---|---|---|"]
    lines += [
        f"| {kind} | {tokens} | {right:.3f} |" for tokens, by in scores["needles"].items() for kind, right in by.items()
    ]
    return [*lines, ""]


def _data(settings: BaseSettings) -> list[str]:
    lines = [
        "## Data",
        "",
        "Dialogues, drills and documents from kvfold's own generator (`kvfold.data`, training half).",
    ]
    if settings.data is not None:
        lines += ["Natural text:", ""] + [f"- {name}: {licence}" for name, licence in SHIPPED.items()]
    return lines
