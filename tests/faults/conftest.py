"""What the campaign stands on: the shipped model, and short chats with it."""

import pytest
from transformers import GenerationConfig

import kvfold
from kvfold.chat.chat import Chat

SHORT = GenerationConfig(max_new_tokens=6, do_sample=False)
TALK = ("Where does Anna live?", "And the cat?", "The lamp costs 30.", "How are you today?")


def say(chat, *texts):
    return ["".join(chat.send(text)) for text in texts]


@pytest.fixture(scope="session")
def tiny():
    return kvfold.load("tiny")


@pytest.fixture
def begin(tiny):
    """A fresh chat by a plan."""
    return lambda plan, **settings: Chat(*tiny, plan, generation=SHORT, **settings)
