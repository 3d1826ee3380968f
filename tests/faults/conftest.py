"""What the campaign stands on: the shipped model, and short chats with it."""

import pytest
from damage import SHORT

import kvfold
from kvfold.chat.chat import Chat


@pytest.fixture(scope="session")
def tiny():
    return kvfold.load("tiny")


@pytest.fixture
def begin(tiny):
    """A fresh chat by a plan."""
    model, tokenizer = tiny
    return lambda plan, **settings: Chat(model, tokenizer, plan, generation=SHORT, **settings)
