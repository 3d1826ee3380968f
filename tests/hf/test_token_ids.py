"""Ids reach a cache as marks, each thread its own, and a model without tokenizer is cut into pieces of one length."""

import threading

import torch
from torch import nn

import kvfold
from driving import feed
from fakes import fresh, text
from kvfold.hf.token_ids import Reader, marks_of

PLAN = "sentkv(budget=20, length=5, window=2, recent=2)"


class Tokenizer:
    """Ninety-seven words; every seventh is a full stop."""

    def __len__(self):
        return 97

    def convert_ids_to_tokens(self, ids):
        return [f"Ġw{number}" for number in ids]

    def batch_decode(self, rows, clean_up_tokenization_spaces):
        return ["." if number % 7 == 0 else f"w{number}" for (number,) in rows]


def starts(cache):
    """Where sentences begin in the first lane of the first layer."""
    return cache.memory.layers[0].state.folded.index.starts[0].tolist()


def test_sentences_end_where_the_text_says_so():
    model, ids = fresh("llama"), torch.full((1, 60), 3)
    ids[0, [4 + 5, 4 + 11, 4 + 15, 4 + 22]] = 7  # the first four are pinned
    cache = kvfold.cache(model, PLAN, tokenizer=Tokenizer())
    feed(model, ids, cache)
    assert starts(cache)[:5] == [0, 6, 12, 16, 23]


def test_without_a_tokenizer_pieces_have_one_length():
    model = fresh("llama")
    cache = kvfold.cache(model, PLAN)
    feed(model, text(1, 60), cache)
    assert starts(cache)[:4] == [0, 5, 10, 15]


def test_two_caches_of_one_model_have_one_reader():
    model = fresh("llama")
    for _ in range(3):
        kvfold.cache(model, PLAN, tokenizer=Tokenizer())
    assert len(model.get_input_embeddings()._forward_pre_hooks) == 1
    assert len(fresh("llama").get_input_embeddings()._forward_pre_hooks) == 0


def test_plans_that_read_no_text_leave_the_model_alone():
    model = fresh("llama")
    kvfold.cache(model, "snapkv(keep=0.5)")
    kvfold.cache(model, "sentkv(budget=20, length=5, window=0, recent=2)")
    assert len(model.get_input_embeddings()._forward_pre_hooks) == 0


def test_each_thread_takes_its_own_ids():
    reader, embedding, taken = Reader(), nn.Embedding(9, 2), {}
    embedding.register_forward_pre_hook(reader, with_kwargs=True)
    barrier = threading.Barrier(2)

    def work(number):
        embedding(torch.full((1, 3), number))
        barrier.wait()
        taken[number] = reader.take(1, 3)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: int(ids[0, 0]) for number, ids in taken.items()} == {1: 1, 2: 2}
    assert reader.take(1, 3) is None


def test_a_leading_space_that_the_tokenizer_hides_counts():
    marks = marks_of(Tokenizer())
    assert marks.shape == (97,)
    assert int(marks[14]) & 7 == 7
    assert bool(marks[3] & 0b10000)
