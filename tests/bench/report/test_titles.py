"""The title of a table: runs that differ have titles that differ."""

import made

from kvfold.bench.report.tables import tables


def titles(*records):
    return [table.title for table in tables(records)]


def test_what_shapes_a_text_is_said():
    settings = {"tokens": 4096, "question": "seen", "data": "novels.jsonl.xz 1086c0d5f3f8", "turns": [16, 24]}
    (said,) = titles(made.record(suite="ruler", settings=settings))
    assert said == "ruler 1 on tiny, 4,096 tokens, question seen, novels (float32, 4 samples, seed 0)"


def test_another_setting_is_said_where_runs_differ_in_it():
    short, long = titles(made.record(), made.record(settings={"turns": [40, 80]}))
    assert short == "chat 1 on tiny, turns 16 24 (float32, 4 samples, seed 0)"
    assert long == "chat 1 on tiny, turns 40 80 (float32, 4 samples, seed 0)"


def test_one_sample_is_no_samples():
    assert titles(made.record(outcomes=(1.0,))) == ["chat 1 on tiny (float32, 1 sample, seed 0)"]
