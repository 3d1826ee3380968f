"""Loading: a sound folder comes in ready to use, anything else is one line that says what is wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from kvfold.data import tokenizer as tokenizers
from kvfold.errors import ModelError
from kvfold.hf import load as loading
from kvfold.hf.load import fingerprint, load, new_llama

SIZES = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A complete folder of a tiny random model, saved by transformers and by our tokenizer's writer."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(1)
    new_llama(**SIZES).save_pretrained(folder)
    tokenizers.save(tokenizers.train(["one two three"], vocabulary=270), folder, positions=128)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(sound, tmp_path / "copy")


def refusal(name, **settings):
    with pytest.raises(ModelError) as caught:
        load(str(name), **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert str(name) in line
    assert line.count(";") >= 2, "a message says what was asked, what is true, what to do"
    return line


def test_a_folder_gives_a_model_ready_to_generate_and_its_tokenizer(sound):
    model, tokenizer = load(str(sound))
    assert not model.training
    ids = tokenizer("one two", add_special_tokens=False, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert tokenizer.chat_template


def test_the_dtype_is_that_of_the_file_unless_given(sound):
    assert load(str(sound))[0].dtype == torch.float32
    assert load(str(sound), dtype=torch.bfloat16, device="cpu")[0].dtype == torch.bfloat16


def test_an_unknown_name_lists_what_there_is(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = refusal("no-such-model-here")
    assert "switched off by HF_HUB_OFFLINE" in line
    assert "give" in line


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/folder", "a b"])
def test_what_can_be_no_name_is_refused_without_asking_the_network(name, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
    assert "there is no such folder" in refusal(name)


def test_a_file_in_place_of_a_folder_is_said(folder):
    assert "it is a file" in refusal(folder / "config.json")


def test_missing_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json and no model.safetensors" in refusal(folder)


def test_no_tokenizer_is_said(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(folder)


def test_a_truncated_file_of_weights_is_said(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot be read" in refusal(folder)


def test_a_config_that_is_no_json_is_said(folder):
    (folder / "config.json").write_text("{")
    assert "cannot be read" in refusal(folder)


def test_weights_that_are_missing_are_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 weights, model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_name_the_weight(folder, bad):
    model, _ = load(str(folder))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 3] = bad
    model.save_pretrained(folder)
    assert "model.layers.1.self_attn.q_proj.weight holds NaN or infinity" in refusal(folder)


def test_a_device_that_is_not_there_is_said(sound):
    with pytest.raises(ModelError, match="give 'cpu'"):
        load(str(sound), device="nowhere")


def test_a_shipped_model_is_found_by_its_name_and_comes_before_a_folder_of_that_name(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    shutil.copytree(sound, tmp_path / "pocket")
    (tmp_path / "elsewhere" / "pocket").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("pocket")[0].config.hidden_size == 32


def test_a_fingerprint_is_the_same_in_another_process_and_dtype(sound):
    model, _ = load(str(sound))
    program = (
        "import sys; from kvfold.hf.load import load, fingerprint; import torch;"
        "print(fingerprint(load(sys.argv[1], dtype=torch.bfloat16)[0]))"
    )
    other = subprocess.run([sys.executable, "-c", program, str(sound)], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint(model)
    assert len(fingerprint(model)) == 16


def test_a_fingerprint_tells_other_weights_and_other_rotations_apart(sound):
    model, _ = load(str(sound))
    own = fingerprint(model)
    torch.manual_seed(2)
    assert fingerprint(new_llama(**SIZES)) != own
    settings = json.loads((sound / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    turned = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    turned.load_state_dict(model.state_dict())
    assert fingerprint(turned) != own
    model.config.use_cache, model.config._name_or_path = False, "another name"
    assert fingerprint(model) == own


@pytest.mark.parametrize("name", ["./tiny", "tiny/", "."])
def test_a_path_is_no_name_of_a_shipped_model(sound, tmp_path, monkeypatch, name):
    shutil.copytree(sound, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny" if name == "." else tmp_path)
    assert loading.source_of(name) == str(tmp_path / "tiny")
