"""Self-study: the model asks itself about a passage, and its answer with the passage in sight is what to keep.

A passage is one user message; then a few prompts that fit any text, each answered by the model itself, sampled. Nobody
has to have written questions, so it works for any text. Eyuboglu et al., Cartridges, https://arxiv.org/abs/2506.06266
Ours differs: the prompts are a short fixed list, and passages are folded, not trained into a cache.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from kvfold.chat.template import render
from kvfold.data import Message
from kvfold.train.sonic.document_talks import document_talk
from kvfold.train.sonic.talk_batch import Talk

PROMPTS = (
    "Say it again, word for word.",
    "What was said about it?",
    "Who is it about, and what happens?",
    "Name the most important things in it.",
    "What are the names and numbers in it?",
    "How does it end?",
    "What should be remembered of it?",
)


class Study:
    """Draws talks of a model with itself; the random state is the caller's."""

    def __init__(self, model: Any, tokenizer: Any, *, reply_tokens: int = 40) -> None:
        self.model, self.tokenizer, self.reply_tokens = model, tokenizer, reply_tokens

    def draw(self, rng: random.Random, passage: str, *, questions: int, weight: float) -> Talk:
        """Draw a passage that is folded as a whole, then questions that the model has answered.

        Each token of a reply counts `weight`.
        """
        messages: list[Message] = []
        for question in rng.sample(PROMPTS, min(questions, len(PROMPTS))):
            content = question if messages else f"{passage} {question}"
            messages.append(Message(role="user", content=content))
            messages.append(Message(role="assistant", content=self._reply(rng, messages)))
        return document_talk(self.tokenizer, passage, messages, weight=weight)

    def _reply(self, rng: random.Random, messages: Sequence[Message]) -> str:
        """The model's reply, sampled; never empty."""
        prompt = render(self.tokenizer, list(messages), opens_reply=True)
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        ids = encoded["input_ids"].to(self.model.device)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(rng.getrandbits(48))
            tokens = self.model.generate(ids, max_new_tokens=self.reply_tokens, do_sample=True)
        reply = self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        return reply.strip() or "Nothing."
