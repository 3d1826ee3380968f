"""Tiny random models of every family that kvfold is tested with, built once a run, and random texts for them.

Weights are larger than a fresh model's, so that attention is peaked and a wrong slot shows in the logits. No file,
no network. What is done with a model stands in driving.py.
"""

import copy
from functools import cache

import torch
import transformers as hf

VOCABULARY = 97
POSITIONS = 512
WINDOW = 16  # of the sliding layers

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_GEMMA = {
    **_SIZES,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 8,
}

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gemma3_conditional", "phi3")


def _gemma3_conditional() -> hf.PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**_GEMMA).to_dict(),
        vision_config=hf.SiglipVisionConfig(**vision, image_size=16, patch_size=8).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    return hf.Gemma3ForConditionalGeneration(config)


_BUILDERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=None)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_GEMMA)),
    "gemma3_conditional": _gemma3_conditional,
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES)),
}


def fresh(family: str, **settings: object) -> hf.PreTrainedModel:
    """A new tiny model, for tests that change it. `settings` are attributes of its configuration, set before it."""
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        if settings:
            config = _BUILDERS[family]().config
            for name, value in settings.items():
                setattr(config, name, value)
            model = type(_shared(family))(config)
        else:
            model = _BUILDERS[family]()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    return model.eval()


@cache
def _shared(family: str) -> hf.PreTrainedModel:
    return fresh(family)


def model_of(family: str) -> hf.PreTrainedModel:
    """The shared tiny model of a family. Its weights never change; its attention implementation may."""
    return _shared(family)


@cache
def exact_twin(family: str) -> hf.PreTrainedModel:
    """The same weights in float64 with every matrix of attention written out: what is meant, up to 1e-12."""
    twin = copy.deepcopy(model_of(family)).double()
    twin.set_attn_implementation("eager")
    return twin


def text(rows: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    """Random ids, [rows, tokens], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (rows, tokens), generator=generator)
