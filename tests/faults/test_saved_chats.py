"""Chats from others: flipped bits, strange headers and tensors, plans that reach for files, special files, kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from damage import DEEDS, SCALE, SHORT, damaged, flipped, one_line
from safetensors.torch import load_file, save_file

from kvfold import seal
from kvfold.chat import file
from kvfold.chat.chat import Chat
from kvfold.cli.main import run
from kvfold.errors import CacheError, FileError, KvfoldError
from kvfold.hf.snapshot_file import fill_in_seal

SAVED = Path(__file__).parents[1] / "fixtures" / "saved"
PLANS = ("h2o(keep=0.4)", "snapkv(keep=0.5) + int4", "dynakv(rate=0.47) + sentkv(budget=0.1)")


def say(chat, *texts):
    return ["".join(chat.send(text)) for text in texts]


def goes_on(chat, folder):
    """Two turns, a fork and a save: what does not fit may show late."""
    say(chat, "Hello!", "And the dog?")
    chat.fork().save(folder / "again")


@pytest.fixture(scope="module")
def chats(tiny, tmp_path_factory):
    """A saved chat of each plan, with something raw, and what it says next."""
    folder, replies = tmp_path_factory.mktemp("chats"), {}
    for number, plan in enumerate(PLANS):
        chat = Chat(tiny[0], tiny[1], plan, generation=SHORT, raw_turns=1)
        say(chat, "Where does Anna live?", "And the cat?")
        chat.save(folder / f"{number}.kvfold")
        replies[folder / f"{number}.kvfold"] = say(chat, "The lamp costs 30.")
    return replies


def written(path, header, tensors, *, sealed=True):
    """Write a file whose seal is right, whatever it holds."""
    words = {**header, "seal": seal.BLANK} if sealed else {k: v for k, v in header.items() if k != "seal"}
    save_file(tensors, path, metadata={file.CHAT.key: json.dumps(words)})
    if sealed:
        fill_in_seal(path)


def copy_of(path, tmp_path):
    copied = tmp_path / "copy.kvfold"
    copied.write_bytes(path.read_bytes())
    return copied


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_every_flipped_bit_is_refused(chats, tiny, tmp_path, number):
    path = list(chats)[number]
    whole = path.read_bytes()
    generator = random.Random(number)
    copied = copy_of(path, tmp_path)
    for case in range(60 * SCALE):
        byte = case if case < 24 else generator.randrange(len(whole))
        flipped(copied, byte, generator.randrange(8))
        assert one_line(lambda: Chat.load(copied, *tiny)), byte
        copied.write_bytes(whole)
    assert say(Chat.load(copied, *tiny), "The lamp costs 30.") == chats[path]


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("number", range(len(PLANS)))
@pytest.mark.filterwarnings("ignore:.*older format")
def test_a_strange_header_is_one_line_or_a_chat(chats, tiny, tmp_path, number, sealed):
    path = list(chats)[number]
    header, tensors = file.read_header(path), {k: v.clone() for k, v in load_file(path).items()}
    generator = random.Random(10 * number + sealed)
    refused = 0
    for _ in range(12 * SCALE):
        strange, deed = damaged(header, generator)
        if not sealed:
            strange["format_version"] = 1
        written(tmp_path / "strange", strange, tensors, sealed=sealed)
        try:
            refused += bool(one_line(lambda: say(Chat.load(tmp_path / "strange", *tiny), "Hello!")))
        except Exception as error:
            raise AssertionError(deed) from error
    assert refused > 2 * SCALE


@pytest.mark.parametrize("version", [float("inf"), float("nan"), None, "2", [], -1, 10**400])
def test_a_format_version_that_is_none_is_one_line(chats, tmp_path, version):
    path = next(iter(chats))
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    written(tmp_path / "strange", file.read_header(path) | {"format_version": version}, tensors)
    assert one_line(lambda: file.read_header(tmp_path / "strange"))


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_strange_tensors_are_one_line_or_a_chat(chats, tiny, tmp_path, number):
    path = list(chats)[number]
    header, tensors = file.read_header(path), {k: v.clone() for k, v in load_file(path).items()}
    generator = random.Random(number)
    for _ in range(8 * SCALE):
        name = generator.choice(sorted(tensors))
        at = generator.randrange(len(DEEDS))
        try:
            changed = DEEDS[at](tensors[name])
        except (RuntimeError, IndexError):  # a tensor of one dimension has no transpose
            continue
        written(tmp_path / "strange", header, tensors | {name: changed})
        try:
            one_line(lambda: goes_on(Chat.load(tmp_path / "strange", *tiny), tmp_path))
        except Exception as error:
            raise AssertionError(f"{name}, deed {at}") from error


@pytest.mark.parametrize("name", ["h2o", "dynakv_sentkv"])
def test_a_file_of_the_first_format_loads_with_one_line(tiny, name):
    with pytest.warns(UserWarning, match="save it again to seal it") as said:
        Chat.load(SAVED / f"{name}.kvfold", *tiny)
    assert len(said) == 1


# Plans that reach for files -----------------------------------------------------------------------------------------


def test_a_plan_that_names_files_is_loaded_only_with_the_callers_word(begin, tiny, tmp_path):
    told, other = tmp_path / "told", tmp_path / "other"
    told.mkdir()
    plan = "sentkv(budget=0.5, tier='disk', directory={!r})"
    chat = begin(plan.format(str(told)))
    say(chat, "Where does Anna live?")
    chat.save(tmp_path / "chat")
    del chat
    told.rmdir()  # as on another machine
    with pytest.raises(CacheError, match=r"its plan names directory='.*told'.* give trust=True"):
        Chat.load(tmp_path / "chat", *tiny)
    with pytest.raises(FileError, match="give directory="):
        Chat.load(tmp_path / "chat", *tiny, trust=True)
    other.mkdir()
    moved = Chat.load(tmp_path / "chat", *tiny, plan=plan.format(str(other)))
    assert len(list(other.iterdir())) == 1
    say(moved, "And the cat?")
    told.mkdir()
    say(Chat.load(tmp_path / "chat", *tiny, trust=True), "And the cat?")
    for wrong in ("full", "h2o(keep=0.5)", plan.format(str(other)) + " + int4"):
        with pytest.raises(CacheError, match="a plan of the same members"):
            Chat.load(tmp_path / "chat", *tiny, plan=wrong)


@pytest.mark.parametrize("plan", ["sonic(keep=0.3, adapter='someone/else')", "dynakv(rate=0.4, adapter='/else')",
                                  "sentkv(budget=0.5, delimiters='/etc/passwd')"])  # fmt: skip
def test_a_foreign_adapter_in_a_file_is_not_asked_for(chats, tiny, tmp_path, plan):
    path = next(iter(chats))
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    written(tmp_path / "chat", file.read_header(path) | {"plan": plan}, tensors)
    with pytest.raises(CacheError, match="give trust=True"):
        Chat.load(tmp_path / "chat", *tiny)


# Special files ------------------------------------------------------------------------------------------------------


def test_pipes_devices_and_names_that_are_none_are_one_line(tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, Path("a\0b"), tmp_path / ("x" * 5000)):
        with pytest.raises(FileError, match="was to be read"):
            Chat.load(path, *tiny)


def test_deep_json_is_one_line(tmp_path):
    deep = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    (tmp_path / "deep").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(FileError, match="another kind of file"):
        file.read_header(tmp_path / "deep")


def test_control_characters_are_not_sent_to_a_terminal(chats, tmp_path, capsys):
    path = next(iter(chats))
    header: dict = file.read_header(path) | {"model": "a\x1b[2J\x9b31mb\u202ec", "kvfold": "\r\n"}
    header["messages"][0]["content"] = "\x1b]0;title\x07"
    written(tmp_path / "chat", header, {k: v.clone() for k, v in load_file(path).items()})
    assert run(["inspect", str(tmp_path / "chat")]) == 0
    assert run(["inspect", str(tmp_path / "chat"), "--json"]) == 0
    said = capsys.readouterr().out
    assert "a\\u001b[2J\\u009b31mb\\u202ec" in said
    assert not set(said) & {"\x1b", "\x9b", "\x07", "\r", "\u202e"}
    assert json.loads(said.splitlines()[-1])["model"] == header["model"]


# Kills in the middle of saving --------------------------------------------------------------------------------------

SAVER = """
import sys, torch
from pathlib import Path
from kvfold.chat import file
from safetensors.torch import load_file
path, out = Path(sys.argv[1]), Path(sys.argv[2])
header = file.read_header(path)
del header["seal"]
tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
tensors["big"] = torch.zeros(1 << 22)
print("ready", flush=True)
while True:
    file.CHAT.write(out, header, tensors)
"""


def test_what_killed_saves_leave_is_removed_by_the_next_and_nothing_else(chats, tiny, tmp_path):
    path = next(iter(chats))
    out = tmp_path / "anna.kvfold"
    foreign = [tmp_path / name for name in (".anna.kvfold.x.part", ".anna.kvfold.kvfold-999999999-abcdefgh.part",
                                            f".a.kvfold-{os.getpid()}-abcdefgh.part", "notes.part")]  # fmt: skip
    for one in foreign:
        one.write_text("mine")
    folder = tmp_path / ".b.kvfold-999999999-abcdefgh.part"
    folder.mkdir()
    foreign.append(folder / "notes.txt")
    foreign[-1].write_text("mine")
    os.symlink(tmp_path / "elsewhere", tmp_path / ".c.kvfold-999999999-abcdefgh.part")
    generator = random.Random(1)
    for _ in range(SCALE):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, path, out], stdout=subprocess.PIPE)
        assert saver.stdout is not None
        saver.stdout.readline()
        time.sleep(generator.random() * 0.3)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        if out.exists():
            file.read_header(out)
            load_file(out)
    loaded = Chat.load(path, *tiny)
    loaded.save(tmp_path / "next.kvfold")
    left = {one.name for one in tmp_path.iterdir()} - {"anna.kvfold", "next.kvfold"}
    assert left == {one.relative_to(tmp_path).parts[0] for one in foreign} | {".c.kvfold-999999999-abcdefgh.part"}
    assert all(one.read_text() == "mine" for one in foreign)


def test_a_draft_of_a_process_that_runs_is_left_alone(chats, tiny, tmp_path):
    saver = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        draft = tmp_path / f".a.kvfold-{saver.pid}-abcdefgh.part"
        draft.mkdir()
        loaded = Chat.load(next(iter(chats)), *tiny)
        loaded.save(tmp_path / "one.kvfold")
        assert draft.exists()
    finally:
        saver.kill()
        saver.wait()
    loaded.save(tmp_path / "two.kvfold")
    assert not draft.exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(chats, tiny, tmp_path, monkeypatch):
    loaded = Chat.load(next(iter(chats)), *tiny)
    loaded.save(tmp_path / "one.kvfold")
    before = (tmp_path / "one.kvfold").read_bytes()
    script = f"ulimit -f 20; exec {sys.executable} -c '{SAVER}' {next(iter(chats))} {tmp_path / 'one.kvfold'}"
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; {script}"], capture_output=True, text=True)
    assert "FileError" in done.stderr
    assert (tmp_path / "one.kvfold").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["one.kvfold"]


def test_a_name_with_a_nul_cannot_be_saved_to(chats, tiny):
    with pytest.raises(KvfoldError, match="was to be written"):
        Chat.load(next(iter(chats)), *tiny).save("a\0b")
