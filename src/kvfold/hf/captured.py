"""CapturedStep: one decode step of a model over a folded cache, captured as a graph and replayed for every token.

Between two folds only the length of the tail changes, so a step is the same operations on the same memory
(static_past.py), and a graph launches them all at once. What a step leaves on the host is noted after each replay: the
cache is then as if it had been fed by an ordinary forward. It folds nothing by itself; a forward's boundaries do.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfold.errors import CacheError, in_one_line
from kvfold.hf.argument import given
from kvfold.hf.attention import PREFIX, refuse_position
from kvfold.hf.cache import FoldedCache
from kvfold.hf.graphs import Capture, CudaGraph, Graph
from kvfold.hf.handle import FoldingLayer
from kvfold.hf.static_past import StaticPast
from kvfold.integers import integer

ROOM = 256  # tokens for which a capture makes room: after as many, or after a fold, the step is captured anew
_SAID = 200  # characters of somebody else's error
_AS_USUAL = "call the model as usual"


def captured(
    model: PreTrainedModel,
    cache: Cache,
    *,
    room: int = ROOM,
    graph: Capture | None = None,
) -> "CapturedStep":
    """A decode step of one new token for every row of a cache, as a CUDA graph.

    After the prompt each `step` answers what a forward of these tokens would, and leaves the cache as that would:
    folds, forks, files and `generate` go on as usual, before and after. It is captured anew after each fold, and after
    `room` tokens. `graph` captures in another way than CUDA does; tests have one.

    >>> model(prompt, past_key_values=cache)
    >>> decode = captured(model, cache)
    >>> logits = decode.step(ids)  # ids [rows, 1], logits [rows, vocabulary]

    Raises CacheError, here or at a step, for what cannot be captured: another device than CUDA, slots in tiers, padded
    rows, records that want each token at once, positions that are moved, layers that do not fold.
    """
    return CapturedStep(model, cache, room=room, graph=graph)


class CapturedStep:
    """One decode step over one cache. It changes with every token."""

    def __init__(self, model: PreTrainedModel, cache: Any, *, room: int, graph: Capture | None) -> None:
        _refuse(_of_kind(model, cache))
        if graph is None and model.device.type != "cuda":
            _refuse(f"{model.device.type} has no graphs; move the model to CUDA, or {_AS_USUAL}")
        self._model = model
        self._cache: FoldedCache = cache
        self._room = integer("room", room, least=1, error=CacheError)
        self._capture_by = partial(CudaGraph, device=model.device) if graph is None else graph
        self._graph: Graph | None = None
        self._past: StaticPast | None = None
        self.captures = 0  # how often the step was captured so far

    def step(self, ids: Tensor) -> Tensor:
        """Feed one token of each row, ids [B, 1]; give the logits [B, V] of the next one.

        Raises CacheError for what cannot be captured, and ModelError for a position that the model does not have.
        """
        cache = self._cache
        cache.running.undo()
        _refuse(_of_moment(self._model, cache, ids))
        refuse_position(cache, cache.memory.fed)
        with torch.inference_mode(False), torch.no_grad():
            here = ids.to(self._model.device)
            _begin(cache, here)
            try:
                logits = self._replayed(here)
                self._follow()
                cache.running.commit()
            except BaseException:  # interrupts too
                cache.running.undo()
                raise
        return logits

    def _replayed(self, ids: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Run the captured step, captured anew where the cache is not what it was captured over."""
        past, graph = self._past, self._graph
        if past is None or graph is None or not past.serves(self._cache):
            self._past = self._graph = past = graph = None  # memory is freed before more is taken
            self._past = past = StaticPast(self._cache, ids, room=self._room)
            self._graph = graph = self._captured(past)
        past.ids.copy_(ids)
        past.where.fill_(self._cache.memory.fed)
        graph.replay()
        return graph.outputs.clone()  # the next replay writes over them

    def _captured(self, past: StaticPast) -> Graph:
        """Capture a forward over a static past."""
        lease = self._cache.lease
        try:
            graph = self._capture_by(partial(_forward, self._model, past))
        except RuntimeError as error:  # such as a codec that waits for the device
            said = in_one_line(error, _SAID)
            raise CacheError(
                f"a captured step of {self._cache.plan} was asked for; capturing it failed ({said}); {_AS_USUAL}"
            ) from error
        finally:
            lease.given_ids.note(None)  # nobody shall take what hooks have noted meanwhile
            lease.note_token_ids(None)
        self.captures += 1
        return graph

    def _follow(self) -> None:
        """Let every layer note the token, as it does in a forward."""
        past, forward = self._past, self._cache.running.forward
        assert past is not None, "a step was captured"
        records = bool(self._cache.memory.rules.recorders)
        for index, read in past.attended.items():
            new, whole = past.token(index, read, copied=records)
            forward.follow(index, new, whole, scale=read.scale)


def _begin(cache: FoldedCache, ids: Int[Tensor, "B 1"]) -> None:
    """Begin a forward as a model does that is fed these ids: what waits to be folded is folded now."""
    lease, running = cache.lease, cache.running
    lease.given_ids.note(ids)
    lease.note_token_ids(ids)
    cache.begin(len(ids), 1)
    running.reached = running.attended = running.last  # so that it can be undone
    lease.forward_end.note(None)  # a decoder runs while the step is captured; its end is not this forward's


def _forward(model: Any, past: StaticPast) -> Float[Tensor, "B V"]:
    """What is captured: a forward of one token of each row."""
    past.begin()
    answer = model(
        input_ids=past.ids,
        position_ids=past.positions,
        use_cache=True,
        **given(model, past),
    )
    return answer.logits[:, -1]


# What cannot be captured ----------------------------------------------------------------------------------------------


def _refuse(obstacle: str | None) -> None:
    """Raise CacheError for what stands in the way, and what to do about it; None: nothing does."""
    if obstacle is not None:
        raise CacheError(f"a captured step was asked for; {obstacle}")


def _of_kind(model: PreTrainedModel, cache: Cache) -> str | None:
    """Say what of a model and of a plan is in the way, however much was fed."""
    if not isinstance(cache, FoldedCache):
        return f"a {type(cache).__name__} was given; give a cache that kvfold.cache(model, ...) has made"
    binding, rules = cache.lease.binding, cache.memory.rules
    if binding is None or binding.model is not model:
        return f"the cache is one of another model, {cache.lease.name}; give the model that it was made for"
    if any(type(layer) is not FoldingLayer for layer in cache.layers):
        return f"{cache.lease.name} has layers that do not fold, whose size changes with every token; {_AS_USUAL}"
    settings = str(getattr(binding.text_config, "rope_parameters", None))
    if cache.lease.drop_watch is not None or "'dynamic'" in settings or "'longrope'" in settings:
        return f"the rotations of {cache.lease.name} change with the length of the text; {_AS_USUAL}"
    if rules.placement is not None:
        return f"{cache.plan} selects and fetches slots on the host; {_AS_USUAL}, or leave the place member away"
    if cache.lease.records_hidden_states:
        return f"{cache.plan} records hidden states, of each token at once; {_AS_USUAL}"
    if rules.closes_gaps:
        return 'positions="compact" moves the place of the next token; ' + f'{_AS_USUAL}, or give positions="kept"'
    return None


def _of_moment(model: Any, cache: FoldedCache, ids: Tensor) -> str | None:
    """Say what of the cache as it is now, and of the new tokens, is in the way."""
    memory = cache.memory
    attention = model.config.get_text_config(decoder=True)._attn_implementation or ""
    if not attention.startswith(PREFIX):
        return f"the model's attention was set to {attention!r} after the cache was made; make a new cache"
    if cache.running.call is not None:
        return "generate() runs on the cache; wait until it is done"
    if memory.fed == 0:
        return "nothing was fed yet; feed the prompt by the model first"
    rows = len(memory.seen)
    if ids.dim() != 2 or tuple(ids.shape) != (rows, 1):
        return f"ids of shape {list(ids.shape)} were given; the cache holds {rows} rows; give [{rows}, 1]"
    if any(seen != memory.fed for seen in memory.seen) or _is_padded(cache):
        return f"rows are padded, and their next positions differ; {_AS_USUAL}, or give rows of one length"
    return None


def _is_padded(cache: FoldedCache) -> bool:
    """Tell whether any raw column is a pad."""
    tails = [layer.state.tail for layer in cache.memory.layers.values()]
    return any(tail is None or tail.padded for tail in tails)
