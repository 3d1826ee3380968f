"""A model whose weights follow from a formula, so that files written for it fit it on every machine and version.

A seed would not do: what random numbers follow from one may change with the version of torch.
"""

import torch


def formula_model(*, vocabulary=64):
    """A Llama of two layers, one key/value head of 8 dimensions each, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for index, (name, weight) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:  # norms stay at one
                weight.copy_(formula(weight.shape, index))
    return model.eval()


def formula(shape, salt):
    """Numbers between -1 and 1 without a visible order: exact in float32, the same everywhere."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.int64)
    mixed = (steps * steps * 7919 + steps * (104729 + 7907 * salt)) % 1021
    return ((mixed - 510).float() / 512).reshape(shape)
