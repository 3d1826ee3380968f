"""Generation through transformers' public `generate`, one token at a time, and what a chat asks of its settings.

`stream` runs `generate` in a worker thread and hands its tokens over as they come; closing the iterator stops the
worker before its next token. Nothing is left on the model: two threads may stream from one model. It knows no
messages and no folding.
"""

import copy
import json
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from kvfold.errors import ModelError
from kvfold.hf.argument import given, given_to_generate

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase
Settings = GenerationConfig

NEW_TOKENS = 256  # of a reply, where the settings do not say

_END = object()  # the worker's last word


def stock_cache(model: Model) -> Cache:
    """Make transformers' dynamic cache, which never folds: the reference beside every plan."""
    return DynamicCache(config=model.config)


def static_cache(model: Model, tokens: int) -> Cache:
    """Make transformers' static cache, of so many tokens for good: the reference beside captured steps."""
    return StaticCache(config=model.config, max_cache_len=tokens)


_BOUNDS: Mapping[str, tuple[Any, float]] = {  # kinds of number, and the least one
    "max_new_tokens": (int, 1),
    "num_beams": (int, 1),
    "num_return_sequences": (int, 1),
    "top_k": (int, 0),
    "top_p": ((int, float), 0),
    "temperature": ((int, float), 0),
    "repetition_penalty": ((int, float), 0),
}


def _named(settings: Mapping[str, Any]) -> Settings:
    """Make a generation configuration of settings by their names."""
    known = GenerationConfig().to_dict()
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ModelError(
            f"generation was given {unknown[0]!r}; transformers' GenerationConfig has no such setting; give "
            "max_new_tokens, do_sample, temperature or another of its names"
        )
    for name, (kinds, least) in _BOUNDS.items():
        value = settings.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or value < least):
            whole = "a whole number" if kinds is int else "a number"
            raise ModelError(f"generation was given {name}={value!r}; it is {whole} of at least {least}; give one")
    return GenerationConfig.from_dict(dict(settings))


def settings_for(model: Model, given: Settings | Mapping[str, Any] | None, *, stop: Iterable[int]) -> Settings:
    """Complete the settings of a chat's replies (the model's where none are given): a limit, and tokens that end one.

    Raises ModelError for several replies at once (a chat streams one), and for a setting that transformers lacks.
    """
    if isinstance(given, Mapping):
        given = _named(given)
    settings = GenerationConfig.from_dict((given or model.generation_config).to_dict())
    counts = ("num_beams", "num_return_sequences")
    several = [name for name in counts if (getattr(settings, name) or 1) > 1]
    if several:
        raise ModelError(
            f"{several[0]}={getattr(settings, several[0])} was asked for in a chat; it streams one reply as it comes; "
            f"give {several[0]}=1"
        )
    settings.max_new_tokens = settings.max_new_tokens or NEW_TOKENS
    settings.max_length = None
    settings.use_cache = True
    settings.return_dict_in_generate = False
    ends = {*_listed(settings.eos_token_id), *_listed(model.generation_config.eos_token_id), *stop}
    settings.eos_token_id = sorted(ends) or None
    if settings.pad_token_id is None:
        settings.pad_token_id = min(ends, default=0)  # never seen: a chat has one row
    return settings


def reply_settings(*, max_new_tokens: int, temperature: float, seed: int) -> Settings:
    """Make settings from what a command line knows: the likeliest tokens at temperature 0, else sampled ones."""
    if temperature == 0:
        return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False)
    torch.manual_seed(seed)
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature)


def plain_settings(settings: Settings) -> dict[str, Any]:
    """Write settings in JSON's types."""
    return json.loads(settings.to_json_string())


def settings_from(plain: dict[str, Any]) -> Settings:
    """Read settings that `plain_settings` wrote."""
    return GenerationConfig.from_dict(plain)


def stream(
    model: Model,
    tokenizer: Tokenizer,
    cache: Cache,
    ids: Sequence[int],
    *,
    settings: Settings,
    ends: Callable[[list[int]], bool],
) -> Generator[int, None, None]:
    """Generate tokens after `ids`, of which the cache already holds the first.

    It stops by the settings, or when `ends` is true of the new tokens. Closing the iterator stops the worker and
    waits for it. An error of the worker is raised here.
    """
    worker = _Worker(len(ids), ends)
    prompt = torch.tensor([list(ids)], device=model.device)
    given = (model, tokenizer, cache, prompt, settings)
    thread = threading.Thread(target=worker.run, args=given, name="kvfold-reply", daemon=True)
    thread.start()
    try:
        yield from worker.tokens()
    finally:
        worker.cancel()
        _wait_for(thread)


def feed(model: Model, cache: Cache, ids: Sequence[int]) -> Float[Tensor, " vocabulary"] | None:
    """Feed tokens to the cache; return the logits of the token after them, None where none were given."""
    if not ids:
        return None
    with torch.no_grad():
        columns = torch.tensor([list(ids)], device=model.device)
        answer: Any = model(input_ids=columns, use_cache=True, logits_to_keep=1, **given(model, cache))
    return answer.logits[0, -1]


def is_finite(model: Model, cache: Cache, token: int, mask: Int[Tensor, "B columns"]) -> bool:
    """Feed one token to each row of a cache, under a mask of all columns; tell whether numbers are answered."""
    with torch.no_grad():
        column = torch.full((len(mask), 1), token, device=model.device)
        here = mask.to(model.device)
        logits = model(input_ids=column, attention_mask=here, use_cache=True, **given(model, cache)).logits
    return bool(logits.isfinite().any(dim=-1).all())


class _Worker(BaseStreamer):
    """One `generate` call in a second thread, and the queue through which its tokens come. It changes as they do."""

    def __init__(self, prompt_tokens: int, ends: Callable[[list[int]], bool]) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._prompt_tokens = prompt_tokens
        self._ends = ends
        self._prompt_came = False

    def run(self, model: Model, tokenizer: Tokenizer, cache: Cache, prompt: Tensor, settings: Settings) -> None:
        """Generate until the end, an error or `cancel`; called in the second thread."""
        try:
            settings, strings = _without_strings(settings)
            criteria = StoppingCriteriaList([_Until(self._over)])
            if strings:
                criteria.append(StopStringCriteria(tokenizer, strings))
            generate: Any = model.generate
            generate(
                prompt,
                generation_config=settings,
                streamer=self,
                stopping_criteria=criteria,
                **given_to_generate(cache),
            )
        except BaseException as error:  # of any kind: who reads the stream must get it
            self._queue.put(error)
        self._queue.put(_END)

    def tokens(self) -> Iterator[int]:
        """Yield tokens as they come, until the worker is done; raise its error."""
        while (item := self._queue.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield from item

    def cancel(self) -> None:
        """Stop the worker before its next token."""
        self._stop.set()

    def put(self, value: Tensor) -> None:
        """Take tokens from `generate`: first the prompt, then each new one."""
        if self._prompt_came:
            self._queue.put(value.flatten().tolist())
        self._prompt_came = True

    def end(self) -> None:
        """Do nothing when `generate` is done: `run` ends the stream itself, after errors too."""

    def _over(self, ids: Tensor) -> bool:
        return self._stop.is_set() or self._ends(ids[0, self._prompt_tokens :].tolist())


class _Until(StoppingCriteria):
    """A criterion that stops all rows when a function of the ids is true."""

    def __init__(self, over: Callable[[Tensor], bool]) -> None:
        self._over = over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids.shape[0]
        return torch.full((rows,), self._over(input_ids), dtype=torch.bool, device=input_ids.device)


def _without_strings(settings: Settings) -> tuple[Settings, list[str]]:
    """Take the stop strings out of settings: `generate` would hand their tokenizer on to every layer."""
    strings = settings.stop_strings
    if not strings:
        return settings, []
    rest = copy.deepcopy(settings)
    rest.stop_strings = None
    return rest, [strings] if isinstance(strings, str) else list(strings)


def _listed(token: int | list[int] | None) -> list[int]:
    """List the ids of a setting that may be one id, several or none."""
    if token is None:
        return []
    return [token] if isinstance(token, int) else list(token)


def _wait_for(thread: threading.Thread) -> None:
    """Join a thread, even through Ctrl-C: the cache may not be touched while the worker still writes to it."""
    interrupted = False
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
