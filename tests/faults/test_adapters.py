"""Adapters from others: tensors that hold no numbers, sizes that are promised and not there, names that are none."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from damage import DEEDS, SCALE, damaged, flipped, one_line
from safetensors.torch import load_file, save_file

import kvfold
from fakes import text
from formula import formula_model
from kvfold import seal
from kvfold.adapters.files import load_adapter
from kvfold.adapters.ranks import load_ranks
from kvfold.errors import FileError, KvfoldError
from kvfold.hf.load import SHIPPED

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


def with_words(folder, words, *, sealed=False):
    """A folder with these words; under a seal that is right, whatever they say."""
    if sealed:
        words = {"seal": seal.BLANK} | words | {"version": 2}
    head = json.dumps(words).encode()
    if sealed:
        with (folder / "adapter.safetensors").open("rb") as data:
            head = seal.sealed(head, seal.digest_of(data))
    (folder / "adapter.json").write_bytes(head)
    return folder


@pytest.mark.parametrize("kind", LOADS)
def test_every_flipped_bit_of_an_adapter_is_refused(copied, model, kind):
    folder, generator = copied(kind), random.Random(1)
    with_words(folder, words_of(folder), sealed=True)
    for name in ("adapter.json", "adapter.safetensors"):
        whole = (folder / name).read_bytes()
        for case in range(40 * SCALE):
            byte = case if case < 24 else generator.randrange(len(whole))
            flipped(folder / name, byte, generator.randrange(8))
            assert one_line(lambda: LOADS[kind](folder, model)), (name, byte)
            (folder / name).write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LOADS[kind](folder, model)


@pytest.mark.parametrize("kind", LOADS)
def test_an_adapter_of_the_first_version_loads_with_one_line(copied, model, kind):
    with pytest.warns(UserWarning, match="write it anew to seal it") as said:
        LOADS[kind](copied(kind), model)
    assert len(said) == 1


def test_shipped_adapters_are_sealed():
    for path in SHIPPED.glob("*/adapters/*/adapter.json"):
        words = json.loads(path.read_text())
        assert seal.is_whole(path.read_bytes(), words["seal"])
        with path.with_name("adapter.safetensors").open("rb") as data:
            seal.refuse_other_data(data, words["seal"], path)


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


@pytest.mark.parametrize("kind", LOADS)
def test_strange_tensors_are_one_line_or_an_adapter_that_works(copied, model, kind):
    folder, generator = copied(kind), random.Random(3)
    words = words_of(folder)
    sound = {name: tensor.clone() for name, tensor in load_file(folder / "adapter.safetensors").items()}
    plan = {"sonic": "sonic(slots=4, adapter={!r})", "dynakv": "dynakv(rate=0.5, adapter={!r})"}[kind]

    def used():
        cache = kvfold.cache(model, plan.format(str(folder)), prompt_tokens=0)
        model(text(1, 12) % 64, past_key_values=cache)
        cache.fold()
        model(text(1, 1) % 64, past_key_values=cache)

    for _ in range(16 * SCALE):
        name, at = generator.choice(sorted(sound)), generator.randrange(len(DEEDS))
        try:
            changed = DEEDS[at](sound[name])
        except (RuntimeError, IndexError):  # a tensor of one dimension has no transpose
            continue
        save_file(sound | {name: changed}, folder / "adapter.safetensors")
        with_words(folder, words, sealed=True)
        try:
            one_line(used)
        except Exception as error:
            raise AssertionError(f"{name}, deed {at}") from error


def test_sizes_that_are_only_promised_take_no_room(copied, model):
    folder = copied("sonic")
    words = words_of(folder)
    large = 2**31 - 1
    for promise in ({"rows": 2_000_000}, {"rows": large}, {"rows": 10**12}, {"width": large}, {"rank": large},
                    {"reads": words["reads"] | {"layers": 10_000}}, {"reads": words["reads"] | {"size": large}},
                    {"layers": [*words["layers"][:-1], ["layers.1.mlp.down_proj", large, large]]}):  # fmt: skip
        with pytest.raises(FileError, match="get a sound copy"):
            load_adapter(with_words(folder, words | promise, sealed=True), model, kind="sonic")


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.filterwarnings("ignore:.*older format")
def test_strange_words_are_one_line_or_an_adapter(copied, model, kind, sealed):
    folder, generator = copied(kind), random.Random(5)
    sound = words_of(folder)
    for _ in range(20 * SCALE):
        strange, deed = damaged(sound, generator)
        with_words(folder, strange, sealed=sealed and isinstance(strange, dict))
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
