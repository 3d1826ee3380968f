from kvfold.data.excerpts import EXCERPT_WORDS, Source, sentences, source

STORY = "\n\n".join(
    [
        "The old king lived in the north and had " + "many " * EXCERPT_WORDS + "ships.",
        "His daughter kept a grey\ngoose " + "every day " * EXCERPT_WORDS + "by the sea.",
        "In the end the goose laid an egg, and the king laughed.",
    ]
)
QA = [
    {"question": "What did the daughter keep?", "answer": "a grey goose."},
    {"question": "Who laughed?", "answer": "the king"},  # stands in one excerpt only
    {"question": "Who flew?", "answer": "goose"},  # stands in two excerpts
    {"question": "Why?", "answer": "nobody knows"},  # stands nowhere
    {"question": "What?", "answer": "."},
]


def test_a_question_belongs_to_the_one_excerpt_that_holds_its_answer():
    made = source([{"text": STORY, "qa": QA}])
    assert [(p.text[:12], question, answer) for p, question, answer in made.questions] == [
        ("His daughter", "What did the daughter keep?", "a grey goose"),
        ("In the end t", "Who laughed?", "the king"),
    ]


def test_short_paragraphs_are_put_together():
    made = source([{"text": "\n\n".join(["Four words stand here."] * 40)}, {"text": "Another one."}])
    assert [len(p.text.split()) >= EXCERPT_WORDS for p in made.excerpts] == [True, True, False]
    assert [p.document for p in made.excerpts] == [0, 0, 1]


def test_sentences_are_whole_and_of_ordinary_length():
    text = 'CHAPTER I\n\nIt was a dark\nnight. "Who is there?" she asked him. Yes. ' + "word " * 50 + "end."
    assert sentences(text) == ["CHAPTER I It was a dark night.", '"Who is there?" she asked him.']


def test_nothing_comes_from_nothing():
    assert source([]) == Source()
