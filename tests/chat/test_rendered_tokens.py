"""All who read dialogues read the same tokens: those of the text that the chat template writes.

The digests were noted from the version in which scripts, transcripts, prompts and training texts each had a renderer.
"""

import copy
import hashlib
import json
from itertools import pairwise

import pytest
from transformers import AutoTokenizer

from kvfold.bench.ask.prompts import expected, prompt
from kvfold.bench.ask.script import script
from kvfold.bench.ask.transcript import transcript
from kvfold.chat.template import Template
from kvfold.data import Message
from kvfold.hf.load import SHIPPED
from kvfold.train.dynakv.texts import encode_dialogue

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DIALOGUES = [
    [("user", "Where does Anna live?"), ("assistant", "Anna lives in Turin.")],
    [("system", "You answer briefly."), ("user", " spaces  around "), ("assistant", "Noted.\n"), ("user", "12 + 7?"),
     ("assistant", "19")],
    [("user", "naïve café — 東京 🙂"), ("assistant", "line\nbreak"), ("user", "<|end|> a tag"), ("assistant", " ok ")],
]  # fmt: skip
QUESTION = "And the cat?"
DOCUMENT = "The sea is blue.\n東京 is far. And the cat? The sky is grey. And the cat?"
NOTED = {"tiny": "53b6567a9102eb8a", "chatml": "a6b67e5a5070abec", "bare": "1ec2b8b559461e54"}


def tokenizer_of(name):
    tokenizer = copy.deepcopy(AutoTokenizer.from_pretrained(str(SHIPPED / "tiny")))
    if name == "chatml":
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if name == "bare":
        tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(params=NOTED)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name):
    return tokenizer_of(name)


def dialogues():
    return [[Message(role=role, content=content) for role, content in said] for said in DIALOGUES]


def whole(tokenizer, messages, *, asks):
    """The tokens of the whole text, without any of our code."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=asks)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fed(tokenizer, messages):
    """What a chat feeds for a finished dialogue, piece by piece: openings, replies and closings."""
    system = messages[0].content if messages[0].role == "system" else None
    template = Template(tokenizer, system=system)
    pieces = [[template.pinned()], list(template.closing().ids), list(template.closing().stop)]
    for place, (said, _) in enumerate(pairwise(messages)):
        if said.role == "user":
            pieces.append(template.opening(messages[:place], said.content))
    return pieces


def everything(tokenizer):
    """All token ids that anyone makes of the dialogues and of the document."""
    found = []
    for messages in dialogues():
        if tokenizer.chat_template:
            cut = script(tokenizer, [*messages, Message(role="user", content=QUESTION)])
            found.append([list(map(list, cut.turns)), list(cut.question)])
        for form in ("template", "plain"):
            read = transcript(tokenizer, messages, form=form)
            places = [[turn.start, turn.stop] for turn in (*read.turns, *read.replies)]
            stretches = [list(read.stretch(place, 1, 4)) for place in range(len(messages))]
            found.append([list(read.tokens), places, stretches])
        found.append(fed(tokenizer, messages))
    for begun in ("", "It is"):
        for seen in (True, False):
            made = prompt(tokenizer, DOCUMENT, question=QUESTION, seen=seen, reply_tokens=1, begun=begun)
            found.append([list(made.context), list(made.question)])
        found.append(list(expected(tokenizer, "a grey goose", begun=begun)))
    return [*found, *(encode_dialogue(tokenizer, messages) for messages in dialogues())]


def test_scripts_transcripts_and_prompts_are_cut_from_the_tokens_of_the_whole_text():
    for name in ("tiny", "chatml"):
        tokenizer = tokenizer_of(name)
        for messages in dialogues():
            asked = [*messages, Message(role="user", content=QUESTION)]
            cut = script(tokenizer, asked)
            assert [*sum(cut.turns, ()), *cut.question] == whole(tokenizer, asked, asks=True)
            assert list(transcript(tokenizer, messages).tokens) == whole(tokenizer, messages, asks=False)
        made = prompt(tokenizer, DOCUMENT, question=QUESTION, seen=False, reply_tokens=1)
        said = [Message(role="user", content=DOCUMENT)]
        assert [*made.context, *made.question] == whole(tokenizer, said, asks=True)


def test_a_script_and_a_transcript_of_one_dialogue_have_the_same_turns():
    for name in ("tiny", "chatml"):
        tokenizer = tokenizer_of(name)
        for messages in dialogues():
            read = transcript(tokenizer, messages)
            cut = script(tokenizer, [*messages, Message(role="user", content=QUESTION)])
            assert [len(turn) for turn in cut.turns] == [len(turn) for turn in read.turns]
            assert sum(cut.turns, ()) == read.tokens


def test_the_tokens_are_those_that_were_always_read(name, tokenizer):
    assert hashlib.sha256(json.dumps(everything(tokenizer)).encode()).hexdigest()[:16] == NOTED[name]
