"""The real rivals, each in its process, on a small random model: what they hold, claim, and do wrong."""

import shutil

import pytest
import torch

from kvfold.bench.ask.audit import AuditedRows
from kvfold.bench.peers.catalog import PEERS, second_python
from kvfold.bench.peers.process import PeerError
from kvfold.bench.peers.rivals import Rivals
from kvfold.bench.subject import Subject
from kvfold.errors import SuiteError
from kvfold.hf.load import SHIPPED, load, new_llama

pytestmark = pytest.mark.slow
needs_kvpress = pytest.mark.skipif(
    not second_python().exists(), reason="the rivals' environment is not built; run `make peers`"
)
TEXT = torch.randint(10, 2000, (160,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = new_llama(
            vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.15,
        )  # fmt: skip
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "tiny" / name, folder)
    model, tokenizer = load(str(folder), dtype=torch.float32)
    return Subject(name="a", model=model, tokenizer=tokenizer, fingerprint="a", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rivals(subject):
    with Rivals(subject=subject, threads=1) as called:
        yield called


def spent(rivals, text):
    rows = rivals.rows(text, count=1)
    rows.feed([TEXT])
    return rows.ledger()


def test_the_stock_cache_in_its_process_answers_as_our_full_plan_does(rivals, subject):
    told = ([TEXT[:60], TEXT[60:90]], [TEXT[90:], TEXT[100:101]])
    answers = []
    for rows in (rivals.rows("transformers:DynamicCache", count=2), AuditedRows(subject.model, "full", rows=2)):
        for turn in told:
            rows.feed(turn)
        answers.append((rows.answer([[5, 6], [7]], max_new_tokens=8), rows.trial([[8, 9], [3]])))
    assert answers[0][0] == answers[1][0]
    for ours, theirs in zip(answers[1][1], answers[0][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_a_quantised_cache_holds_what_it_says_and_one_without_its_package_says_so(rivals):
    assert spent(rivals, "transformers:DynamicCache").stored == 1.0
    assert 0.25 <= spent(rivals, "transformers:QuantizedCache(backend='fp8')").stored < 0.26
    with pytest.raises(PeerError, match=r"ImportError: .*hqq"):
        spent(rivals, "transformers:QuantizedCache(backend='hqq')")


def test_the_stock_cache_feeds_a_second_turn_once(rivals):
    said = rivals.check("transformers:DynamicCache", "second_turn", first=TEXT[:70], second=TEXT[70:82], new_tokens=4)
    assert said["fed"] == 13


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_steps_are_timed_one_by_one_and_remembered(rivals, cache):
    rows = rivals.rows(f"transformers:{cache}", count=1)
    rows.feed([TEXT[:100]])
    before = rows.ledger().seen
    seconds = rows.step_seconds(TEXT[100:104])
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert (before, rows.ledger().seen) == (100, 104)
    after_steps = rows.trial([[5, 6]])[0]
    at_once = rivals.rows("transformers:DynamicCache", count=1)
    at_once.feed([TEXT[:104]])
    assert (after_steps - at_once.trial([[5, 6]])[0]).abs().max() < 1e-4


def test_a_rival_that_reads_gguf_files_refuses_another_model_before_it_starts(rivals):
    with pytest.raises(SuiteError, match="reads GGUF files, and this model is none; give --model smollm2"):
        rivals.rows("llama_cpp:Q8_0", count=1)


@needs_kvpress
@pytest.mark.parametrize("method", ["SnapKV", "ExpectedAttention", "StreamingLLM", "ObservedAttention"])
def test_presses_that_cut_tensors_hold_what_they_claim(rivals, method):
    held = spent(rivals, f"kvpress:{method}(keep=0.5)")
    assert (held.stored, held.claimed) == (0.5, 0.5)


@needs_kvpress
@pytest.mark.parametrize(("method", "claimed"), [("KVzip", 0.5), ("ThinK", 0.75)])
def test_presses_that_mask_or_zero_hold_everything_whatever_they_claim(rivals, method, claimed):
    held = spent(rivals, f"kvpress:{method}(keep=0.5)")
    assert held.claimed == pytest.approx(claimed)
    assert held.stored >= 1.0


@needs_kvpress
def test_a_press_feeds_history_twice_on_the_second_turn(rivals):
    said = rivals.check("kvpress:SnapKV(keep=0.5)", "second_turn", first=TEXT[:70], second=TEXT[70:82], new_tokens=4)
    assert said["fed"] > 13
    assert said["held"]["stored_bytes"] == said["held"]["full_bytes"]


@needs_kvpress
def test_a_padded_row_under_a_press_does_not_read_what_it_reads_alone(rivals):
    said = rivals.check("kvpress:StreamingLLM(keep=0.5)", "padded", ids=TEXT[:60], pads=100)
    assert said["pads"] > 0
    assert said["difference"] > 0.1 * said["largest"]


@needs_kvpress
def test_a_context_shorter_than_a_press_window_is_a_failure_that_says_so(rivals):
    rows = rivals.rows("kvpress:SnapKV(keep=0.5)", count=1)
    rows.feed([TEXT[:20]])
    with pytest.raises(PeerError, match="AssertionError: Query length 20 should be greater than the window size 64"):
        rows.ledger()


@needs_kvpress
def test_every_method_of_the_catalogue_is_there(rivals):
    for method in PEERS["kvpress"].methods:
        rivals.check(f"kvpress:{method}(keep=0.9)", "second_turn", first=TEXT[:70], second=[5], new_tokens=2)
