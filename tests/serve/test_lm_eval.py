"""lm_eval's own client of chat servers, `local-chat-completions`, scores a task on the server."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed; `make setup` brings it")
pytest.importorskip("tenacity", reason="what lm_eval's client needs is not installed; `make setup` brings it")

TASK = """
task: repeated
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{story}}}} Say it again:"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - metric: exact_match
"""


def test_a_task_gets_the_replies_that_the_official_client_gets(running, say, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    stories = [f"Anna lives in {town}." for town in ("Turin", "Rome", "Paris", "Milan")]
    asked = [[{"role": "user", "content": f"{story} Say it again:"}] for story in stories]
    said = [say(messages, stop=["\n"]).choices[0].message.content for messages in asked]
    wanted = [*said[:3], "something else"]  # three of four are right
    data = tmp_path / "stories.jsonl"
    rows = [{"story": story, "said": text} for story, text in zip(stories, wanted, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "repeated.yaml"
    path.write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    found = simple_evaluate(
        "local-chat-completions",
        model_args={"model": "tiny", "base_url": f"{running.url}/v1/chat/completions", "num_concurrent": 1},
        tasks=[str(path)],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found["results"]["repeated"]["exact_match,none"] == 0.75
