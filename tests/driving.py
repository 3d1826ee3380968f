"""What tests do with a model and a cache: feed tokens in chunks, read what is kept, and the oracle of a folded past.

The oracle is the stock model in float64 without any cache, in one pass over the whole text, with one mask per layer
and head that hides from each token what was dropped before it. Nothing of kvfold's attention runs in it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fakes import exact_twin, model_of
from kvfold.attention.basis import Bases
from kvfold.attention.bit_planes import BitPlanes
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.layout import RankedLayout
from kvfold.hf.cache import FoldedCache
from kvfold.memory.dense import DensePart
from kvfold.place.offloaded import OffloadedPart

Kept = dict[int, list[list[list[int]]]]  # layer -> row -> head -> positions, sorted


def feed(model, ids, cache=None, *, mask=None, sizes=()):
    """Logits of all of `ids`, fed in pieces of these sizes and a last one with the rest."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    ends = [*ends, ids.shape[1]] if ends[-1] < ids.shape[1] else ends
    answers = []
    for start, stop in itertools.pairwise(ends):
        answers.append(_forward(model, ids[:, start:stop], cache, mask, last=ids.shape[1] - stop))
    return torch.cat(answers, dim=1)


def _forward(model, ids, cache, mask, *, last):
    if mask is None:
        extra = {}
    else:
        mask = mask[:, : mask.shape[1] - last]
        extra = {"attention_mask": mask, "position_ids": positions_of(mask)[:, -ids.shape[1] :]}
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, **extra).logits


def positions_of(mask):
    """Where each column stands in its row's text; pads get 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def kept(cache: FoldedCache) -> Kept:
    """Positions of everything that is held, once a forward that never ended is undone."""
    cache.ledger()
    held: Kept = {}
    for index, layer in cache.memory.layers.items():
        state = layer.state
        heads = state.tail.keys.shape[1]
        rows = []
        sinks, folded = places_of(state.sinks), places_of(state.folded)
        for row in range(len(state.seen)):
            raw = [p for p in state.tail.positions[row, : state.tail.length].tolist() if p >= 0]
            rows.append([sorted([*_of(sinks, row, head), *_of(folded, row, head), *raw]) for head in range(heads)])
        held[index] = rows
    return held


def _of(places, row, head) -> list[int]:
    return [] if places is None else places[row][head]


def places_of(part) -> list[list[list[int]]] | None:
    """Where the slots of each row and head of a part stood in the text, in the order in which they are read."""
    if part is None:
        return None
    whole = part.table.stored.whole(part.counts) if isinstance(part, OffloadedPart) else part
    if isinstance(whole, DensePart):
        pieces = iter(whole.without_room().positions.split([count for row in whole.counts for count in row]))
        return [[next(pieces).tolist() for _ in row] for row in whole.counts]
    return [whole.take_rows([row]).read().positions[0].tolist() for row in range(len(whole.counts))]


class Oracle:
    """Collects what was visible when each chunk was fed, then answers for the whole text at once. One row only."""

    def __init__(self, family: str, cache: FoldedCache) -> None:
        self.model, self.cache = exact_twin(family), cache
        self.groups = self.model.config.get_text_config(decoder=True).num_attention_heads
        self.fed = 0
        self.visible: dict[int, list[tuple[range, list[list[int]]]]] = {index: [] for index in cache.memory.layers}

    def note(self, tokens: int) -> None:
        """Call before feeding `tokens` more: they see what is held now and, causally, one another."""
        held = kept(self.cache) if self.fed else {index: [[]] for index in self.visible}
        for index, moments in self.visible.items():
            moments.append((range(self.fed, self.fed + tokens), held[index][0]))
        self.fed += tokens

    def logits(self, ids):
        """What the model would say if it could see just what was held."""
        with self._masked(ids.shape[1]), torch.no_grad():
            return self.model(input_ids=ids, use_cache=False).logits

    def _mask(self, index: int, tokens: int) -> torch.Tensor:
        mask = torch.full((1, self.groups, tokens, tokens), -torch.inf, dtype=torch.float64)
        for columns, heads in self.visible[index]:
            new = slice(columns.start, columns.stop)
            triangle = torch.full((len(columns), len(columns)), -torch.inf, dtype=torch.float64).triu(1)
            mask[:, :, new, new] = triangle
            for head, held in enumerate(heads):
                group = self.groups // len(heads)
                for column in columns:
                    mask[0, head * group : (head + 1) * group, column, held] = 0.0
        return mask

    @contextmanager
    def _masked(self, tokens: int) -> Iterator[None]:
        hooks = []
        for module in self.model.modules():
            if getattr(module, "layer_idx", None) in self.visible and hasattr(module, "o_proj"):
                mask = self._mask(module.layer_idx, tokens)
                hooks.append(module.register_forward_pre_hook(_puts(mask), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _puts(mask):
    def hook(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    return hook


def exact(family: str, ids, mask=None):
    """Logits of the whole text in float64, nothing dropped."""
    return feed(exact_twin(family), ids, mask=mask)


def error(found, wanted) -> float:
    """Root of the mean squared difference, in float64."""
    return float((found.double() - wanted.double()).square().mean().sqrt())


def close(found, wanted, *, family: str = "llama") -> bool:
    """Whether two results differ by no more than float32 attention does on this scale of logits."""
    found, wanted = found.detach(), wanted.detach()
    scale = float(wanted.double().square().mean().sqrt()) + 1e-9
    return found.shape == wanted.shape and float((found.double() - wanted.double()).abs().max()) < 2e-4 * scale + 1e-6


def storages(thing: object) -> dict[int, int]:
    """Every distinct storage of a tensor that can be reached from an object, by address: its bytes.

    What belongs to the model and not to a cache is left out: its modules, and the maps that were learned for it.
    """
    found: dict[int, int] = {}
    done: set[int] = set()
    todo = [thing]
    while todo:
        one = todo.pop()
        if id(one) in done or isinstance(
            one, type | torch.nn.Module | str | bytes | LowRankFormat | RankedLayout | Bases | BitPlanes
        ):
            continue
        done.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
            continue
        todo += _inside(one)
    return found


def _inside(one: object) -> list[object]:
    if isinstance(one, Mapping):
        return [*one.keys(), *one.values()]
    if isinstance(one, Sequence | set | frozenset):
        return list(one)
    slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ()) if name != "__weakref__"]
    own = [getattr(one, name) for name in slots if hasattr(one, name)]
    return [*own, *vars(one).values()] if hasattr(one, "__dict__") else own


def llama():
    """The shared tiny Llama."""
    return model_of("llama")
