"""Training the base models: `tiny`, which ships with the package, and `small`.

Puts together tokenizer, samples, curriculum and loop; writes checkpoints, a record of the run and the finished model.
Knows nothing of the command line.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
from kvfold.train.base.score import Answerer
from kvfold.train.base.vocabulary import make_tokenizer
from kvfold.train.base.warmstart import look_back
from kvfold.train.loop import LoopSettings, Trainer, carry_out
from kvfold.train.losses import TextLoss, TokenLoss
from kvfold.train.processes import device, join_processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The shape of a base model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 2048
    rope_theta: float = 1e6
    max_position_embeddings: int = 8192


PRESETS = {
    "tiny": Preset(
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=512,
    ),
    "small": Preset(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1408,
        vocab_size=4096,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSettings:
    """One run of base training."""

    preset: str
    out: Path
    data: Path | None = None  # folder of real text; without it only generated text is learnt
    seed: int = 0
    resume: bool = False
    start: Path | None = None  # folder of a finished model of this preset to go on from, every ladder at its top
    soup: Path | None = None  # folder of a finished model whose weights the finished ones are averaged with
    batch_tokens: int = 1024
    gaps: int = 2000  # longest jump in positions
    save_every_seconds: float = 180.0
    loop: LoopSettings = field(default_factory=LoopSettings)


class BaseRun:
    """A run: everything it needs, made once; `train` does the work."""

    def __init__(self, settings: BaseSettings) -> None:
        if settings.preset not in PRESETS:
            raise DataError(f"preset {settings.preset!r} was asked; there are {', '.join(PRESETS)}; choose one of them")
        self.settings = settings
        self.rank = join_processes()
        self.rng = random.Random(f"{settings.seed}:{self.rank}" if self.rank else settings.seed)
        torch.manual_seed(settings.seed)
        natural = [text for _, text in real.documents(settings.data)] if settings.data else []
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
            self.curriculum.restore(self.trainer.resume(self._checkpoint, rng=self.rng))
            if self.rank:  # the checkpoint holds the first process's random state; the others draw samples of their own
                self.rng.seed(f"{settings.seed}:{self.rank}:{self.trainer.progress.step}")

    @property
    def _checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"

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

    def train(self, tell: Callable[[dict], None]) -> None:
        """Train to the end; `tell` gets a record every 25 steps, and the same line goes to record.jsonl."""
        carry_out(
            self.trainer, self.batches(), self._learned, record=self.record, save=self.save, out=self.settings.out,
            first=self.rank == 0, save_every_seconds=self.settings.save_every_seconds, tell=tell,
        )  # fmt: skip

    def finish(self) -> None:
        """Write the finished model, made of the averaged weights, and its card with held-out scores.

        Averaging with an earlier model: Wortsman et al., Model soups, https://arxiv.org/abs/2203.05482
        """
        if self.rank:
            return
        self.trainer.swap_averaged()
        if self.settings.soup is not None:
            own = [parameter.detach().clone() for parameter in self.trainer.parameters]
            take_weights(self.model, self.settings.soup)
            with torch.no_grad():
                for parameter, mine in zip(self.trainer.parameters, own, strict=True):
                    parameter.lerp_(mine, 0.5)
        export(self.model, self.settings.out)
        scores = held_out(Answerer(self.model, self.tokenizer))
        self.trainer.swap_averaged()
        write_card(self.settings.out, preset=self.settings.preset, settings=self.settings, scores=scores)

    def save(self) -> None:
        """Write the checkpoint."""
        self.trainer.save(self._checkpoint, rng=self.rng, more=self.curriculum.state())

    def record(self) -> dict:
        """Where the run stands, as one JSON line."""
        progress = self.trainer.progress
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "share": round(progress.share(self.settings.loop), 4),
            "rate": round(self.trainer.rate(), 4),
            "loss": {name: round(loss, 4) for name, loss in sorted(progress.losses.items())},
            "ladders": {
                one.name: [one.rungs[one.rung], round(one.right, 3), one.batches] for one in self.curriculum.open()
            },
        }

    def _learned(self, batch: Batch, loss: TokenLoss) -> None:
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
