import pytest

from kvfold.bench.ask.script import script
from kvfold.data import FAMILIES, Message, dialogue
from kvfold.errors import ModelError, SuiteError
from kvfold.hf.load import SHIPPED


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(SHIPPED / "tiny"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_together_are_the_tokens_of_the_whole(tokenizer, family):
    messages = dialogue(family, split="heldout", turns=16, seed=3).messages
    cut = script(tokenizer, messages)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert [*sum(cut.turns, ()), *cut.question] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_turn_is_a_message_and_its_reply_with_the_closing_token(tokenizer):
    messages = dialogue("recall", split="heldout", turns=16, seed=3).messages
    cut = script(tokenizer, messages)
    assert len(cut.turns) == 15
    for i, turn in enumerate(cut.turns):
        said = tokenizer.decode(turn)
        assert said.endswith("<|end|>")
        assert messages[2 * i + 1].content in said
        assert said.count("<|end|>") == 2
    assert tokenizer.decode(cut.question).endswith("<|assistant|>")


def test_a_template_that_changes_old_turns_is_refused(tokenizer):
    from copy import deepcopy

    forgetful = deepcopy(tokenizer)
    forgetful.chat_template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    talk = [Message(role=role, content=role) for role in ("user", "assistant", "user")]
    with pytest.raises(SuiteError, match="changes old turns"):
        script(forgetful, talk)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        script(bare, [Message(role="user", content="hello")])
