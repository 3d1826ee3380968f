"""What a turn goes on from where memory is short, and where requests hold more than one new message."""

import openai
import pytest
import torch

import kvfold
from kvfold.chat import file
from kvfold.chat.reread import reread
from kvfold.data import Message
from kvfold.errors import ModelError
from kvfold.hf.storages import storages_of
from kvfold.serve.sampling import Sampling
from kvfold.serve.served import ServedModel
from kvfold.serve.ticket import Asked, Ticket
from serve.conftest import assistant, sayer, user

NOTE = "Anna lives in Turin and has a cat. "
FEW_SHOT = [
    {"role": "system", "content": "You answer briefly."},
    user("Two words"),
    {"role": "assistant", "content": "Yes."},
    user("Where does Anna live?"),
]


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def held_bytes(shelf):
    """The bytes of all distinct storages of the conversations in memory."""
    held = {}
    for entry in shelf._entries.values():
        held |= {} if entry.held is None else storages_of(entry.held.cache)
    return sum(held.values())


@pytest.fixture(scope="module")
def token_bytes(serving):
    with serving() as one:
        return one.made.scheduler._served.token_bytes


@pytest.fixture
def stored(serving, tmp_path):
    """A chat in a store whose turns hold several messages each, and what its newest answer says."""
    with serving(store=tmp_path) as one:
        say = sayer(one)
        first = say(FEW_SHOT)
        edited = [*FEW_SHOT, assistant(first), user("And Ben?"), {"role": "assistant", "content": "Rome."}, user("So?")]
        second = say(edited)
        assert cached(second) == first.kvfold["tokens_seen"]
    return [*edited, assistant(second)], second


def test_turns_of_several_messages_are_there_after_a_restart(serving, tmp_path, stored):
    messages, answer = stored
    for text in ("And Clara?", "And David?"):
        with serving(store=tmp_path) as other:
            messages = [*messages, user(text)]
            again = sayer(other)(messages)
            assert cached(again) == answer.kvfold["tokens_seen"]
        messages, answer = [*messages, assistant(again)], again
    assert not list(tmp_path.rglob("*.damaged"))


def test_a_stored_chat_of_several_messages_a_turn_is_loaded_and_read_anew(tmp_path, stored, tiny):
    messages, answer = stored
    (path,) = tmp_path.rglob("*.kvfold")
    chat = kvfold.Chat.load(path, *tiny)
    assert chat.messages == messages
    assert [turn.messages for turn in chat.turns] == [5, 4]
    twin = reread(chat, plan="full")
    assert (twin.messages, twin.ids, twin.turns) == (messages, chat.ids, chat.turns)
    assert len(chat.ids) == answer.kvfold["tokens_seen"]
    assert chat.reply("Where does Anna live?")


@pytest.mark.parametrize("shared", [False, True])
def test_a_turn_that_leaves_no_room_beside_its_past_reads_the_text_anew(serving, tmp_path, token_bytes, shared):
    """Making room for a turn never takes away what it goes on from, and bytes stay those that are held."""
    limit = 300 * token_bytes
    shelf = {"store": tmp_path if shared else None, "is_shared": shared}
    with serving(plan="full", memory_bytes=limit, **shelf) as one:
        say = sayer(one)
        talk = [user(NOTE)]
        talk += [assistant(say(talk)), user("Where does Anna live?")]
        first = say(talk)
        found = []
        for longest in (100, 190, 200, 210, 220, 230):
            found.append(cached(say(talk, max_tokens=longest)))
            one.rest()
            holdings = one.shelf.holdings
            assert holdings.held_bytes == held_bytes(one.shelf) <= limit
            assert holdings.promised_bytes == 0
        assert cached(first) == found[0] > 0
        assert found[-1] == 0


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_held_and_promised_stays_within_the_limit(serving, tmp_path, token_bytes, shared):
    limit = 300 * token_bytes
    shelf = {"store": tmp_path if shared else None, "is_shared": shared}
    with serving(plan="full", memory_bytes=limit, **shelf) as one:
        talk = [user(NOTE * 14)]
        talk += [assistant(sayer(one)(talk, max_tokens=4)), user("Where does Anna live?")]
        one.rest()
        one.made.scheduler.stop()
        messages = tuple(Message(role=said["role"], content=said["content"]) for said in talk)
        asked = Asked(owner="anyone", messages=messages, longest=20, sampling=Sampling(temperature=0.0))
        turn = one.made.scheduler._opener.open(Ticket(asked, print))
        assert turn is not None
        holdings = one.shelf.holdings
        assert holdings.held_bytes + holdings.promised_bytes <= limit
        assert holdings.held_bytes == held_bytes(one.shelf)


def test_a_chat_on_disk_that_takes_more_than_half_of_the_memory_goes_on(serving, token_bytes):
    with serving(plan="full", memory_bytes=300 * token_bytes, reply_tokens=8) as one:
        say = sayer(one)
        talk = [user(NOTE * 14)]
        talk += [assistant(say(talk)), user("And Ben?")]
        say([user("Ben lives in Rome and has a dog. " * 8)])
        assert one.shelf.counts == (1, 1)
        assert cached(say(talk)) == 0
        with pytest.raises(openai.BadRequestError) as caught:
            say([user(NOTE * 40)])
        assert caught.value.code == "memory_exceeded"


@pytest.mark.parametrize("shared", [False, True])
def test_chats_of_another_dtype_stay_in_the_store(serving, tmp_path, capsys, shared):
    talk = [user("Where does Anna live?")]
    with serving(store=tmp_path) as one:
        first = sayer(one)(talk)
    (theirs,) = tmp_path.rglob("*.kvfold")
    raw = theirs.read_bytes()
    again = [*talk, assistant(first), user("And Ben?")]
    other = "bfloat16" if file.read_header(theirs)["dtype"] == "float32" else "float32"
    with serving(model=kvfold.load("tiny", dtype=other), store=tmp_path, is_shared=shared) as second:
        assert cached(sayer(second)(again)) == 0
    assert theirs.read_bytes() == raw
    assert "passed over" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.damaged"))
    with serving(store=tmp_path) as one:
        assert cached(sayer(one)(again)) == first.kvfold["tokens_seen"]


def test_the_file_of_a_chat_that_is_said_again_goes_with_it(serving, tmp_path):
    talk = [user(NOTE)]
    with serving(store=tmp_path) as one:
        for name in ("one", "two"):  # the name of a session is part of a file's name
            sayer(one)(talk, metadata={"session": name})
        one.rest()
        assert len(list(tmp_path.rglob("*.kvfold"))) == 1


def test_a_model_with_recurrent_layers_is_refused_when_the_server_begins(tiny):
    import transformers

    _, tokenizer = tiny
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).eval()
    with pytest.raises(ModelError, match=r"recurrent layers.*`kvfold chat`"):
        ServedModel(model, tokenizer, "full", name="lfm2", least=0)
