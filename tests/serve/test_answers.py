"""What the official client gets: replies as a chat gives them, streamed and whole; no token is read twice."""

import openai
import pytest

import kvfold
from kvfold.hf.generation import reply_settings
from serve.conftest import PLAN, assistant, user

TALK = ("Anna lives in Turin. She has a grey cat called Pixel.", "Where does Anna live?", "What is the cat called?")
CODE = "The code of the blue door is 4711. Please say it again and again."


def talked(say, texts, **settings):
    """The answers of a conversation, whose client sends everything each time, and its messages."""
    messages, answers = [], []
    for text in texts:
        messages.append(user(text))
        answers.append(say(messages, **settings))
        messages.append(assistant(answers[-1]))
    return answers, messages


def test_replies_are_those_of_a_chat_with_the_same_plan_and_only_new_tokens_are_read(say, tiny):
    model, tokenizer = tiny
    answers, _ = talked(say, TALK)
    chat = kvfold.Chat(
        model, tokenizer, PLAN, least=0, generation=reply_settings(max_new_tokens=8, temperature=0.0, seed=0)
    )
    before = 0
    for text, answer in zip(TALK, answers, strict=True):
        assert answer.choices[0].message.content == "".join(chat.send(text))
        assert answer.usage.prompt_tokens_details.cached_tokens == before
        before = len(chat.ids)
        assert answer.kvfold["tokens_seen"] == before
        assert answer.kvfold["bytes_held"] < answer.kvfold["full_bytes"]


def test_a_stream_says_what_the_whole_answer_says(say):
    messages = [user("The lamp costs 30 and the chair costs 12.")]
    whole = say(messages, logprobs=True, top_logprobs=2)
    chunks = list(say(messages, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2))
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[0].delta.role == "assistant"
    assert told[-1].finish_reason == whole.choices[0].finish_reason
    chances = [one.logprob for choice in told if choice.logprobs for one in choice.logprobs.content]
    assert chances == pytest.approx([one.logprob for one in whole.choices[0].logprobs.content], abs=1e-4)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [len(one.top_logprobs) for one in whole.choices[0].logprobs.content] == [2] * len(chances)


def test_an_edited_and_a_regenerated_turn_go_on_from_the_state_before_it(say):
    answers, messages = talked(say, TALK)
    again = say(messages[:5])
    assert again.choices == answers[2].choices
    assert again.usage.prompt_tokens_details.cached_tokens == answers[1].kvfold["tokens_seen"]
    edited = say([*messages[:2], user("What does Anna have?")])
    assert edited.usage.prompt_tokens_details.cached_tokens == answers[0].kvfold["tokens_seen"]
    fresh = say([user("Nothing was said of this before."), *messages[1:5]])
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0


def test_few_shot_messages_and_a_system_prompt_are_read_as_they_stand(say):
    messages = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Two"}, {"type": "text", "text": " words"}]},
        {"role": "assistant", "content": "Yes."},
        user("Where does Anna live?"),
    ]
    first = say(messages)
    second = say([*messages, assistant(first), user("And Ben?")])
    assert second.usage.prompt_tokens_details.cached_tokens == first.kvfold["tokens_seen"]


def test_a_stop_string_cuts_the_reply_and_the_conversation_is_what_the_client_saw(say, tiny):
    messages = [user(CODE)]
    whole = say(messages).choices[0].message.content
    assert len(whole) > 7
    stop = whole[4:7]
    cut = say(messages, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = say(messages, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.find(stop)]
    after = say([*messages, assistant(cut), user("Where does Anna live?")])
    rendered = tiny[1].apply_chat_template([*messages, assistant(cut)], tokenize=True, return_dict=True)["input_ids"]
    assert after.usage.prompt_tokens_details.cached_tokens == len(rendered)


def test_a_seed_gives_the_same_reply_and_top_p_of_little_the_likeliest(say):
    messages = [user("Tell me a story about a cat.")]
    one, two = (say(messages, temperature=1.5, seed=5, max_tokens=16) for _ in range(2))
    assert one.choices[0].message.content == two.choices[0].message.content
    others = {say(messages, temperature=1.5, seed=seed).choices[0].message.content for seed in range(6, 10)}
    assert len(others) > 1
    narrow = say(messages, temperature=1.5, top_p=1e-6, seed=5)
    assert narrow.choices[0].message.content == say(messages).choices[0].message.content


def test_a_reply_ends_at_its_longest_length_whichever_name_the_limit_has(running, say):
    assert say([user(CODE)], max_tokens=3).choices[0].finish_reason == "length"
    client = running.client()
    answer = client.chat.completions.create(model="tiny", messages=[user(CODE)], max_completion_tokens=2, temperature=0)
    assert answer.usage.completion_tokens == 2


def test_a_completion_goes_on_from_its_prompt_as_generate_does(running, tiny):
    model, tokenizer = tiny
    prompt = tokenizer("Anna lives in", return_tensors="pt").input_ids
    wanted = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    client = running.client()
    asked = {"model": "tiny", "prompt": "Anna lives in", "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**asked, logprobs=1)
    assert found.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text


def test_the_model_is_listed_and_others_are_not_there(running):
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="ask for that one"):
        client.models.retrieve("/etc/passwd")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="smollm2", messages=[user("Hello")])


def test_a_conversation_beyond_the_positions_of_the_model_is_refused(say):
    with pytest.raises(openai.BadRequestError) as caught:
        say([user("word " * 9000)])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        say([user("word" * 200_000)])
    assert caught.value.code == "context_length_exceeded"


def test_metrics_count_what_was_done(running, say):
    import urllib.request

    def numbers():
        text = urllib.request.urlopen(f"{running.url}/metrics").read().decode()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}

    before = numbers()
    answer = say([user("Count this, please.")])
    after = numbers()
    more = {name: after[name] - before[name] for name in ("kvfold_reply_tokens_total", "kvfold_folds_total")}
    assert more == {"kvfold_reply_tokens_total": answer.usage.completion_tokens, "kvfold_folds_total": 1}
    assert 0 < after["kvfold_held_bytes"] < after["kvfold_limit_bytes"]


def test_an_answer_says_what_is_kept_of_the_text_where_that_is_asked_for(running, say, tiny):
    said = "Anna lives in Turin — 都灵. She has a grey cat called Pixel, and Ben has a dog."
    kept = say([user(said)], extra_body={"kvfold": {"kept": True}}).kvfold["kept"]
    assert said in "".join(text for text, _ in kept)
    shares = [share for _, share in kept]
    assert 0 <= min(shares) < max(shares) == 1
    with_all = say([user(said)]).kvfold
    held = with_all["slots_held"] / with_all["tokens_seen"]
    assert sum(shares) / len(shares) == pytest.approx(held, abs=0.1)  # pieces of several tokens count once here
    assert "kept" not in with_all
