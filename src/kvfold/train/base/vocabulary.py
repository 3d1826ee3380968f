"""The texts that the tokenizer of a base model is trained on: generated talk, and stretches of real text.

Only the training half of the generator is read. Knows nothing of models.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from kvfold.data import FAMILIES, NEEDLES, needle, real, training_dialogue
from kvfold.data import tokenizer as tokenizers
from kvfold.data.drills import DRILLS, drill

_SEED = 10_000_000  # far from the seeds of training
_REAL_CHARACTERS = {  # of each set; prose and talk in like parts
    "star": 900_000,
    "fairytaleqa.train": 600_000,
    "qmsum.train": 400_000,
    "gsm8k.train": 300_000,
    "novels": 600_000,
}


def make_tokenizer(folder: Path, *, data: Path | None, vocabulary: int, positions: int) -> Tokenizer:
    """Train a tokenizer and write its files into `folder`."""
    tokenizer = tokenizers.train(corpus(data), vocabulary=vocabulary)
    tokenizers.save(tokenizer, folder, positions=positions)
    return tokenizer


def corpus(data: Path | None, *, samples: int = 1500) -> Iterator[str]:
    """Message contents after a space, as the chat template renders them, then real text where a folder is given."""
    for seed in range(_SEED, _SEED + samples):
        for family in FAMILIES:
            yield from (" " + message.content for message in training_dialogue(family, turns=6, seed=seed))
    for seed in range(_SEED, _SEED + samples // 3):
        for kind in DRILLS:
            yield from (" " + message.content for message in drill(kind, keys=100 if kind == "sums" else 4, seed=seed))
        for kind in NEEDLES:
            document = needle(kind, split="train", tokens=200, count=lambda text: len(text) // 4, seed=seed)
            yield from (" " + document.prompt, " " + document.reply)
    if data is not None:
        yield from _real(data)


def _real(data: Path) -> Iterator[str]:
    left = dict(_REAL_CHARACTERS)
    for name, text in real.documents(data, tuple(real.SHIPPED)):
        if left[name] > 0:
            text = text[:20_000]
            left[name] -= len(text)
            yield text
