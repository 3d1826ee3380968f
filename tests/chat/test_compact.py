"""A chat with compact positions goes on where the model's positions end, and holds what a chat promises."""

import pytest
from transformers import GenerationConfig

from kvfold.budget.ledger import Ledger
from kvfold.chat.chat import Chat
from kvfold.chat.reread import reread
from kvfold.errors import CacheError, ModelError
from kvfold.memory.rules import Positions

PLAN = "snapkv(tokens=60)"
SHORT = GenerationConfig(max_new_tokens=24)
SAID = ["Where does Anna live?", "And the cat?", "The lamp costs 30.", "How are you today?"]


@pytest.fixture
def begin(model, tokenizer):
    def begun(plan=PLAN, **settings):
        given = {"generation": SHORT, "system": "You answer briefly.", "least": 0, "positions": "compact", **settings}
        return Chat(given.pop("model", model), tokenizer, plan, **given)

    return begun


def talk(chat, turns):
    """The replies to so many messages."""
    return [chat.reply(SAID[turn % len(SAID)]) for turn in range(turns)]


def longest(begin, plan, tokens):
    """A chat of at least so many tokens, and what its ledger said after each turn."""
    chat = begin(plan)
    ledgers: list[Ledger] = []
    while len(chat.ids) < tokens:
        chat.reply(SAID[len(chat.turns) % len(SAID)])
        ledgers.append(chat.ledger())
    return chat, ledgers


@pytest.mark.parametrize(("plan", "tokens"), [(PLAN, 3000), ("h2o(tokens=60, normalise=False)", 900)])
def test_a_chat_of_3000_tokens_on_512_positions_goes_on_in_flat_memory(begin, plan, tokens):
    chat, ledgers = longest(begin, plan, tokens)
    half = ledgers[len(ledgers) // 2 :]
    assert chat.model.config.max_position_embeddings == 512
    assert chat.cache.next_position <= 60
    assert len({ledger.stored_bytes for ledger in half}) == 1, "what is held does not grow"


def test_with_kept_positions_it_ends_and_the_line_says_what_to_do(begin):
    chat = begin(positions="kept")
    with pytest.raises(
        ModelError, match='folding saves memory, not positions, unless positions="compact" is asked for'
    ):
        talk(chat, 40)
    assert len(chat.ids) < 512


def test_a_plan_that_drops_nothing_ends_too(begin):
    with pytest.raises(ModelError, match="give it a budget in tokens"):
        talk(begin("full"), 40)


def test_in_one_go_and_in_pieces_it_says_the_same(begin, tmp_path, model, tokenizer):
    whole = begin()
    wanted = talk(whole, 12)
    pieces, said = begin(), []
    for turn, text in enumerate((SAID * 3)[:12]):
        if turn % 4 == 1:
            pieces.save(tmp_path / "talk.kvfold")
            pieces = Chat.load(tmp_path / "talk.kvfold", model, tokenizer, positions="compact")
        if turn % 4 == 2:
            pieces = pieces.fork()
        stopped = pieces.send("Never mind.")
        next(stopped)
        stopped.close()  # undone
        said.append(pieces.reply(text))
    assert said == wanted
    assert pieces.ids == whole.ids
    assert pieces.ledger() == whole.ledger()


def test_raw_turns_and_strides_hold_too(begin):
    for settings in ({"raw_turns": 2}, {"stride": 16}):
        chat = begin(**settings)
        twin = begin(**settings)
        assert talk(chat, 10) == talk(twin, 10)
        raw = chat.turns[-2].start if "raw_turns" in settings else len(chat.ids)
        assert chat.cache.next_position == 60 + len(chat.ids) - raw


def test_other_positions_than_the_saved_ones_are_refused(begin, tmp_path, model, tokenizer):
    ways: list[tuple[Positions, Positions]] = [("compact", "kept"), ("kept", "compact")]
    for positions, others in ways:
        chat = begin(positions=positions)
        talk(chat, 1)
        chat.save(tmp_path / "talk.kvfold")
        with pytest.raises(CacheError, match=f"it was saved with positions='{positions}'"):
            Chat.load(tmp_path / "talk.kvfold", model, tokenizer, positions=others)
        assert Chat.load(tmp_path / "talk.kvfold", model, tokenizer).cache.positions == positions


def test_read_anew_a_chat_beyond_the_last_position_stays_compact(begin):
    chat, _ = longest(begin, PLAN, 600)
    twin = reread(chat, plan="snapkv(tokens=50)")
    assert (twin.cache.positions, twin.ids) == ("compact", chat.ids)
    assert twin.ledger().slots < chat.ledger().slots
    twin.reply(SAID[0])
