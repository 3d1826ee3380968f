import dataclasses
import json

import made
import pytest

from kvfold.bench import suites
from kvfold.bench.run import record
from kvfold.errors import FileError

PROMISED = """
suite suite_version model fingerprint dtype device threads plan keep query_aware seed n score interval by_family full
none shortcut retained stored resident attended stored_bytes resident_bytes full_bytes ttft_seconds tpot_seconds
wall_seconds git versions
"""


def test_a_line_has_every_promised_key():
    assert set(PROMISED.split()) <= set(json.loads(made.record().line()))


def test_a_line_read_back_is_the_same_record():
    one = made.record(plan="full", keep=None, shortcut=None, git=None)
    assert record.from_line(one.line(), where="here") == one
    assert "\n" not in one.line()


def test_the_name_of_the_work_is_known_before_the_work_is_done():
    one = made.record()
    asked = {"suite": "chat", "suite_version": 1, "settings": {"turns": [16, 24]}, "fingerprint": "abc123"}
    samples = record.samples_name(**asked, dtype="float32", seed=0, n=4, device="cpu", threads=1)
    assert record.work_name(samples, "snapkv(keep=0.5)") == one.work


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"suite_version": 2},
        {"dtype": "bfloat16"},
        {"fingerprint": "other"},
        {"settings": {"turns": [8, 8]}},
    ],
)
def test_other_samples_are_other_work(change):
    assert made.record(**change).work != made.record().work


def test_times_do_not_make_other_work():
    assert made.record(wall_seconds=9.0, git=None, threads=1).work == made.record().work


def test_a_line_that_is_no_json_says_which():
    with pytest.raises(FileError, match=r"here was read as a record; it is not JSON"):
        record.from_line('{"suite": "cha', where="here")


@pytest.mark.parametrize("change", [lambda keys: keys.pop("score"), lambda keys: keys.update(mood="good")])
def test_a_record_of_another_version_names_the_odd_key(change):
    keys = json.loads(made.record().line())
    change(keys)
    with pytest.raises(FileError, match=r"keys differ in (score|mood)"):
        record.from_line(json.dumps(keys), where="here")


@pytest.mark.parametrize("change", [{"outcomes": 1}, {"outcomes": ["x"]}, {"stored_bytes": "5"}, {"score": None},
                                    {"by_family": []}, {"interval": [0.1]}, {"remarks": [3]}, {"plan": {}}, {"n": True},
                                    {"metric_intervals": [1]}, {"metric_intervals": {"kl": 2}}])  # fmt: skip
def test_a_record_with_a_broken_field_says_which_line(change):
    keys = json.loads(made.record().line()) | change
    with pytest.raises(FileError, match=r"^here was read as a record; .* give another folder$"):
        record.from_line(json.dumps(keys), where="here")


def test_deep_json_is_no_record():
    with pytest.raises(FileError, match="it is not JSON"):
        record.from_line("[" * 200_000, where="here")


def test_a_metric_is_a_key_of_its_own_and_comes_back():
    one = made.record(metrics={"kl": 0.25, "top1": 0.5})
    assert json.loads(one.line())["kl"] == 0.25
    assert record.from_line(one.line(), where="here") == one
    sure = dataclasses.replace(one, metric_intervals={"kl": (0.2, 0.3), "top1": (0.4, 0.6)})
    assert json.loads(sure.line())["metric_intervals"] == {"kl": [0.2, 0.3], "top1": [0.4, 0.6]}
    assert record.from_line(sure.line(), where="here") == sure


def test_a_metric_does_not_hide_a_key():
    with pytest.raises(AssertionError):
        made.record(metrics={"score": 0.25}).line()


def test_the_suites_whose_records_are_apart_by_device_are_those_that_measure_time():
    assert {name for name in suites.names() if suites.find(name).is_timed} == set(record.TIMED)
