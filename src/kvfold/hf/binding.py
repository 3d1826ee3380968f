"""ModelBinding: what kvfold knows of one model, once, for all its caches.

It holds the model's name, sizes and limits, the hooks that caches put on it, the delimiter tables of its tokenizers
and what was learned for it. A ModelLease is one cache's share of it: the hooks of that cache stay on the model while
the lease is alive. Both hold the model weakly. Nothing here knows what a cache holds.
"""

import threading
import weakref
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvfold.hf.batch_refusal import BatchRefusal
from kvfold.hf.drop_watch import DropWatch
from kvfold.hf.foreign import refuse_foreign
from kvfold.hf.forward_end import ForwardEnd
from kvfold.hf.forward_pieces import ForwardPieces
from kvfold.hf.generate_watch import GenerateWatch
from kvfold.hf.hidden_states import HiddenStateRecorder, softmax_scale
from kvfold.hf.hooks import ForwardHook
from kvfold.hf.position_ids import PositionIds
from kvfold.hf.stock_layers import folds, stock_layers
from kvfold.hf.token_ids import DelimiterTable, DelimiterTables, IdRecorder
from kvfold.hf.tuned_layers import TunedLayers
from kvfold.place.sentences import ENDS, Ends

_Learned = TypeVar("_Learned")


class ModelBinding:
    """The one object that binds kvfold to a model. It changes: hooks come and go, tables and adapters are kept."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.modules: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet(model.modules())
        positions: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.has_dynamic_rotations = "'dynamic'" in str(getattr(self.text_config, "rope_parameters", None))
        self.position_limit = None if self.has_dynamic_rotations else positions  # they grow with the text
        self.drop_watch = self._drop_watch()
        self.forward_end = ForwardEnd(model)
        self.forward_pieces = ForwardPieces(model)
        self.generate_watch, self.batch_refusal = GenerateWatch(model), BatchRefusal(model)
        self.token_ids, self.given_ids = IdRecorder(model), IdRecorder(model, at="model")
        self.position_ids = PositionIds(model)
        self.tuned_layers = TunedLayers(model)
        self.delimiters = DelimiterTables()
        self._learned: dict[Hashable, Any] = {}
        self._registered: dict[str, Callable[[], Any]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelBinding":
        """Give the binding of a model, always the same one. Raises ModelError for what cannot be folded."""
        refuse_foreign(model)
        with _LOCK:
            binding = _BINDINGS.get(model)
            if binding is None:
                binding = _BINDINGS[model] = cls(model)
        return binding

    def _drop_watch(self) -> DropWatch | None:
        """Make the watch of a model that changes its rotations on the way to its last position."""
        switch: int | None = getattr(self.text_config, "original_max_position_embeddings", None)
        if switch is None or switch == self.position_limit or self.has_dynamic_rotations:
            return None
        return DropWatch(self.model, self.name, switch)

    # Sizes and limits -------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The model, which is alive as long as its binding is in use."""
        model = self._model()
        assert model is not None, "a binding lives no longer than its model"
        return model

    @property
    def name(self) -> str:
        """The name under which the model was loaded, or the name of its class."""
        return self.model.config.name_or_path or type(self.model).__name__

    @property
    def text_config(self) -> PretrainedConfig:
        """The configuration of the text decoder, also of a model that reads more than text."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def _layer_config(self) -> Any:
        """The configuration of the first folding layer: sliding ones may have other sizes (Gemma 4)."""
        config: Any = self.text_config
        layers = getattr(config, "per_layer_config", None)  # earlier transformers has one for all
        return config if layers is None else layers[self.folding_layers[0]]

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads of a folding layer."""
        config = self._layer_config
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def head_size(self) -> int:
        """The size of a key of one head in a folding layer."""
        config = self._layer_config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @cached_property
    def folding_layers(self) -> tuple[int, ...]:
        """The indices of the layers of full attention, which fold. Raises ModelError where kvfold cannot fold."""
        return tuple(index for index, layer in enumerate(self.stock_layers()) if folds(layer))

    @property
    def scale(self) -> float | None:
        """The factor of attention scores of all folding layers; None where their modules do not say it."""
        return softmax_scale(self.model, self.folding_layers)

    @property
    def text_limit(self) -> int | None:
        """The number of tokens that a text may have; None where the model sets no limit."""
        before_switch = None if self.drop_watch is None else self.drop_watch.switch - 1
        limits = [limit for limit in (self.position_limit, before_switch) if limit is not None]
        return min(limits, default=None)

    def stock_layers(self) -> list[Any]:
        """Make the layers with which transformers would cache the model. Raises ModelError as `folding_layers`."""
        return stock_layers(self.text_config, self.name)

    def has_module(self, module: torch.nn.Module) -> bool:
        """Tell whether a module is part of the model, also one that was put in later."""
        if module not in self.modules:
            self.modules.update(self.model.modules())
        return module in self.modules

    # Hooks ------------------------------------------------------------------------------------------------------

    @cached_property
    def hidden_states(self) -> HiddenStateRecorder:
        """The recorder of what enters the attention of folding layers."""
        return HiddenStateRecorder(self.model, self.folding_layers)

    def lease(
        self,
        *,
        attention: ForwardHook | None = None,
        token_ids: bool = False,
        hidden_states: bool = False,
        positions: bool = False,
        tokenizer: Any = None,
        ends: Ends | None = None,
    ) -> "ModelLease":
        """Give a cache its share of the model, with hooks for what it must record of each forward.

        `attention` serves folded caches while the lease is alive. Token ids have delimiter classes by `tokenizer`, or
        by the one beside the model's weights. With `positions` the cache says where new tokens stand.
        """
        table = self._table(tokenizer, ENDS if ends is None else ends) if token_ids else None
        return ModelLease(
            self,
            attention=attention,
            token_ids=token_ids,
            hidden_states=hidden_states,
            positions=positions,
            table=table,
        )

    def _table(self, tokenizer: Any, ends: Ends) -> DelimiterTable | None:
        if tokenizer is None:
            return self.delimiters.of_model(self.model.config.name_or_path or "", ends)
        return self.delimiters.of_tokenizer(tokenizer, ends)

    # What was learned -------------------------------------------------------------------------------------------

    def register_adapter(self, kind: str, make: Callable[[], Any]) -> None:
        """Let `make` build the shipped adapter of a kind for a model that none ships for; it is called once."""
        self._registered[kind] = make
        self._learned.pop(("registered", kind), None)

    def registered_adapter(self, kind: str) -> Any:
        """Give the adapter that was registered for a kind; None where none was."""
        make = self._registered.get(kind)
        return None if make is None else self.learned(("registered", kind), make)

    def learned(self, key: Hashable, make: Callable[[], _Learned]) -> _Learned:
        """Give what was learned for the model under a key; `make` reads it the first time."""
        with _LOCK:
            if key not in self._learned:
                self._learned[key] = make()
            return self._learned[key]


class ModelLease:
    """One cache's share of a model. While it is alive its hooks are on the model; a copy of it counts by itself.

    It refers to the binding weakly: what belongs to the model is not held by a cache.
    """

    def __init__(
        self,
        binding: ModelBinding,
        *,
        attention: ForwardHook | None,
        token_ids: bool,
        hidden_states: bool,
        positions: bool,
        table: DelimiterTable | None,
    ) -> None:
        self.name = binding.name
        self.modules = binding.modules
        self.position_limit = binding.position_limit
        self.text_limit = binding.text_limit
        self.drop_watch = binding.drop_watch
        self.forward_end, self.given_ids = binding.forward_end, binding.given_ids
        self.tuned_layers = binding.tuned_layers
        self.records_token_ids = token_ids
        self.records_hidden_states = hidden_states
        self.gives_positions = positions
        self._binding = weakref.ref(binding)
        self._attention = attention
        self._table = None if table is None else weakref.ref(table)
        hooks: list[ForwardHook] = [] if self.drop_watch is None else [self.drop_watch]
        hooks += [binding.forward_end, binding.given_ids, binding.generate_watch, binding.batch_refusal]
        hooks += [] if attention is None else [attention]
        hooks += [binding.token_ids] if token_ids else []
        hooks += [binding.hidden_states] if hidden_states else []
        hooks += [binding.position_ids] if positions else []
        for hook in hooks:
            hook.acquire()
            weakref.finalize(self, hook.release).atexit = False  # a process that ends needs no tidy model

    @property
    def binding(self) -> ModelBinding | None:
        """The binding of the model; None once the model is gone."""
        return self._binding()

    def again(self) -> "ModelLease":
        """Give another cache of the same model the same share."""
        binding = self.binding
        if binding is None:  # no model, no hooks to count
            return self
        return ModelLease(
            binding,
            attention=self._attention,
            token_ids=self.records_token_ids,
            hidden_states=self.records_hidden_states,
            positions=self.gives_positions,
            table=None if self._table is None else self._table(),
        )

    def __deepcopy__(self, memo: dict) -> "ModelLease":
        return self.again()

    def has_module(self, module: torch.nn.Module) -> bool:
        """Tell whether a module is part of the model."""
        if module in self.modules:
            return True
        binding = self.binding
        return binding is not None and binding.has_module(module)

    def take_token_ids(self, rows: int, new: int) -> Int[Tensor, "B Q"] | None:
        """Give the ids of the running forward; None where they are not recorded or not known."""
        binding = self.binding if self.records_token_ids else None
        return None if binding is None else binding.token_ids.take(rows, new)

    def note_token_ids(self, ids: Int[Tensor, "B Q"] | None) -> None:
        """Note the ids that this cache is to take next: of a batch, those of its row."""
        binding = self.binding if self.records_token_ids else None
        if binding is not None:
            binding.token_ids.note(ids)

    def delimiter_classes(self, ids: Int[Tensor, "B Q"] | None) -> UInt8[Tensor, "B Q"] | None:
        """Look up the delimiter classes of ids; None where the ids or the tokenizer are not known."""
        table = None if self._table is None else self._table()
        return None if table is None or ids is None else table.classes_of(ids)

    def take_hidden_states(self, layer_index: int) -> Float[Tensor, "B Q width"] | None:
        """Give the hidden states that entered the running attention of a layer; None where they are not recorded."""
        binding = self.binding if self.records_hidden_states else None
        return None if binding is None else binding.hidden_states.take(layer_index)


_BINDINGS: "weakref.WeakKeyDictionary[PreTrainedModel, ModelBinding]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # one thread may come twice: a collector frees caches wherever it runs
