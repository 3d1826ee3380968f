"""Training the base models: `tiny`, which ships with the package, and `small`.

Puts together tokenizer, samples, curriculum and loop; writes checkpoints, a record of the run and the finished model.
Knows nothing of the command line.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from kvfold.data import real
from kvfold.data import tokenizer as tokenizers
from kvfold.errors import DataError
from kvfold.hf.load import new_llama
from kvfold.train.base.batches import Batch, Samples, make_batch
from kvfold.train.base.card import export, held_out, write_card
from kvfold.train.base.curriculum import base_curriculum
from kvfold.train.base.loss import TextLoss
from kvfold.train.base.score import Answerer
from kvfold.train.base.settings import PRESETS, BaseSettings
from kvfold.train.base.vocabulary import make_tokenizer
from kvfold.train.base.warmstart import look_back
from kvfold.train.loop import Trainer
from kvfold.train.losses import TokenLoss
from kvfold.train.processes import device, join_processes
from kvfold.train.run import Run


class BaseRun(Run):
    """A run that trains a base model; it changes as it trains."""

    settings: BaseSettings

    def __init__(self, settings: BaseSettings) -> None:
        super().__init__(settings, rank=join_processes())
        self.rng = random.Random(f"{settings.seed}:{self.rank}" if self.rank else settings.seed)
        torch.manual_seed(settings.seed)
        natural = [text for _, text in real.documents(settings.data, tuple(real.SHIPPED))] if settings.data else []
        self.tokenizer = self._tokenizer()
        self.samples = Samples(self.tokenizer, natural)
        self.curriculum = base_curriculum()
        if not natural:
            self.curriculum.ladders.pop("natural")
        self.model = fresh_model(settings.preset, self.tokenizer, seed=settings.seed)
        if settings.start is not None:
            take_weights(self.model, settings.start)
            self.curriculum.climb()
        self.model.to(device())  # pyright: ignore[reportArgumentType]
        self.trainer = Trainer(self.model, settings.loop, TextLoss(self.model))
        if settings.resume:
            self.resume()

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer in the output folder; it is trained first where there is none."""
        if (self.settings.out / "tokenizer.json").is_file():
            return tokenizers.load(self.settings.out)
        shape = PRESETS[self.settings.preset]
        if self.settings.start is not None:
            tokenizer = tokenizers.load(self.settings.start)
            tokenizers.save(tokenizer, self.settings.out, positions=shape.max_position_embeddings)
            return tokenizer
        return make_tokenizer(
            self.settings.out,
            data=self.settings.data,
            vocabulary=shape.vocab_size,
            positions=shape.max_position_embeddings,
        )

    def batches(self) -> Iterator[Batch]:
        """Batches as the curriculum asks for them, without end."""
        while True:
            ladder, rung = self.curriculum.draw(self.rng)
            gaps = self.settings.gaps if self.curriculum.ladders["copies"].rung > 1 else 0
            size = ladder.rungs[rung]
            yield make_batch(
                self.samples,
                ladder.name,
                rung=rung,
                size=size,
                tokens=self.settings.batch_tokens,
                rng=self.rng,
                gaps=gaps,
            )

    def finish(self) -> None:
        """Write the finished model, made of the averaged weights, and its card with held-out scores.

        Averaging with an earlier model: Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
        """
        if self.rank:
            return
        self.trainer.swap_averaged()
        if self.settings.soup is not None:
            trained = [parameter.detach().clone() for parameter in self.trainer.parameters]
            take_weights(self.model, self.settings.soup)
            with torch.no_grad():
                for parameter, weights in zip(self.trainer.parameters, trained, strict=True):
                    parameter.lerp_(weights, 0.5)
        export(self.model, self.settings.out)
        scores = held_out(Answerer(self.model, self.tokenizer))
        self.trainer.swap_averaged()
        write_card(self.settings.out, preset=self.settings.preset, settings=self.settings, scores=scores)

    def state(self) -> dict:
        """How far every ladder has come."""
        return self.curriculum.state()

    def restore(self, state: dict) -> None:
        """Take up what `state` gave."""
        self.curriculum.restore(state)

    def findings(self) -> dict[str, Any]:
        """The share of the rate, the losses, and the ladders that are open."""
        return {
            "rate": round(self.trainer.rate(), 4),
            "loss": {name: round(loss, 4) for name, loss in sorted(self.trainer.progress.losses.items())},
            "ladders": {
                one.name: [one.rungs[one.rung], round(one.right, 3), one.batches] for one in self.curriculum.open()
            },
        }

    def learned(self, batch: Batch, loss: TokenLoss) -> None:
        """Let the batch's ladder know how many replies were right."""
        if loss.scored:
            self.curriculum.ladders[batch.source].learn(batch.rung, loss.right / loss.scored)


def fresh_model(preset: str, tokenizer: Tokenizer, *, seed: int = 0) -> torch.nn.Module:
    """A stock Llama of a preset; what writes into the residual stream starts at zero, but for `look_back`."""
    shape = asdict(PRESETS[preset])
    rope_theta = shape.pop("rope_theta")
    model = new_llama(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(tokenizers.BOS),
        eos_token_id=tokenizer.token_to_id(tokenizers.END),
        pad_token_id=tokenizer.token_to_id(tokenizers.PAD),
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    look_back(model, seed=seed)
    return model


def take_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load the weights of a finished model of the same shape. Raises DataError where they are missing or differ."""
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"weights were to be taken from {folder}; they cannot be ({first}); give a model of this preset"
        ) from error
