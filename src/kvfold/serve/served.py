"""ServedModel: the model of a server with everything that a turn asks of it: encoding, caches, and sizes.

One thread runs the model. Templates are kept by their system prompt, because each is tried when it is made.
"""

from collections.abc import Sequence
from functools import lru_cache

from kvfold.chat.template import Template
from kvfold.data import Message
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.cache import FoldedCache
from kvfold.hf.generation import Model, Settings, Tokenizer, settings_for
from kvfold.memory.forward import Boundaries
from kvfold.open import SINKS, cache_with
from kvfold.plan import Plan

_TEMPLATES = 64  # of different system prompts


class ServedModel:
    """A model, its tokenizer and the plan of its chats."""

    def __init__(self, model: Model, tokenizer: Tokenizer, plan: str, *, name: str, least: int) -> None:
        """Raises PlanError, BudgetError and ModelError for what cannot be served."""
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.plan = Plan.parse(plan)
        self._least = least
        self._template_of = lru_cache(maxsize=_TEMPLATES)(self._new_template)
        self.closing = self._template_of(None).closing()
        self.generation: Settings = settings_for(model, None, stop=self.closing.stop)
        binding = ModelBinding.of(model)
        self.text_limit = binding.text_limit
        per_layer = 2 * binding.kv_heads * binding.head_size * model.dtype.itemsize
        self.token_bytes = len(binding.folding_layers) * per_layer  # a token, held in full
        _refuse_recurrent(name, self.cache(SINKS))  # a plan that cannot be opened says so here too

    def template(self, messages: Sequence[Message]) -> Template:
        """Give the template of a conversation. Raises ModelError where it has no place for the system prompt."""
        system = messages[0].content if messages and messages[0].role == "system" else None
        return self._template_of(system)

    def pinned(self, template: Template) -> int:
        """Count the tokens of a conversation that are never folded."""
        return max(SINKS, template.pinned())

    def cache(self, pinned: int, plan: Plan | None = None, least: int | None = None) -> FoldedCache:
        """Make an empty cache that folds on demand only; a saved chat brings a plan and a floor of its own."""
        return cache_with(
            self.model,
            self.plan if plan is None else plan,
            boundaries=Boundaries(prompt=0),
            pinned=pinned,
            least=self._least if least is None else least,
            tokenizer=self.tokenizer,
        )

    def text_of(self, token: int) -> str:
        """Decode one token by itself."""
        return str(self.tokenizer.decode([token]))

    def _new_template(self, system: str | None) -> Template:
        return Template(self.tokenizer, system=system)


def _refuse_recurrent(name: str, cache: FoldedCache) -> None:
    """Raise ModelError for a model whose replies cannot decode side by side."""
    if cache.stock.has_recurrent:
        raise ModelError(
            f"{name} was to be served; it has recurrent layers, and replies of such a model do not decode side by "
            "side; chat with it by `kvfold chat` or kvfold.Chat, or serve a model of attention layers alone"
        )
