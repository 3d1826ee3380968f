"""Training of ranks: bases are exact, soft and hard agree with the cache, a run resumes as it was."""

import copy
import json
from itertools import pairwise

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.adapters.ranks import save_ranks
from kvfold.encode.lowrank.gate import allocate_ranks
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import DataError, FileError
from kvfold.train.dynakv.bases import is_cheap_by_head
from kvfold.train.dynakv.calibrate import Samples, calibrate
from kvfold.train.dynakv.loss import RATES
from kvfold.train.dynakv.moments import Moments
from kvfold.train.dynakv.rates import rates_at
from kvfold.train.dynakv.run import DynaRun, silent
from kvfold.train.dynakv.settings import DynaSettings
from kvfold.train.dynakv.start import begin
from kvfold.train.dynakv.student import Reading, Student

NAMES = ("mixed", "heads", "rotated", "joint", "rotary")


@pytest.fixture(scope="module")
def measured():
    texts = text(8, 96, seed=3).tolist()
    found = calibrate(model_of("llama"), texts, names=NAMES, drawn=Samples(texts=8, of_a_text=4), report=silent)
    return {name: begin(ranks) for name, ranks in found.items()}


def test_bases_are_sorted_by_energy_and_undone_by_their_inverse(measured):
    for name, basis in measured.items():
        for own in basis.layers.values():
            for side in (own.form.bases.keys, own.form.bases.values):
                rows = torch.randn(5, len(side.mean))
                assert torch.allclose(side.read(side.write(rows)), rows, atol=1e-4)
            keys = own.gate.scale[: len(own.form.bases.keys.mean)].view(-1, own.form.bases.keys.parts)
            assert name == "rotary" or (keys.diff(dim=0) <= 1e-3 * keys.max()).all()  # there, pairs are sorted
            assert sum(own.form.levels[-1]) == own.form.size
            for less, more in pairwise(own.form.levels):
                assert less[0] <= more[0]
                assert less[1] <= more[1]


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.47, 1.0])
def test_before_training_every_slot_gets_what_calibration_keeps_at_a_rate_of_the_grid(rate):
    texts = text(8, 96, seed=3).tolist()
    found = calibrate(model_of("llama"), texts, names=["joint"], drawn=Samples(texts=8, of_a_text=4), report=silent)
    ranks = begin(found["joint"])
    for index, cut in found["joint"].cuts(rate).items():
        layer = ranks.layers[index]
        share = ranks.rate_of(index, rate)
        logits = layer.gate.logits(torch.randn(9, layer.form.bases.keys.mean.numel()), torch.randn(9, 16))
        levels = allocate_ranks(logits, layer.form.dims, rate=share, size=layer.form.size)
        assert {layer.form.levels[level] for level in levels.tolist()} == {cut}


def test_keys_are_written_apart_where_heads_share_little_and_together_where_they_are_copies():
    torch.manual_seed(3)
    few = torch.randn(400, 3) @ torch.randn(3, 8)
    copies, strangers = Moments(), Moments()
    copies.add(torch.cat([few, few @ torch.linalg.qr(torch.randn(8, 8))[0]], dim=1))
    strangers.add(torch.cat([few, torch.randn(400, 3) @ torch.randn(3, 8)], dim=1))
    assert not is_cheap_by_head(copies, 2)
    assert is_cheap_by_head(strangers, 2)


def test_a_rotary_basis_commutes_with_rotation(measured):
    from kvfold.attention.rotary import rotate
    from kvfold.hf.rotary import rotary_of

    encode = measured["rotary"].layers[0].form.bases.keys.encode[0]
    cosines, sines = rotary_of(model_of("llama")).at(torch.tensor([37]))
    keys = torch.randn(5, 2, 8)
    turned = rotate(keys, cosines[:, None], sines[:, None]).flatten(1) @ encode
    plain = keys.flatten(1) @ encode
    pairs = [latent.unflatten(1, (-1, 2)).square().sum(dim=2) for latent in (turned, plain)]
    assert torch.allclose(*pairs, rtol=1e-3, atol=1e-4)  # each pair only turns


@pytest.mark.parametrize("basis", ["mixed", "heads", "rotated", "joint", "rotary"])
def test_the_student_reads_what_the_cache_reads(measured, basis, tmp_path):
    model, ids = model_of("llama"), text(2, 192, seed=5)
    ranks = measured[basis]
    student = Student(model, ranks)
    positions = torch.arange(192).expand_as(ids)
    with torch.no_grad():
        reading = Reading(context=64, logits={})
        full = student.read(ids, positions, reading)
        cut = student.read(ids, positions, Reading(context=64, rates=rates_at(ranks, 0.4)))
    assert torch.allclose(full, feed(model, ids)[:, 64:], rtol=1e-3, atol=1e-3)
    assert reading.logits is not None
    assert set(reading.logits) == set(ranks.layers)
    save_ranks(Ranks(bases={basis: ranks}), tmp_path, model=model, about={})
    plan = f"dynakv(rate=1.0, basis={basis!r}, adapter={str(tmp_path)!r})"
    cached = feed(model, ids, kvfold.cache(model, plan, prompt_tokens=64, stride=64), sizes=(64, 64))
    assert torch.allclose(full, cached[:, 64:], rtol=1e-3, atol=1e-3)
    cached = feed(
        model, ids, kvfold.cache(model, plan.replace("1.0", "0.4"), prompt_tokens=64, stride=64), sizes=(64, 64)
    )
    assert torch.allclose(cut, cached[:, 64:], rtol=1e-2, atol=1e-2)


def settings(out, **more):
    return DynaSettings(model="tiny", out=out, basis="mixed", length=256, rows=1, calibration=2, **more)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    whole = DynaRun(settings(tmp_path / "whole", steps=3))
    whole.train(lambda record: None)
    half = DynaRun(settings(tmp_path / "half", steps=3))
    half.trainer.step(half.batches(), half.learned)
    half.save()
    rest = DynaRun(settings(tmp_path / "half", steps=3, resume=True))
    records = []
    rest.train(records.append)
    assert [record["step"] for record in records] == [3]
    assert set(records[0]["losses"]) == {"kl", "entropy"}
    assert json.loads((tmp_path / "half" / "record.jsonl").read_text()) == records[0]
    for one, other in zip(whole.student.layers.parameters(), rest.student.layers.parameters(), strict=True):
        assert torch.equal(one, other)
    rest.finish()
    words = json.loads((tmp_path / "half" / "adapter.json").read_text())
    assert words["training"]["steps"] == 3
    assert set(words["training"]["held"]) == {str(rate) for rate in RATES}
    assert words["bases"]["mixed"]["trained"]
    assert "mixed" in words["measured"]


@pytest.mark.slow
def test_updates_make_a_model_of_its_own_that_the_adapter_is_for(tmp_path):
    run = DynaRun(settings(tmp_path, steps=2, update=2, update_rate=0.05))
    before = copy.deepcopy(run.model.state_dict())
    run.train(lambda record: None)
    base, ids = run.model, torch.arange(20)[None] + 30
    run.finish()
    assert all(torch.equal(one, before[name]) for name, one in base.state_dict().items())
    updated, _ = kvfold.load(str(tmp_path / "model"))
    changed = {name for name, one in updated.state_dict().items() if not torch.equal(one, before[name])}
    assert len(changed) == 4 * len(base.model.layers)
    assert all(".self_attn." in name for name in changed)
    plan = f"dynakv(rate=0.47, adapter='{tmp_path}')"
    cache = kvfold.cache(updated, plan)
    with torch.no_grad():
        updated(ids, past_key_values=cache)
    cache.fold()
    assert cache.ledger().stored < 1
    with pytest.warns(UserWarning, match="nearly its weights"):  # two steps are a light fine-tune
        kvfold.cache(base, plan)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"update": -1}, "leaves the model"),
        ({"without": ("sleep",)}, "can be left out"),
        ({"basis": "round"}, "there are"),
        ({"steps": 0}, "a step or more"),
        ({"steps": 5, "seconds": 5.0}, "needs one"),
    ],
)
def test_runs_that_cannot_be_are_refused(wrong, said, tmp_path):
    with pytest.raises(DataError, match=said):
        DynaSettings(model="tiny", out=tmp_path, **wrong)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileError, match="leave out --resume"):
        DynaRun(settings(tmp_path, steps=1, resume=True))
