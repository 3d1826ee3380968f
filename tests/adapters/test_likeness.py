"""Which models an adapter fits: the very one, one in 16 bits, a light fine-tune; neither other weights nor shapes."""

import copy
import warnings

import pytest
import torch

from fakes import fresh, model_of
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import load_adapter, save_adapter
from kvfold.adapters.folder import TENSORS
from kvfold.errors import FileError, ModelError


@pytest.fixture
def made(tmp_path):
    """A folder with an adapter of a small llama."""
    model = model_of("llama")
    save_adapter(Adapter.for_model(model, rows=0, rank=2), tmp_path, kind="sonic", model=model, about={})
    return tmp_path


def moved(by: float):
    """A copy of the llama whose every weight moved by so much of its size."""
    copied = copy.deepcopy(model_of("llama"))
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in copied.parameters():
            weight += by * weight.std() * torch.randn_like(weight) if weight.ndim == 2 else 0.0
    return copied


def test_the_very_model_and_a_copy_in_16_bits_load_without_a_word(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(made, model_of("llama"), kind="sonic")
        load_adapter(made, copy.deepcopy(model_of("llama")).bfloat16(), kind="sonic")


def test_a_light_fine_tune_loads_with_a_line_that_says_how_like_it_is(made):
    with pytest.warns(UserWarning, match=r"nearly its weights \(cosine of samples at least 0\.99"):
        load_adapter(made, moved(0.03), kind="sonic")


@pytest.mark.parametrize("other", [lambda: moved(0.5), lambda: fresh("llama", num_hidden_layers=3)])
def test_other_weights_and_other_shapes_are_refused(made, other):
    with pytest.raises(ModelError, match="with other weights"):
        load_adapter(made, other(), kind="sonic")


def test_samples_are_sealed_with_the_rest(made):
    data = bytearray((made / TENSORS).read_bytes())
    data[-3] ^= 1
    (made / TENSORS).write_bytes(bytes(data))
    with pytest.raises(FileError):
        load_adapter(made, model_of("llama"), kind="sonic")
