"""A model that knows nothing, with the shipped tokenizer, saved to a folder so that workers can open it by its path."""

from pathlib import Path


def save_random_model(folder: Path, *, seed: int = 0) -> Path:
    """Write it and return its folder."""
    import torch
    from transformers import AutoTokenizer

    from kvfold.hf.load import SHIPPED, new_llama

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = new_llama(**sizes, intermediate_size=64, vocab_size=2048, max_position_embeddings=4096)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(SHIPPED / "tiny")).save_pretrained(folder)
    return folder
