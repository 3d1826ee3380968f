"""Reading: which token ids a forward has, as marks of where sentences end; a cache itself is given keys only.

A forward pre-hook on a model's embedding sees the ids; it notes them per thread, and the cache that the same forward
fills takes them from there. What the ids mean comes from the tokenizer that was given, or that lies beside the model.
Without ids or tokenizer there are no marks, and text is cut into pieces of one length.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from kvfold.place.sentences import ENDS, Ends, table

_SPACES = ("▁", "Ġ")  # how tokenizers write a leading space inside their vocabulary


class Reader:
    """Notes the ids of the running forward of one model. It changes: a note per thread, gone when it is taken."""

    def __init__(self) -> None:
        self._noted = threading.local()

    def __reduce__(self) -> tuple:
        return Reader, ()  # a copy of the model has a reader of its own

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called by torch before each forward of the embedding."""
        self._noted.ids = args[0] if args else kwargs.get("input")

    def take(self, rows: int, new: int) -> Tensor | None:
        """The ids of the forward that runs in this thread, if they are so many."""
        ids = getattr(self._noted, "ids", None)
        self._noted.ids = None
        return ids if isinstance(ids, Tensor) and ids.shape == (rows, new) else None


class Text:
    """How a cache marks its tokens. The reader and the tables are the model's, for all of its caches."""

    def __init__(self, model: PreTrainedModel, ends: Ends) -> None:
        self._model, self._ends = weakref.ref(model), ends

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any = None, ends: Ends | None = None) -> "Text":
        """The text of a model, read by this tokenizer, or by the one beside the model's weights."""
        if model not in _READERS:
            _READERS[model], _MARKS[model] = Reader(), {}
            model.get_input_embeddings().register_forward_pre_hook(_READERS[model], with_kwargs=True)
        text = cls(model, ENDS if ends is None else ends)
        if text._table not in _MARKS[model] or tokenizer is not None:
            found = _beside(model) if tokenizer is None else tokenizer
            _MARKS[model][text._table] = None if found is None else marks_of(found, text._ends)
        return text

    @property
    def _table(self) -> tuple[tuple[str, int], ...]:
        """The name of its table among the model's."""
        return tuple(self._ends.items())

    def __deepcopy__(self, memo: dict) -> "Text":
        return self

    def take(self, rows: int, new: int) -> Tensor | None:
        """Ids of the new tokens; None where they are not known."""
        model = self._model()
        return None if model is None else _READERS[model].take(rows, new)

    def marks(self, ids: Tensor) -> Tensor | None:
        """Marks of these tokens; None where no tokenizer says what they mean."""
        model = self._model()
        marks = None if model is None else _MARKS[model][self._table]
        return None if marks is None else marks.to(ids.device)[ids.clamp(0, len(marks) - 1)]


_READERS: "weakref.WeakKeyDictionary[PreTrainedModel, Reader]" = weakref.WeakKeyDictionary()
_MARKS: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, Tensor | None]]" = weakref.WeakKeyDictionary()


def marks_of(tokenizer: Any, ends: Ends = ENDS) -> Tensor:
    """A mark for every vocabulary entry, by its decoded text."""
    ids = range(len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[number] for number in ids], clean_up_tokenization_spaces=False)
    spaced = [
        f" {text}" if str(name).startswith(_SPACES) and not text[:1].isspace() else text
        for name, text in zip(names, texts, strict=True)
    ]
    return torch.tensor(list(table(spaced, ends)), dtype=torch.uint8)


def _beside(model: PreTrainedModel) -> Any:
    """The tokenizer in the place that the model was loaded from, if there is one on this disk."""
    name = model.config.name_or_path
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # whatever is wrong with it: text is then cut without it
        return None
