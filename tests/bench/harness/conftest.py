"""A random model with the shipped tokenizer, and tasks of lm_eval whose data are files made here."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed; `make setup` brings it")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{story}}}} The colour was"
doc_to_choice: ["red", "dark green", "blue"]
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWER = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{story}}}} Say it again:"
doc_to_target: "{{{{story}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12, do_sample: {sample}}}
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{story}}}}"
metric_list:
  - metric: word_perplexity
"""
COLOURS = ["red", "dark green", "blue"]


@pytest.fixture(scope="session")
def subject():
    """A model that knows nothing, with the shipped tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from kvfold.bench.subject import Subject
    from kvfold.hf.load import SHIPPED, new_llama

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = new_llama(
        **sizes, intermediate_size=64, vocab_size=2048, max_position_embeddings=256, initializer_range=0.3
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED / "tiny"))
    return Subject(name="random", model=model, tokenizer=tokenizer, fingerprint="0", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """The paths of three task files by the kind of what they ask."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "stories.jsonl"
    rows = [
        {
            "story": f"Once {'upon a time ' * (i % 4)}a {COLOURS[i % 3]} house stood in Turin number {i}.",
            "answer": i % 3,
        }
        for i in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"data": data}
    for kind, text in (("choice", CHOICE), ("answer", ANSWER), ("rolling", ROLLING)):
        found[kind] = folder / f"{kind}.yaml"
        found[kind].write_text(text.format(name=f"own_{kind}", data=data, cache=folder / "cache", sample="false"))
    found["sampled"] = folder / "sampled.yaml"
    found["sampled"].write_text(ANSWER.format(name="own_sampled", data=data, cache=folder / "cache", sample="true"))
    return found
