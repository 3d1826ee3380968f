"""A small Llama as a GGUF file, written by the gguf package as llama.cpp's converter lays it out.

The model is made here with random weights, the tokenizer is trained on a sentence. It knows nothing of how the file is
read.
"""

import json

import gguf
import torch

from kvfold.data import tokenizer as tokenizers
from kvfold.hf.load import new_llama

SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


def llama():
    """The model that the file holds."""
    torch.manual_seed(5)
    return new_llama(**SIZES).eval()


def write(path, model, *, quantised=False, architecture="llama", leave_out=""):
    """Write the model: in float32, or its matrices in Q8_0 blocks; weights whose name has `leave_out` are left out."""
    writer = gguf.GGUFWriter(path, architecture)
    _add_settings(writer, model.config)
    _add_tokenizer(writer)
    for name, weight in model.state_dict().items():
        if not leave_out or leave_out not in name:
            _add_weight(writer, name, weight, quantised=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_settings(writer, config):
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer):
    trained = tokenizers.train(["Anna lives in Turin with a grey cat."] * 4, vocabulary=SIZES["vocab_size"])
    ids = trained.get_vocab()
    special = {ids[token] for token in tokenizers.SPECIALS}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    writer.add_token_types([3 if index in special else 1 for index in range(len(ids))])  # 3: control tokens
    writer.add_token_merges([" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]])
    writer.add_bos_token_id(ids[tokenizers.BOS])
    writer.add_eos_token_id(ids[tokenizers.END])
    writer.add_pad_token_id(ids[tokenizers.PAD])
    writer.add_chat_template(tokenizers.CHAT_TEMPLATE)


def _add_weight(writer, name, weight, *, quantised):
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    for part, count in heads.items():
        if part in name:
            # llama.cpp rotates neighbouring dimensions where transformers rotates halves of a head.
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    array = weight.float().numpy()
    if not quantised or array.ndim == 1:
        writer.add_tensor(name, array)
        return
    blocks = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(array, blocks), raw_dtype=blocks)
