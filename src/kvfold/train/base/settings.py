"""Settings of base training: the shapes of the models, and what one run is given.

`tiny` ships with the package; `small` is four times as wide in all. Knows nothing of how a run goes.
"""

from dataclasses import dataclass, field
from pathlib import Path

from kvfold.errors import DataError
from kvfold.train.loop import LoopSettings
from kvfold.train.run import RunSettings


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
class BaseSettings(RunSettings):
    """One run of base training."""

    preset: str
    start: Path | None = None  # folder of a finished model of this preset to go on from, every ladder at its top
    soup: Path | None = None  # folder of a finished model whose weights the finished ones are averaged with
    batch_tokens: int = 1024
    gaps: int = 2000  # longest jump in positions
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise DataError(f"preset {self.preset!r} was asked; there are {', '.join(PRESETS)}; choose one of them")
