"""Ladders climb when their rung is mastered, and wait for one another."""

import random

from kvfold.train.base.curriculum import CLIMB_AT, Curriculum, Ladder, base_curriculum


def test_a_ladder_climbs_only_when_nearly_always_right():
    ladder = Ladder(name="a", rungs=(2, 4), weight=1.0)
    assert not any(ladder.learn(0, CLIMB_AT - 0.05) for _ in range(100))
    climbed = [ladder.learn(0, 1.0) for _ in range(40)]
    assert climbed.index(True) > 0
    assert ladder.rung == 1


def test_earlier_rungs_do_not_move_a_ladder():
    ladder = Ladder(name="a", rungs=(2, 4), weight=1.0, rung=1)
    assert not any(ladder.learn(0, 1.0) for _ in range(100))
    assert (ladder.right, ladder.batches) == (0.0, 0)


def test_the_last_rung_is_mastered_and_then_drawn_less():
    hard, easy = Ladder(name="hard", rungs=(1,), weight=1.0), Ladder(name="easy", rungs=(1,), weight=1.0)
    for _ in range(50):
        easy.learn(0, 1.0)
    curriculum, rng = Curriculum(ladders={"hard": hard, "easy": easy}), random.Random(0)
    drawn = [curriculum.draw(rng)[0].name for _ in range(1000)]
    assert easy.mastered
    assert not hard.mastered
    assert 150 < drawn.count("easy") < 350


def test_dialogues_wait_for_their_drills():
    curriculum = base_curriculum()
    assert [one.name for one in curriculum.open() if one.name.startswith("chat/")] == ["chat/rules"]
    for ladder in curriculum.ladders.values():
        if ladder.name.startswith("drill/"):
            ladder.rung = len(ladder.rungs) - 1
    assert sum(one.name.startswith("chat/") for one in curriculum.open()) == 4


def test_the_state_comes_back_from_a_checkpoint():
    first, second = base_curriculum(), base_curriculum()
    first.ladders["copies"].rung, first.ladders["copies"].right = 2, 0.5
    second.restore(first.state() | {"gone": (1, 0.0, 0)})
    assert second.state() == first.state()
