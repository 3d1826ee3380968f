"""Calibration: losses are what the model does, a rate goes where it pays, and an adapter gives it all back."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kvfold
from driving import error, exact, feed
from fakes import model_of, text
from kvfold.adapters.ranks import save_ranks
from kvfold.cli.main import app
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import DataError
from kvfold.hf.probe import replace_attention
from kvfold.plan import Plan
from kvfold.train.dynakv.calibrate import Samples, calibrate
from kvfold.train.dynakv.mixture import GENERATED, rows_of_kinds
from kvfold.train.dynakv.sensitivity import LayerSensitivity, add_samples, falls_of, samples
from kvfold.train.dynakv.settings import CalibrationSettings

FEW = Samples(texts=6, of_a_text=2)


def measure(names=("joint",), *, drawn=FEW):
    return calibrate(
        model_of("llama"), text(8, 96, seed=3).tolist(), names=names, drawn=drawn, report=lambda line: None
    )


@pytest.fixture(scope="module")
def measured():
    return measure(("joint", "heads"))


@pytest.fixture(scope="module")
def adapter(measured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    save_ranks(Ranks(bases={}, measured=measured, default="joint"), folder, model=model_of("llama"), about={})
    return str(folder)


def test_joint_bases_are_orthogonal_without_a_mean_and_their_falls_never_rise(measured):
    for layer in measured["joint"].layers.values():
        keys = layer.sides[0]
        for basis in (layer.bases.keys, layer.bases.values):
            encode = basis.encode[0]
            assert torch.allclose(encode.T @ encode, torch.eye(len(encode)), atol=1e-5)
            assert not basis.mean.any()
        for side in (slice(keys), slice(keys, None)):
            falls = layer.loss.falls[side]
            assert (falls[1:] <= falls[:-1]).all()
            sizes = layer.loss.size[side]
            assert (sizes.diff() <= 1e-4 * sizes.max()).all()
        assert (layer.loss.noise >= 0).all()


def test_falls_are_the_slopes_of_the_lower_convex_hull_of_a_curve():
    cut = torch.tensor([20.0, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0])  # read at steps of four dimensions
    falls = falls_of(cut, 1)
    assert falls[:4].isinf().all()  # the first step comes before anything else
    # From 9 at four dimensions the hull goes straight to 2 at twelve, under the 8 between, and on to 0.
    assert torch.allclose(falls[4:], torch.tensor([7 / 8] * 8 + [0.5] * 4).double())


def test_sensitivity_is_the_curvature_of_the_divergence(measured):
    model, ids = model_of("llama"), text(1, 60, seed=9)
    positions, context = torch.arange(60)[None], 40
    bases = {index: layer.bases for index, layer in measured["joint"].layers.items()}
    found = {index: LayerSensitivity(one) for index, one in bases.items()}
    source = torch.Generator().manual_seed(0)
    for sample in samples(model, ids, positions, context=context, count=300, source=source):
        add_samples(found, sample, texts=1, predicted=20)
    layer, size = 1, 16
    predicted = (found[layer].alone / 300)[[0, 3, size, size + 2]]
    wanted = [curvature(model, ids, bases[layer], layer, place, context) for place in (0, 3, size, size + 2)]
    assert torch.allclose(predicted.float(), torch.tensor(wanted), rtol=0.35)


def curvature(model, ids, bases, layer, place, context, *, step=0.03):
    """The divergence a token when a folded dimension shrinks by a step in every slot, over the step's square."""

    def attend(shrink):
        def inside(index, queries, keys, values, scale):
            sides = [keys, values]
            if index == layer:
                rows = [side[0, :, 4:context].transpose(0, 1) for side in sides]
                latents = torch.cat(bases.write(*rows, torch.arange(4, context)), dim=1)
                latents[:, place] *= 1 - shrink
                back = (bases.keys.read(latents[:, :16]), bases.values.read(latents[:, 16:]))
                cosines, sines = (side[:, None] for side in bases.rotary.at(torch.arange(4, context)))
                from kvfold.attention.rotary import rotate

                turned = rotate(back[0].unflatten(1, (2, 8)), cosines, sines)
                folded = (turned.transpose(0, 1), back[1].unflatten(1, (2, 8)).transpose(0, 1))
                sides = [
                    torch.cat([side[:, :, :4], few[None], side[:, :, context:]], dim=2)
                    for side, few in zip(sides, folded, strict=True)
                ]
            # What stands before the context's end reads raw slots, as it did when it was folded.
            seen = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool).tril()
            attention = torch.nn.functional.scaled_dot_product_attention
            raw = attention(queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
            few = attention(queries, *sides, attn_mask=seen, scale=scale, enable_gqa=True)
            return torch.cat([raw[:, :, :context], few[:, :, context:]], dim=2)

        return inside

    logs = []
    for shrink in (0.0, step):
        with torch.no_grad(), replace_attention(model, attend(shrink)):
            logs.append(model(ids, use_cache=False).logits[0, context:].double().log_softmax(dim=-1))
    full, few = logs
    return float((full.exp() * (full - few)).sum(dim=-1).mean()) / step**2


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.47, 1.0])
def test_the_layers_and_sides_together_meet_a_rate(measured, rate):
    cuts = measured["joint"].cuts(rate)
    assert sum(keys + values for keys, values in cuts.values()) == round(rate * 3 * 32)
    for keys, values in measured["heads"].cuts(rate).values():
        assert keys % 2 == 0
        assert values <= 16


def test_an_even_split_cuts_all_alike():
    cuts = measure(drawn=None)["joint"].cuts(0.5)
    assert set(cuts.values()) == {(8, 8)}


def test_the_full_rank_gives_the_models_own_logits_after_a_basis_was_written_in_16_bits(adapter):
    model, ids = model_of("llama"), text(2, 40)
    found = feed(model, ids, kvfold.cache(model, f"dynakv(rate=1.0, adapter={adapter!r})", stride=6), sizes=(20, 1, 5))
    wanted = exact("llama", ids)
    assert error(found, wanted) < 1e-4 * float(wanted.square().mean().sqrt())


@pytest.mark.parametrize("allocation", ["learned", "even", "random"])
def test_untrained_a_rank_a_token_is_the_one_rank_for_all(adapter, allocation):
    model, ids = model_of("llama"), text(2, 60)
    plans = [f"dynakv(rate=0.4, allocation={allocation!r}, adapter={adapter!r})", f"pca(rate=0.4, adapter={adapter!r})"]
    caches = [kvfold.cache(model, plan) for plan in plans]
    first, second = (feed(model, ids, cache, sizes=(30,)) for cache in caches)
    assert torch.equal(first, second)
    assert caches[0].ledger().stored_bytes == caches[1].ledger().stored_bytes


def test_an_adapter_says_which_basis_is_meant_and_another_can_be_named(adapter):
    model, ids = model_of("llama"), text(1, 60)
    read = {
        basis: feed(model, ids, kvfold.cache(model, f"pca(rate=0.4{basis}, adapter={adapter!r})"), sizes=(30,))
        for basis in ("", ", basis='joint'", ", basis='heads'")
    }
    assert torch.equal(read[""], read[", basis='joint'"])
    assert not torch.allclose(read[""], read[", basis='heads'"])
    assert str(Plan.parse("dynakv(rate=0.3)")) == "dynakv(rate=0.3)"


def test_rows_are_drawn_from_every_kind_of_text_in_turn(tmp_path):
    kinds = {
        "novels": [{"text": f"word{row} " * 2000} for row in range(3)],
        "star": [{"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi there."}]}],
        "sgd.dev": [{"text": "left out, for its licence"}],
    }
    for name, rows in kinds.items():
        with lzma.open(tmp_path / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    tokenizer = kvfold.load("tiny")[1]
    rows, counts = rows_of_kinds(tokenizer, tmp_path, count=7, length=256, seed=0)
    assert counts == {"star": 3, "novels": 2, GENERATED: 2}
    assert [len(row) for row in rows] == [256] * 7
    decoded = [tokenizer.decode(row) for row in rows]
    assert decoded[0].count("Hello.") > 2  # short dialogues stand one after the other
    assert "word" in decoded[1]
    assert rows == rows_of_kinds(tokenizer, tmp_path, count=7, length=256, seed=0)[0]


def test_a_measurement_writes_an_adapter_and_says_what_it_read(tmp_path):
    arguments = ["train", "dynakv", "--out", str(tmp_path), "--rows", "2", "--length", "256", "--split", "even"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "only generated text is read" in done.output
    assert "to go" in done.output
    words = json.loads((tmp_path / "adapter.json").read_text())
    assert words["default"] == "joint"
    assert words["training"]["rows"] == {GENERATED: 2}
    model, _ = kvfold.load("tiny")
    assert kvfold.cache(model, f"dynakv(adapter={str(tmp_path)!r})").ledger().weight_bytes > 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"rows": 0}, "a row or more"), ({"length": 8}, "at least 256"), ({"split": "odd"}, "shared out")],
)
def test_measurements_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(DataError, match=said):
        CalibrationSettings(model="tiny", out=Path("unused"), **wrong)


def test_what_only_a_training_can_do_is_refused_without_steps(tmp_path):
    done = CliRunner().invoke(app, ["train", "dynakv", "--out", str(tmp_path), "--update", "2"])
    assert done.exit_code != 0
    assert isinstance(done.exception, DataError)
