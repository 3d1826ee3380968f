"""A saved chat is whole or refused, and going on from it is going on."""

import errno
import json
import os
import struct

import pytest
import torch
from transformers import GenerationConfig

from kvfold import seal
from kvfold.chat import file
from kvfold.chat.chat import Chat
from kvfold.errors import CacheError, FileError
from kvfold.hf.snapshot_file import fill_in_seal

CASES = [
    ("llama", "full", {}, torch.float32),
    ("llama", "h2o(keep=0.4) + int8", {}, torch.bfloat16),
    ("llama", "snapkv(keep=0.4, window=8) + int4", {"raw_turns": 1}, torch.float32),
    ("gemma3", "streaming_llm(keep=0.4)", {}, torch.float32),
    ("gemma3", "h2o(keep=0.4)", {"stride": 8}, torch.bfloat16),
]
SHORT = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=0.7)


def say(chat, *texts):
    torch.manual_seed(4)
    return ["".join(chat.send(text)) for text in texts]


@pytest.fixture
def chat(model, tokenizer):
    begun = Chat(model, tokenizer, "snapkv(keep=0.4)", system="You answer briefly.", generation=SHORT, least=0)
    say(begun, "Where does Anna live?")
    return begun


@pytest.fixture
def saved(chat, tmp_path):
    chat.save(tmp_path / "anna.kvfold")
    return tmp_path / "anna.kvfold"


@pytest.mark.parametrize(("family", "plan", "settings", "dtype"), CASES)
def test_save_load_continue_equals_continue(make_model, tokenizer, tmp_path, family, plan, settings, dtype):
    model = make_model(family=family, dtype=dtype)
    chat = Chat(model, tokenizer, plan, system="You answer briefly.", generation=SHORT, least=0, **settings)
    say(chat, "Where does Anna live?", "And the cat?")
    chat.save(tmp_path / "one")
    twin = Chat.load(tmp_path / "one", make_model(family=family, dtype=dtype), tokenizer)
    assert (twin.messages, twin.ids, twin.turns, str(twin.plan)) == (
        chat.messages,
        chat.ids,
        chat.turns,
        str(chat.plan),
    )
    assert twin.generation.to_dict() == chat.generation.to_dict()
    ours, theirs = chat.ledger(), twin.ledger()
    assert (theirs.slots, theirs.slack_bytes) == (ours.slots, 0)
    assert theirs.stored_bytes == ours.stored_bytes - ours.slack_bytes
    assert say(twin, "The lamp costs 30.", "Hello!") == say(chat, "The lamp costs 30.", "Hello!")
    twin.save(tmp_path / "two")
    chat.save(tmp_path / "three")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()


def test_a_chat_in_which_nothing_was_said_can_be_saved(model, tokenizer, tmp_path):
    Chat(model, tokenizer, "h2o(keep=0.5)", generation=SHORT, least=0).save(tmp_path / "empty")
    twin = Chat.load(tmp_path / "empty", model, tokenizer)
    assert say(twin, "Hello!") == say(Chat(model, tokenizer, "h2o(keep=0.5)", generation=SHORT, least=0), "Hello!")


def test_another_budget_is_saved_too(chat, model, tokenizer, tmp_path):
    chat.rebudget(tokens=40)
    chat.save(tmp_path / "anna")
    assert str(Chat.load(tmp_path / "anna", model, tokenizer).plan) == "snapkv(tokens=40)"


def test_the_floor_is_saved_too(model, tokenizer, tmp_path):
    Chat(model, tokenizer, "snapkv(keep=0.4)", generation=SHORT, least=30).save(tmp_path / "anna")
    twin = Chat.load(tmp_path / "anna", model, tokenizer)
    assert twin.cache.memory.rules.least == 30
    twin.rebudget(keep=0.3)
    assert twin.cache.memory.rules.least == 30


def test_the_header_says_what_the_file_holds_without_its_tensors(chat, saved):
    header, ledger = file.read_header(saved), chat.ledger()
    assert header["counters"]["stored_bytes"] == ledger.stored_bytes
    assert header["counters"]["fed"] == len(header["ids"]) == ledger.fed
    assert header["messages"] == chat.messages
    assert header["plan"] == "snapkv(keep=0.4)"


def test_a_file_is_about_as_large_as_what_was_kept(chat, saved):
    slack = chat.ledger().slack_bytes
    assert saved.stat().st_size < chat.ledger().stored_bytes - slack + 40_000


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused(saved, share, model, tokenizer):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FileError) as caught:
        Chat.load(saved, model, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_added_to_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(FileError, match="cut short or added to"):
        file.read_header(saved)


def foreign_safetensors(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)


FOREIGN = {
    "a text": lambda path: path.write_text("Dear diary, today nothing happened.\n"),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "braces": lambda path: path.write_bytes(struct.pack("<Q", 4) + b"{{{{"),
    "a list": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "a model": foreign_safetensors,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    FOREIGN[kind](tmp_path / "foreign")
    with pytest.raises(FileError, match="another kind of"):
        file.read_header(tmp_path / "foreign")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        file.read_header(tmp_path / "nothing")
    with pytest.raises(FileError, match="is a directory"):
        file.read_header(tmp_path)


def rewritten(path, change):
    """The file with another header of ours, sealed anew."""
    from safetensors.torch import load_file, save_file

    header = file.read_header(path)
    change(header)
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(held, path, metadata={file.CHAT.key: json.dumps(header | {"seal": seal.BLANK})})
    fill_in_seal(path)


def test_a_newer_file_says_to_upgrade(saved):
    rewritten(saved, lambda header: header.update(format_version=3, kvfold="9.9"))
    with pytest.raises(FileError, match=r"kvfold 9\.9 wrote it in format 3, newer than 2; upgrade kvfold"):
        file.read_header(saved)


def test_a_header_that_lacks_something_is_refused(saved):
    rewritten(saved, lambda header: header.pop("ids"))
    with pytest.raises(FileError, match="ids Field required"):
        file.read_header(saved)


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_turn_that_does_not_end_with_a_question_and_its_reply_is_refused(saved, role):
    def change(header):
        header["messages"][-2]["role"] = role

    rewritten(saved, change)
    with pytest.raises(FileError, match="1 turns are there, and messages of system, "):
        file.read_header(saved)


@pytest.mark.parametrize("counts", [[3], [2, 4], [9]])
def test_turns_that_do_not_have_all_messages_are_refused(chat, saved, counts):
    say(chat, "And the cat?")
    chat.save(saved)
    rewritten(saved, lambda header: header["turns"][1].extend(counts))
    with pytest.raises(FileError, match="turns"):
        file.read_header(saved)


def test_another_model_another_dtype_and_another_tokenizer_are_refused(saved, make_model, make_tokenizer, tokenizer):
    with pytest.raises(CacheError, match="what one model remembers means nothing to another"):
        Chat.load(saved, make_model(seed=5), tokenizer)
    with pytest.raises(CacheError, match=r"load the model with dtype=torch\.float32"):
        Chat.load(saved, make_model(dtype=torch.bfloat16), tokenizer)
    other = make_tokenizer()
    other.chat_template = tokenizer.chat_template.replace("'|> '", "'|>'")
    with pytest.raises(CacheError, match="other tokens than were fed"):
        Chat.load(saved, make_model(), other)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ctrl_c(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "stop", "error"), [
    ("fsync", full_disk, FileError), ("replace", full_disk, FileError), ("fsync", ctrl_c, KeyboardInterrupt),
])  # fmt: skip
def test_writing_that_fails_leaves_the_old_file_and_nothing_else(chat, saved, monkeypatch, step, stop, error):
    before = saved.read_bytes()
    say(chat, "And the cat?")
    with monkeypatch.context() as patched:
        patched.setattr(os, step, stop)
        with pytest.raises(error):
            chat.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    chat.save(saved)
    assert file.read_header(saved)["messages"] == chat.messages


def test_a_folder_that_is_not_there_is_one_clear_line(chat, tmp_path):
    with pytest.raises(FileError, match="choose a folder that can be written to"):
        chat.save(tmp_path / "nowhere" / "anna.kvfold")
