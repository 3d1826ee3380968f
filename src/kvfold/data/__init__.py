"""Generated dialogues and documents, and readers of real text: what training learns from and benchmarks ask.

Reading order: words, dialogue, chitchat, the four families (recall, coreference, arithmetic, rules), families, drills,
needles, real, tokenizer. No torch here; every sample is a pure function of its settings and its seed.
"""

from kvfold.data.dialogue import Dialogue, Message
from kvfold.data.families import CHAT_VERSION, FAMILIES, best_shortcut, dialogue, training_dialogue
from kvfold.data.needles import NEEDLES, Document, needle

__all__ = [
    "CHAT_VERSION",
    "FAMILIES",
    "NEEDLES",
    "Dialogue",
    "Document",
    "Message",
    "best_shortcut",
    "dialogue",
    "needle",
    "training_dialogue",
]
