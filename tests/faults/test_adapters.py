"""Adapters from others: tensors that hold no numbers, sizes that are promised and not there, names that are none."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from damage import SCALE, damaged, one_line
from safetensors.torch import load_file, save_file

from formula import formula_model
from kvfold.adapters.files import load_adapter
from kvfold.adapters.ranks import load_ranks
from kvfold.errors import FileError, KvfoldError

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "saved" / "adapters"
LOADS = {"sonic": lambda folder, model: load_adapter(folder, model, kind="sonic"), "dynakv": load_ranks}


@pytest.fixture(scope="module")
def model():
    return formula_model()


@pytest.fixture
def copied(tmp_path):
    def copy(kind):
        shutil.copytree(ADAPTERS / kind, tmp_path / kind, dirs_exist_ok=True)
        return tmp_path / kind

    return copy


def words_of(folder):
    return json.loads((folder / "adapter.json").read_text())


def with_words(folder, words):
    (folder / "adapter.json").write_text(json.dumps(words))
    return folder


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", LOADS)
def test_weights_that_are_no_numbers_are_refused(copied, model, kind, number):
    folder = copied(kind)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter.safetensors").items()}
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] = number
    save_file(tensors, folder / "adapter.safetensors")
    with pytest.raises(FileError, match=f"{name} holds what is no number"):
        LOADS[kind](folder, model)


def test_sizes_that_are_only_promised_take_no_room(copied, model):
    folder = copied("sonic")
    words = words_of(folder)
    for promise in ({"rows": 10**12}, {"width": 10**12}, {"rank": 10**12}, {"reads": words["reads"] | {"size": 10**9}}):
        with pytest.raises(FileError, match="get a sound copy"):
            load_adapter(with_words(folder, words | promise), model, kind="sonic")


@pytest.mark.parametrize("kind", LOADS)
def test_strange_words_are_one_line_or_an_adapter(copied, model, kind):
    folder, generator = copied(kind), random.Random(5)
    sound = words_of(folder)
    for _ in range(20 * SCALE):
        strange, deed = damaged(sound, generator)
        with_words(folder, strange)
        try:
            one_line(lambda: LOADS[kind](folder, model))
        except Exception as error:
            raise AssertionError(deed) from error


@pytest.mark.parametrize("text", ["[]", "1", "", "[" * 100_000, '{"kind": "sonic"}', '{"version": "9"}'])
def test_words_that_are_none_are_one_line(copied, model, text):
    folder = copied("sonic")
    (folder / "adapter.json").write_text(text)
    with pytest.raises(FileError, match="get a sound copy"):
        load_adapter(folder, model, kind="sonic")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "a/b/c/d"])
def test_names_that_can_be_no_folder_are_one_line(model, source):
    with pytest.raises(KvfoldError) as caught:
        load_adapter(source, model, kind="sonic")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_an_adapter_is_what_it_was(copied, model):
    adapter = load_adapter(copied("sonic"), model, kind="sonic")
    held = load_file(ADAPTERS / "sonic" / "adapter.safetensors")
    ours = adapter.state_dict()
    # The file is of version 0.1.0, whose rows were of another kind.
    assert ours.keys() - held.keys() == {"gates", "salience.rows.weight", "salience.rows.bias"}
    assert len(held.pop("embeddings"))
    assert len(ours.pop("embeddings")) == 0
    assert all(
        torch.equal(ours[name].float(), tensor.float().to(ours[name].dtype).float()) for name, tensor in held.items()
    )
