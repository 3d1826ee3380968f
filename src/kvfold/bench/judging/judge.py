"""A judge and its judgements so far: each prompt is put to it once, whatever run or plan it came from.

Judgements are kept by their prompts, so a run that was stopped, or whose judge gave up, goes on with what is
missing; the judge's name is part of the key, its address is not. Several prompts are under way at a time.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from kvfold.bench.judging.endpoint import Endpoint, Message
from kvfold.bench.judging.notebook import Notebook, key_of
from kvfold.bench.judging.rubric import rating


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A grade, and the judge's words about it."""

    score: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Where it answers, where its judgements are kept, and how many prompts are under way at a time."""

    endpoint: Endpoint
    notebook: Notebook | None
    at_a_time: int = 4

    def scores(self, prompts: Sequence[Sequence[Message]]) -> list[float]:
        """Grade each prompt, in order. Raises SuiteError when the judge gives up; what is done is kept."""
        pool = ThreadPoolExecutor(self.at_a_time, thread_name_prefix="kvfold-judge")
        try:
            jobs = [pool.submit(self._score, prompt) for prompt in prompts]
            wait(jobs, return_when=FIRST_EXCEPTION)
            for job in _failed(jobs):
                job.result()  # raises
            return [job.result() for job in jobs]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _score(self, prompt: Sequence[Message]) -> float:
        key = key_of(self.endpoint.model, [dict(message) for message in prompt])
        known = None if self.notebook is None else self.notebook.find(key)
        if known is not None:
            return float(known["score"])
        judgement = self.endpoint.ask(prompt, _read)
        if self.notebook is not None:
            self.notebook.write(key, {"judge": self.endpoint.model, "score": judgement.score, "text": judgement.text})
        return judgement.score


def _read(text: str) -> Judgement | None:
    score = rating(text)
    return None if score is None else Judgement(score=score, text=text)


def _failed(jobs: Sequence[Future[float]]) -> list[Future[float]]:
    return [job for job in jobs if job.done() and not job.cancelled() and job.exception() is not None]
