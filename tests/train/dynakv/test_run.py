"""Training of ranks: bases are exact, soft and hard agree with the cache, a run resumes as it was."""

import copy
import json

import pytest
import torch

import kvfold
from driving import feed
from fakes import model_of, text
from kvfold.adapters.ranks import save_ranks
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import DataError, FileError, ModelError
from kvfold.train.dynakv.bases import is_cheap_by_head
from kvfold.train.dynakv.levels import levels_by_score
from kvfold.train.dynakv.moments import Moments
from kvfold.train.dynakv.rates import shares_at, threshold_of
from kvfold.train.dynakv.run import DynaRun
from kvfold.train.dynakv.settings import DynaSettings
from kvfold.train.dynakv.start import measure
from kvfold.train.dynakv.student import Reading, Student


@pytest.fixture(scope="module")
def measured():
    return measure(model_of("llama"), text(8, 96, seed=3).tolist())


def test_bases_are_sorted_by_energy_and_undone_by_their_inverse(measured):
    for name, basis in measured.bases.items():
        for own in basis.layers.values():
            for side in (own.form.bases.keys, own.form.bases.values):
                rows = torch.randn(5, len(side.mean))
                assert torch.allclose(side.read(side.write(rows)), rows, atol=1e-4)
            keys = own.gate.scale[: len(own.form.bases.keys.mean)].view(-1, own.form.bases.keys.parts)
            assert name == "rotary" or (keys.diff(dim=0) <= 1e-3 * keys.max()).all()  # there, pairs are sorted
            assert own.form.levels[0] == (0, 0)
            assert sum(own.form.levels[-1]) == own.form.size


def test_keys_are_written_apart_where_heads_share_little_and_together_where_they_are_copies():
    torch.manual_seed(3)
    few = torch.randn(400, 3) @ torch.randn(3, 8)
    copies, strangers = Moments(), Moments()
    copies.add(torch.cat([few, few @ torch.linalg.qr(torch.randn(8, 8))[0]], dim=1))
    strangers.add(torch.cat([few, torch.randn(400, 3) @ torch.randn(3, 8)], dim=1))
    assert not is_cheap_by_head(copies, 2)
    assert is_cheap_by_head(strangers, 2)


def test_levels_keep_equally_many_dimensions_of_every_part_of_keys():
    for keys, values in levels_by_score(torch.rand(60), 30, parts=3):
        assert keys % 3 == 0
        assert 0 <= values <= 30
    assert levels_by_score(torch.rand(60), 30, parts=3)[-1] == (30, 30)


def test_a_rotary_basis_commutes_with_rotation(measured):
    from kvfold.attention.rotary import rotate
    from kvfold.hf.rotary import rotary_of

    encode = measured.bases["rotary"].layers[0].form.bases.keys.encode[0]
    cosines, sines = rotary_of(model_of("llama")).at(torch.tensor([37]))
    keys = torch.randn(5, 2, 8)
    turned = rotate(keys, cosines[:, None], sines[:, None]).flatten(1) @ encode
    plain = keys.flatten(1) @ encode
    pairs = [latent.unflatten(1, (-1, 2)).square().sum(dim=2) for latent in (turned, plain)]
    assert torch.allclose(*pairs, rtol=1e-3, atol=1e-4)  # each pair only turns


@pytest.mark.parametrize("basis", ["mixed", "heads", "rotated", "joint", "rotary"])
def test_the_student_reads_what_the_cache_reads(measured, basis, tmp_path):
    model, ids = model_of("llama"), text(2, 192, seed=5)
    ranks = measured.bases[basis]
    student = Student(model, ranks)
    positions = torch.arange(192).expand_as(ids)
    with torch.no_grad():
        reading = Reading(context=64, logits={})
        full = student.read(ids, positions, reading)
    assert torch.allclose(full, feed(model, ids)[:, 63:-1], rtol=1e-3, atol=1e-3)
    threshold = threshold_of(reading.logits, student.dims, 0.4)
    shares = shares_at(reading.logits, student.dims, threshold)
    assert abs(sum(shares.values()) / len(shares) - 0.4) < 0.01
    save_ranks(Ranks(bases={basis: ranks}), tmp_path, model=model, about={})
    plan = f"dynakv(rate=1.0, basis={basis!r}, adapter={str(tmp_path)!r})"
    cached = feed(model, ids, kvfold.cache(model, plan, prompt_tokens=64, stride=64), sizes=(64, 64))
    assert torch.allclose(full, cached[:, 63:-1], rtol=1e-3, atol=1e-3)


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
    assert set(records[0]["losses"]) == {"kl", "entropy", "held"}
    assert json.loads((tmp_path / "half" / "record.jsonl").read_text()) == records[0]
    for one, other in zip(whole.student.layers.parameters(), rest.student.layers.parameters(), strict=True):
        assert torch.equal(one, other)
    rest.finish()
    words = json.loads((tmp_path / "half" / "adapter.json").read_text())
    assert words["training"]["steps"] == 3
    assert words["bases"]["mixed"]["trained"]
    assert "mixed-measured" in words["bases"]


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
    with pytest.raises(ModelError, match="with other weights"):
        kvfold.cache(base, plan)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"update": -1}, "leaves the model"),
        ({"without": ("sleep",)}, "can be left out"),
        ({"basis": "round"}, "there are"),
        ({"steps": 0}, "a step or more"),
    ],
)
def test_runs_that_cannot_be_are_refused(wrong, said, tmp_path):
    with pytest.raises(DataError, match=said):
        DynaSettings(model="tiny", out=tmp_path, **wrong)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileError, match="leave out --resume"):
        DynaRun(settings(tmp_path, steps=1, resume=True))
