"""Files of the first format stay loadable: chats, adapters and records of version 0.1.0 mean what they meant then.

The files lie in `tests/fixtures/saved` and are never written anew: a format that changes gets a new file beside them.
What a chat was asked third, what it replied and how many bytes it held were noted from the version that wrote it.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kvfold
from formula import formula_model
from kvfold.bench.run.record import from_line
from kvfold.chat.chat import Chat
from kvfold.plan import Plan

SAVED = Path(__file__).parents[1] / "fixtures" / "saved"
RECORDS = sorted((Path(__file__).parents[2] / "docs" / "records").glob("*/records.jsonl"))
THIRD = "Remember the city of Anna: what is the hobby there?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What the version that wrote a chat said about it."""

    plan: str
    reply: str  # to the third message
    slots: int  # after loading
    loaded_bytes: int  # stored, after loading
    replied_bytes: int  # stored, after the third turn
    raw_turns: int = 0
    named: str | None = None  # the plan with the defaults of then, where those of now are others


# The likeliest token of every step is ahead of the second by 0.4 or more, so rounding does not decide a reply.
CHATS = {
    "h2o": Noted(
        plan="h2o(keep=0.5)", reply="Anna's city is Tna, Tna's hobby is swna.",
        slots=1110, loaded_bytes=150_360, replied_bytes=183_000,
    ),
    "h2o_raw": Noted(
        plan="h2o(keep=0.5)", reply="Anna's city is Tna, Tna's hobby is falconry.", raw_turns=1,
        slots=1620, loaded_bytes=217_160, replied_bytes=220_360,
    ),
    "snapkv_int4": Noted(
        plan="snapkv(keep=0.5) + int4", reply="Anna's city is Anna, Anna's hobby is falc.",
        slots=1155, loaded_bytes=64_020, replied_bytes=74_580,
    ),
    "snapkv_raw": Noted(
        plan="snapkv(keep=0.5) + int4", reply="Anna's city is Anna, Anna's hobby is falconry.", raw_turns=1,
        slots=1650, loaded_bytes=233_640, replied_bytes=197_840,
    ),
    "sonic": Noted(
        plan="sonic(keep=0.2)", reply="Anna's city is Turin, Turin's hobby is swimming.",
        slots=375, loaded_bytes=49_500, replied_bytes=57_420,
    ),
    "kvzip": Noted(
        plan="kvzip(keep=0.5)", reply="Anna's city is Turin, Turin's hobby is swimming.",
        slots=1155, loaded_bytes=152_460, replied_bytes=186_120,
    ),
    "dynakv_sentkv": Noted(
        plan="dynakv(rate=0.47) + sentkv(budget=0.1)", reply="Anna's city is Shaefly, Shaefly's hobby is fifty.",
        # Noted were 250,444 and 359,342: a byte for each token in every layer, where one transcript serves all now.
        slots=2355, loaded_bytes=250_444 - 5 * 157 + 158, replied_bytes=359_342 - 5 * 193 + 195,
        named="dynakv(rate=0.47) + sentkv(budget=0.1, length=16, window=8, "
        "summary='minmax', when='sentence', every=16, queries=8)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return kvfold.load("tiny")


@pytest.fixture(scope="module")
def formula_llama():
    return formula_model()


def test_every_saved_chat_is_tested():
    assert {path.stem for path in SAVED.glob("*.kvfold")} == set(CHATS)


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_of_the_first_format_holds_what_it_held_and_replies_as_it_did(tiny, name):
    noted = CHATS[name]
    chat = Chat.load(SAVED / f"{name}.kvfold", *tiny, plan=noted.named)
    assert chat.plan == Plan.parse(noted.named or noted.plan)
    assert chat.raw_turns == noted.raw_turns
    assert len(chat.turns) == 2
    assert chat.ledger().slots == noted.slots
    assert chat.ledger().stored_bytes == noted.loaded_bytes
    assert "".join(chat.send(THIRD)) == noted.reply
    ledger = chat.ledger()
    room = sum(line.slack_bytes for line in ledger.parts if line.device == "cpu")  # for turns to come: later versions
    assert ledger.stored_bytes - room == noted.replied_bytes


def test_an_index_of_the_first_format_is_made_anew_by_the_defaults_of_now(tiny):
    name = "dynakv_sentkv"
    chat = Chat.load(SAVED / f"{name}.kvfold", *tiny)
    assert chat.ledger().slots == CHATS[name].slots
    assert chat.reply(THIRD)


@pytest.mark.parametrize("name", ["h2o_raw", "snapkv_raw", "dynakv_sentkv"])  # all that a chat can hold
def test_a_chat_of_the_first_format_that_is_saved_again_replies_the_same(tiny, name, tmp_path):
    Chat.load(SAVED / f"{name}.kvfold", *tiny, plan=CHATS[name].named).save(tmp_path / "again.kvfold")
    chat = Chat.load(tmp_path / "again.kvfold", *tiny)
    assert chat.ledger().stored_bytes == CHATS[name].loaded_bytes
    assert "".join(chat.send(THIRD)) == CHATS[name].reply


@pytest.mark.parametrize(
    ("plan", "stored_bytes", "said"),
    [
        ("sonic(keep=0.3, verbatim=1.0, adapter='{}/sonic')", 3400, [31, 34, 16, 50, 17, 31, 14, 28, 50, 32, 13, 20]),
        ("dynakv(rate=0.4, adapter='{}/dynakv')", 5344, [31, 20, 50, 50, 50, 13, 62, 13, 13, 22, 13, 28]),
        ("full", 9_656, [31, 29, 51, 13, 53, 34, 22, 53, 1, 53, 34, 62]),  # without an adapter: the model is the same
    ],
)
def test_an_adapter_of_the_first_format_folds_as_it_did(formula_llama, plan, stored_bytes, said):
    prompt = torch.tensor([[1, *((7 * i * i + 3 * i) % 61 + 3 for i in range(59))]])
    cache = kvfold.cache(formula_llama, plan.format(SAVED / "adapters"), stride=None, least=0)
    out = formula_llama.generate(
        prompt, past_key_values=cache, max_new_tokens=len(said), do_sample=False, eos_token_id=[]
    )
    assert out[0, prompt.shape[1] :].tolist() == said
    ledger = cache.ledger()
    assert ledger.stored_bytes - ledger.slack_bytes == stored_bytes, "without the room for tokens to come"


def test_records_of_the_first_format_are_read_and_written_as_they_were():
    lines = (SAVED / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [from_line(line, where="a saved record") for line in lines]
    assert [record.plan for record in records] == [
        "streaming_llm(keep=0.5, scope='turn')",
        "kvpress:KVzip(keep=0.5)",
        "none",
        "sentkv(summary='mean')",
    ]
    assert [record.failure is None for record in records] == [True, False, True, True]
    assert {"top1", "perplexity_ratio", "divergence_tokens"} <= set(records[2].metrics)
    assert [record.line() for record in records] == lines


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_every_record_in_the_documentation_can_be_read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines
    for number, line in enumerate(lines, start=1):
        assert from_line(line, where=f"{path}:{number}").suite
