"""The class that lm_eval knows as "kvfold": a Hugging Face model whose every answer goes through the folded cache.

Tokens, chat templates, truncation and rolling windows are those of lm_eval's own class for such models; what is
scored or generated is what the plan has kept of the context. With the plan `full` its numbers are that class's. It
answers greedily; a request for samples is refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kvfold.bench.harness.scoring import LikelihoodRequest, Scorer
from kvfold.bench.subject import Subject, open_subject
from kvfold.errors import SuiteError
from kvfold.plan import Plan

ROWS, STRIDE = 16, 64
_STOCK: Any = HFLM  # its decorator hides its type
_GREEDY = {"do_sample", "temperature", "top_p", "top_k"}  # what may be said about sampling when there is none


class FoldedLM(_STOCK):
    """`--model kvfold --model_args pretrained=tiny,plan=snapkv(keep=0.5)`. It changes: `scorer.costs` grows."""

    def __init__(
        self,
        pretrained: Any = "tiny",
        plan: str | None = "full",
        *,
        stride: int = STRIDE,
        batch_size: int | str | None = ROWS,
        max_batch_size: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        **unknown: Any,
    ) -> None:
        """A model by its name, or a Subject that is open already; a plan in which a semicolon may stand for a comma.

        Raises PlanError for a text that is no plan, ModelError for a model that is not there, and SuiteError for an
        argument that this class does not know.
        """
        if unknown:
            raise SuiteError(
                f"model_args {', '.join(unknown)} were given; kvfold's class knows pretrained, plan, stride, "
                "batch_size, dtype, device, max_length and add_bos_token; leave the others out"
            )
        # lm_eval reads `plan=none` as no value, and may cut its arguments at every comma
        text = str(Plan.parse(("none" if plan is None else plan).replace(";", ",")))
        subject = pretrained if isinstance(pretrained, Subject) else _opened(pretrained, dtype=dtype, device=device)
        rows = ROWS if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            batch_size=rows,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
        self.plan = text
        self.scorer = Scorer(subject, text, rows=rows, stride=int(stride))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations, cut from their contexts by lm_eval's class, without its progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in lm_eval's windows; inside a window the plan folds after every stride."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score given text; all of lm_eval's requests about likelihoods end here."""
        wanted = [self._request(context, continuation) for _, context, continuation in requests]
        answers = [(one.log_probability, one.greedy) for one in self.scorer.likelihoods(wanted)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a window of a rolling request has no name
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue greedily up to a stop text, which is left out. Raises SuiteError where samples are asked for."""
        answers: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(i)
        for indices in by_settings.values():
            texts = self._generate([requests[i].args[0] for i in indices], requests[indices[0]].args[1])
            answers |= zip(indices, texts, strict=True)
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> LikelihoodRequest:
        """The request with the newest tokens of the context, as many as fit the model."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise SuiteError(
                f"a continuation of {len(continuation)} tokens was to be scored; the model has {self.max_length} "
                "positions; give a task with shorter answers"
            )
        return LikelihoodRequest(context=tuple(context[-room:]), continuation=tuple(continuation))

    def _generate(self, contexts: Sequence[str], given: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until", None), eos=end)
        tokens = settings.pop("max_gen_toks")
        if settings.get("do_sample") or settings.keys() - _GREEDY:
            odd = ", ".join(
                f"{name}={value!r}" for name, value in settings.items() if name == "do_sample" or name not in _GREEDY
            )
            raise SuiteError(
                f"a task asks for {odd}; kvfold's class answers greedily; set do_sample: false in the task"
            )
        room = self.max_length - tokens
        if room < 1:
            raise SuiteError(
                f"answers of {tokens} tokens were asked for; the model has {self.max_length} positions; "
                "give a smaller max_gen_toks"
            )
        folded = []
        for text in contexts:
            tokens_of_text = self.tok_encode(text, left_truncate_len=room)
            folded.append(tuple(tokens_of_text or [self.prefix_token_id]))  # an empty text is read as its prefix

        def ended(answer: list[int]) -> bool:
            text = self.tok_decode(answer)
            return any(stop and stop in text for stop in until)

        texts = []
        for answer in self.scorer.continuations(folded, tokens=tokens, ended=ended):
            text = self.tok_decode(answer)
            texts.append(postprocess_generated_text(generation=text, stop=until, think_end_token=None))
        return texts


def _opened(name: Any, *, dtype: str, device: str | None) -> Subject:
    if not isinstance(name, str):
        raise SuiteError(f"pretrained={name!r} was given; a model is named, or opened before; give its name")
    # lm_eval's command says cuda:0 when its user said nothing, whether there is one or not.
    absent = device is None or (device == "cuda:0" and not torch.cuda.is_available())
    return open_subject(
        name, dtype="float32" if dtype == "auto" else dtype, device="cpu" if device is None or absent else device
    )


register_model("kvfold")(FoldedLM)
