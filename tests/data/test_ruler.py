import pytest

from kvfold.data import ruler
from kvfold.data.excerpts import Excerpt, Source
from kvfold.errors import DataError

WORDS = ["north", "south", "river", "stone", "bread", "winter", "summer", "market", "garden", "tower"]
SOURCE = Source(
    sentences=tuple(f"The {a} and the {b} were far away." for a in WORDS for b in WORDS),
    excerpts=tuple(
        Excerpt(
            document=number // 4,
            text=f"Passage {number} tells of {word}. " + f"{word} again. " * 40,
            questions=((f"What is told in {number}?", f"tells of {word}"),),
        )
        for number, word in enumerate(f"{a}-{b}" for a in WORDS for b in WORDS[:4])
    ),
)


def count(text):
    return len(text.split())


def made(task, *, tokens=1000, seed=0, source=SOURCE):
    return ruler.generate(task, tokens=tokens, count=count, seed=seed, source=source)


def needles(prompt):
    """Every (key, value) that a prompt tells."""
    told = [line.partition(" for ")[2].partition(" is: ") for line in prompt.replace(". ", ".\n").split("\n")]
    return [(key, value.rstrip(".")) for key, middle, value in told if middle]


def test_there_are_thirteen_kinds():
    assert len(ruler.TASKS) == len(set(ruler.TASKS)) == 13


@pytest.mark.parametrize("tokens", [600, 1000, 4000])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_prompt_and_reply_fill_the_length_and_never_pass_it(task, tokens):
    for seed in range(3):
        one = made(task, tokens=tokens, seed=seed)
        taken = count(one.prompt) + count(one.answer_prefix) + one.reply_tokens
        assert taken <= tokens
        assert taken >= tokens * (0.7 if task == "cwe" or task in ruler.QUESTIONS else 0.9)  # those grow in leaps


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_task_follows_from_its_seed(task):
    assert made(task) == made(task)
    assert made(task) != made(task, seed=1)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_prompt_ends_with_its_question_and_does_not_end_with_the_answer(task):
    one = made(task)
    assert one.prompt.endswith(one.question)
    assert "?" in one.question or one.question.startswith("Question: Find")
    assert one.score(one.question + one.answer_prefix) == 0.0
    assert one.score("it is " + ", ".join(one.outputs).upper()) == 1.0


@pytest.mark.parametrize(
    ("task", "asked", "told"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 1, 4),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_are_told_once_each_and_the_asked_ones_are_the_outputs(task, asked, told):
    one = made(task)
    found = needles(one.prompt)
    assert len(found) == told
    assert sorted(value for key, value in found if key in one.question) == sorted(one.outputs)
    assert len(one.outputs) == asked
    assert len({key for key, _ in found}) == (1 if task == "niah_multivalue" else told)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_names_each_key_once(task):
    one = made(task)
    found = needles(one.prompt)
    assert len(found) == len({key for key, _ in found}) > 50
    assert [value for key, value in found if key in one.question] == list(one.outputs)


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multivalue"])
def test_prose_is_the_given_text_in_its_order_or_else_generated(task):
    body = made(task).prompt
    places = [body.find(sentence) for sentence in SOURCE.sentences]
    assert sum(place >= 0 for place in places) > 50
    start = places.index(min(place for place in places if place >= 0))
    run = [place for place in places[start:] if place >= 0]
    assert run == sorted(run)
    assert not any(sentence in made(task, source=Source()).prompt for sentence in SOURCE.sentences)


def test_a_chain_leads_from_the_value_to_every_variable():
    one = made("vt")
    value = one.question.split()[-5]
    body = one.prompt.split("Memorize and track")[2]
    told = dict(line.removeprefix("VAR ").split(" = ") for line in body.split("\n") if line.startswith("VAR "))
    for name in one.outputs:
        while name.removeprefix("VAR ") in told:
            name = told[name.removeprefix("VAR ")]
        assert name == value
    assert len(told) == len(one.outputs) == 5


def test_common_words_are_the_most_frequent():
    one = made("cwe", tokens=4000)
    words = one.prompt.split("Below is")[2].split("\n")[1].split()[1::2]
    times = {word: words.count(word) for word in words}
    most = sorted(times, key=times.get)[-10:]
    assert set(most) == set(one.outputs)
    assert {times[word] for word in most} == {30}
    assert {times[word] for word in set(words) - set(most)} == {3}


def test_frequent_coded_words_are_the_three_after_the_dots():
    one = made("fwe")
    words = one.prompt.split("\n")[0].split()
    times = {word: words.count(word) for word in words}
    assert sorted(times, key=times.get)[-4:] == [*reversed(one.outputs), "..."]


@pytest.mark.parametrize(("task", "own"), [("qa_1", 0), ("qa_2", 3)])
def test_the_excerpt_that_answers_stands_among_those_that_do_not(task, own):
    for seed in range(5):
        one = made(task, tokens=600, seed=seed)
        texts = one.prompt.split("Document ")[1:]
        gold = [text for text in texts if one.outputs[0] in text]
        assert len(gold) == 1
        number = int(one.question.removesuffix("?").split()[-1])
        same = {f"Passage {i} " for i in range(number // 4 * 4, number // 4 * 4 + 4)} - {f"Passage {number} "}
        assert sum(name in text for text in texts for name in same) == own


def test_half_of_the_outputs_is_half_the_score_except_for_questions_on_documents():
    values = {"prompt": "a\nb", "answer_prefix": "", "outputs": ("Paris", "Rome")}
    assert ruler.Task(task="vt", **values).score("paris it is") == 0.5
    assert ruler.Task(task="qa_1", **values).score("paris it is") == 1.0
    assert ruler.Task(task="qa_2", **values).score("Oslo") == 0.0


@pytest.mark.parametrize("task", ruler.TASKS)
def test_too_few_tokens_say_how_many_are_needed(task):
    with pytest.raises(DataError, match=r"give \d+"):
        made(task, tokens=100)


def test_an_unknown_kind_lists_the_real_ones():
    with pytest.raises(DataError, match="niah_single_1, niah_single_2"):
        made("niah")


def test_questions_need_excerpts():
    with pytest.raises(DataError, match="give --data"):
        made("qa_1", source=Source(sentences=("Only prose.",)))
