"""Talking through the command line: a line in, a reply out, one clear line for everything that goes wrong."""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kvfold.chat.file import read_header
from kvfold.cli import chat as verb
from kvfold.cli.main import run
from kvfold.data import tokenizer as tokenizers
from kvfold.hf.load import new_llama

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with 256 positions."""
    import torch

    made = tmp_path_factory.mktemp("models") / "parrot"
    torch.manual_seed(3)
    new_llama(**SIZES, max_position_embeddings=256).save_pretrained(made)
    tokenizers.save(tokenizers.train(["Anna lives in Turin with a grey cat."] * 4, vocabulary=300), made, positions=256)
    return made


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Run `kvfold chat` with these lines on standard input: exit code, replies, and what else was said."""

    def talked(lines, *options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = run(["chat", "--model", str(folder), "--max-new-tokens", "6", *map(str, options)])
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, replies=shown.out, said=shown.err)

    return talked


def test_a_pipe_gives_a_reply_a_line_and_says_after_each_turn_what_is_stored(talk):
    done = talk(
        ["Where does Anna live?", "", "And the cat?"],
        "--plan",
        "streaming_llm(keep=0.5)",
        "--system",
        "Hi.",
        "--least",
        0,
    )
    assert done.code == 0
    status = [line for line in done.said.splitlines() if line.startswith("[")]
    assert len(status) == 2
    assert "tokens seen" in status[0]
    assert "slots stored" in status[0]
    assert "bytes: 0." in status[1]
    assert done.replies.count("\n") >= 2
    assert ">" not in done.said, "no prompt where nobody types"


def test_what_was_saved_is_gone_on_with(talk, tmp_path):
    path = tmp_path / "anna.kvfold"
    whole = talk(["Where does Anna live?", "And the cat?"], "--plan", "h2o(keep=0.5)")
    first = talk(["Where does Anna live?"], "--plan", "h2o(keep=0.5)", "--save", path)
    second = talk(["And the cat?"], "--load", path, "--save", path)
    assert first.replies + second.replies == whole.replies
    assert second.said.splitlines()[0] == first.said.splitlines()[-1], "the status of what was loaded"
    assert len(read_header(path)["turns"]) == 2


def test_sampling_follows_the_seed(talk):
    hot = ["--temperature", "2", "--seed"]
    assert (
        talk(["Anna?"], *hot, "1").replies == talk(["Anna?"], *hot, "1").replies != talk(["Anna?"], *hot, "2").replies
    )


def test_commands_save_show_and_change_the_budget(talk, tmp_path):
    path = tmp_path / "anna.kvfold"
    lines = ["Where does Anna live?", "/ledger", "/budget 0.3", "/budget 20", f"/save {path}", "/help", "/quit", "Who?"]
    done = talk(lines, "--plan", "streaming_llm(keep=0.9)", "--least", 0)
    assert done.code == 0
    assert "streaming_llm(keep=0.9): fed" in done.said
    assert f"saved: {path}" in done.said
    header = read_header(path)
    assert header["plan"] == "streaming_llm(tokens=20)"
    assert len(header["turns"]) == 1


def test_a_turn_is_taken_back_and_tried_again(talk, tmp_path):
    path = tmp_path / "anna.kvfold"
    done = talk(["Anna?", "And the cat?", "/undo", f"/save {path}", "And the cat?", "/retry", "/undo", "/undo"])
    assert done.code == 2, "a second /undo has nothing to take back"
    assert "it takes the newest turn back, once; none is there" in done.said
    assert len(read_header(path)["turns"]) == 1
    first, second, again, tried = done.replies.splitlines()
    assert second == again == tried
    hot = talk(["Anna?", "/retry 5", "/plan"], "--seed", "3").replies.splitlines()
    assert hot[0] == first
    assert len(hot) == 2


def test_a_talk_goes_on_under_another_plan_and_another_prompt(talk, tmp_path):
    path = tmp_path / "anna.kvfold"
    lines = ["Anna?", "And the cat?", "/plan full", "/system You answer briefly.", f"/save {path}", "/plan", "/system"]
    done = talk(lines)
    assert done.code == 0
    header = read_header(path)
    assert (header["plan"], len(header["turns"])) == ("full", 2)
    assert header["messages"][0] == {"role": "system", "content": "You answer briefly."}
    assert done.said.splitlines()[-2:] == ["full", "You answer briefly."]
    written = talk(["Anna?", "And the cat?"], "--plan", "full", "--system", "You answer briefly.", "--save", path)
    assert written.code == 0
    assert read_header(path)["messages"][0] == header["messages"][0]


def test_what_is_read_anew_is_what_would_have_been_read(talk, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    talk(["Anna?", "And the cat?", "/plan full", f"/save {one}"], "--plan", "int8")
    talk(["Anna?", "And the cat?"], "--plan", "int8", "--save", other)
    assert read_header(one)["ids"] == read_header(other)["ids"]
    assert read_header(one)["counters"]["fed"] == read_header(other)["counters"]["fed"]


def test_a_file_brings_its_model_and_its_tokens_are_not_read_again(talk, tmp_path, monkeypatch, capsys):
    path = tmp_path / "anna.kvfold"
    talk(["Anna?"], "--save", path)
    fed = read_header(path)["counters"]["fed"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/load {path}\n"))
    assert run(["chat", "--load", str(path)]) == 0
    said = capsys.readouterr().err
    assert said.count(f"{fed:,} tokens did not have to be read again") == 2
    assert talk(["/load"]).code == 2


@pytest.mark.parametrize(("line", "why"), [
    ("/knit", "there is no such command"),
    ("/budget much", "it takes a number"),
    ("/budget 2", "pinned"),
    ("/save", "--save named none"),
    ("word " * 300, "the model has 256 positions"),
])  # fmt: skip
def test_what_goes_wrong_in_a_turn_is_one_line_and_the_talk_goes_on(talk, line, why):
    done = talk(["Anna?", line, "Anna?"], "--plan", "streaming_llm(keep=0.5)")
    assert done.code == 2, "a script learns that something failed"
    wrong = [said for said in done.said.splitlines() if said.startswith("kvfold: ")]
    assert len(wrong) == 1
    assert why in wrong[0]
    assert sum(said.startswith("[") for said in done.said.splitlines()) == 2


@pytest.mark.parametrize(("options", "why"), [
    (["--plan", "snap(keep=0.5)"], "there is no such member"),
    (["--load", "/no/where"], "no such file"),
    (["--load", __file__], "another kind of file"),
    (["--load", __file__, "--plan", "full"], "a saved chat brings its own"),
    (["--save", "/no/where/x"], "make the folder first"),
    (["--save", "/"], "it is a folder"),
    (["--temperature", "-1"], "--help"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_code_2_before_a_model_is_read(talk, options, why, monkeypatch):
    monkeypatch.setattr("kvfold.hf.load.load", pytest.fail)
    done = talk(["Anna?"], *options)
    assert done.code == 2
    assert done.replies == ""
    assert done.said.count("\n") == 1
    assert why in done.said


class Stopped:
    """A chat whose second piece is Ctrl-C, before or after the turn has been."""

    def __init__(self, *, counted):
        self.turns, self.counted, self.was_closed = [], counted, False

    def send(self, text):
        try:
            yield "Well"
            if self.counted:
                self.turns = [text]
            raise KeyboardInterrupt
        finally:
            self.was_closed = True


@pytest.mark.parametrize(("counted", "line"), [
    (False, "stopped; the turn is undone"), (True, "stopped while folding; the turn stays")
])  # fmt: skip
def test_ctrl_c_in_a_turn_says_in_one_line_what_became_of_it(capsys, monkeypatch, counted, line):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    chat = Stopped(counted=counted)
    verb._turn(chat, "Anna?")
    shown = capsys.readouterr()
    assert shown.out == "Well\n"
    assert shown.err == line + "\n"
    assert chat.was_closed


def test_ctrl_c_in_a_turn_of_a_script_undoes_it_saves_and_ends_with_130(talk, monkeypatch, tmp_path):
    path = tmp_path / "anna.kvfold"
    monkeypatch.setattr("kvfold.chat.chat.Chat.send", lambda _, text: Stopped(counted=False).send(text))
    done = talk(["Anna?", "Anna?"], "--save", path)
    assert done.code == 130
    assert done.said == "kvfold: stopped by Ctrl-C; files that were finished before are kept\n"
    assert read_header(path)["turns"] == []


@pytest.mark.parametrize("lines", [[""], ["", "  "]])
def test_a_script_that_says_nothing_is_told_so(talk, lines):
    done = talk(lines)
    assert (done.code, done.replies) == (2, "")
    assert done.said == "kvfold: an empty message was sent; there is nothing to reply to; say something\n"


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves_with_130_and_saves(folder, tmp_path):
    path = tmp_path / "anna.kvfold"
    program = subprocess.Popen(
        [sys.executable, "-m", "kvfold", "chat", "--model", str(folder), "--max-new-tokens", "4", "--save", str(path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    program.stdin.write("Anna?\n")
    program.stdin.flush()
    said = program.stderr.readline()  # the status of the turn; now it waits for the next line
    assert said.endswith("kept]\n"), said
    os.kill(program.pid, signal.SIGINT)
    assert program.wait(timeout=300) == 130
    assert program.stderr.read() == "kvfold: stopped by Ctrl-C; files that were finished before are kept\n"
    assert len(read_header(path)["turns"]) == 1


def inspected(capsys, *arguments):
    assert run(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_inspect_says_what_a_saved_chat_holds(talk, tmp_path, capsys, folder):
    path = tmp_path / "anna.kvfold"
    talk(["Where does Anna live?", "And the cat?"], "--plan", "h2o(keep=0.5)", "--save", path)
    held = json.loads(inspected(capsys, path, "--json"))
    header = read_header(path)
    assert held["plan"] == "h2o(keep=0.5)"
    assert held["turns"] == 2
    assert held["seen"] == held["fed"] == len(header["ids"])
    assert held["stored"] == round(held["stored_bytes"] / held["full_bytes"], 4)
    assert [message["role"] for message in held["messages"]] == ["user", "assistant"] * 2
    shown = inspected(capsys, path)
    assert f"fingerprint     {header['fingerprint']}" in shown
    assert "h2o(keep=0.5)" in shown


def test_inspect_says_what_a_model_folder_holds(folder, capsys):
    held = json.loads(inspected(capsys, folder, "--json"))
    assert (held["kind"], held["layers"], held["kv_heads"], held["head_size"]) == ("model", 2, 2, 8)
    assert held["cached_numbers_per_token"] == 2 * 2 * 2 * 8
    assert held["tokenizer"] is True
    assert held["weights_bytes"] > 10_000
    assert "positions                 256" in inspected(capsys, folder)


def test_inspect_refuses_what_is_neither(tmp_path, capsys):
    (tmp_path / "diary.txt").write_text("Dear diary")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text("[1]")
    for path, why in (
        (tmp_path / "diary.txt", "another kind of file"),
        (tmp_path, "no config.json"),
        (odd, "no config.json that can be read"),
    ):
        assert run(["inspect", str(path)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert why in shown.err


def test_with_compact_positions_a_chat_goes_on_and_a_saved_one_keeps_its_own(talk, tmp_path):
    lines = [f"Anna lives in Turin with a grey cat, she said {number} times." for number in range(12)]
    small = ("--plan", "streaming_llm(tokens=60)")
    ended = talk(lines, *small)
    assert ended.code == 2
    assert 'unless positions="compact" is asked for' in ended.said
    done = talk(lines, *small, "--positions", "compact", "--save", tmp_path / "anna.kvfold")
    assert done.code == 0
    assert len(done.replies.splitlines()) >= len(lines)
    assert talk(lines[:1], "--load", tmp_path / "anna.kvfold").code == 0
    assert (
        "--positions was given with --load"
        in talk(["a"], "--load", tmp_path / "anna.kvfold", "--positions", "kept").said
    )
    assert "give 'kept' or 'compact'" in talk(["a"], "--positions", "moved").said
