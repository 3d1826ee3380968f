"""Likeness: whether an adapter that was made for one model fits another one of the same shape.

An adapter has samples of the weights that it was made for. Where those of a model point the same way in every matrix,
keys and values do too: a dequantised copy, one in 16 bits and a light fine-tune of one model share an adapter.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kvfold.hf.load import sampled

SAMPLES = "base.samples"  # the name of the samples among an adapter's tensors
BOUND = 0.98  # least cosine of the samples of any matrix


def samples_of(model: nn.Module) -> Float[Tensor, "matrices samples"]:
    """Sample every matrix of a model, in the order of their names, in float16; small ones are filled up with zeros."""
    rows = []
    for _, weight in sorted(model.named_parameters()):
        if weight.ndim == 2:
            some = sampled(weight).float().cpu()
            # Only directions are compared, and a large number would not fit into 16 bits.
            rows.append(some / some.norm().clamp(min=1e-12))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).half()


def least_cosine(model: nn.Module, samples: Float[Tensor, "matrices samples"]) -> float:
    """Give the least cosine between a model's matrices and these samples; -1 where their numbers differ."""
    own = samples_of(model)
    if own.shape != samples.shape:
        return -1.0
    cosines = cosine_similarity(own.float(), samples.float(), dim=1)
    return float(cosines.nan_to_num(nan=-1.0).min())
