"""How long a job will take, learned from those before it."""

import pytest

from disagg_ray.scheduling.predictor import NUM_SHAPES, Predictor


def test_nothing_known_predicts_nothing():
    assert Predictor().predict("fast", "480p", 100.0) == 0.0


def test_a_shape_seen_before_is_predicted_by_its_own_seconds_and_not_by_its_work():
    predictor = Predictor()
    predictor.learn("fast", "480p", 100.0, 7.0)
    predictor.learn("fast", "720p", 300.0, 40.0)
    assert predictor.predict("fast", "480p", 100.0) == 7.0
    assert predictor.predict("fast", "720p", 300.0) == 40.0


def test_a_shape_not_seen_is_predicted_by_its_work():
    predictor = Predictor()
    predictor.learn("fast", "480p", 100.0, 10.0)
    assert predictor.predict("fast", "720p", 300.0) == pytest.approx(30.0)


def test_long_jobs_weigh_more_in_the_seconds_per_unit_of_work_than_short_ones():
    predictor = Predictor()
    for _ in range(100):
        predictor.learn("fast", "long", 1000.0, 100.0)
        predictor.learn("fast", "short", 1.0, 1.0)
    assert predictor.predict("fast", "new", 1000.0) == pytest.approx(100.0, rel=0.02)


def test_a_group_not_seen_is_predicted_by_the_mean_of_the_others():
    predictor = Predictor()
    predictor.learn("fast", "480p", 100.0, 10.0)
    predictor.learn("slow", "480p", 100.0, 30.0)
    assert predictor.predict("new", "480p", 100.0) == pytest.approx(20.0)


def test_predictions_follow_a_change_and_outlast_one_odd_measurement():
    predictor = Predictor()
    for seconds in (10.0, 10.0, 50.0):
        predictor.learn("fast", "480p", 100.0, seconds)
    assert predictor.predict("fast", "480p", 100.0) == 20.0
    for _ in range(30):
        predictor.learn("fast", "480p", 100.0, 50.0)
    assert predictor.predict("fast", "480p", 100.0) == pytest.approx(50.0, rel=0.01)


def test_shapes_learned_longest_ago_are_forgotten_and_then_predicted_by_work():
    predictor = Predictor()
    predictor.learn("fast", "first", 1.0, 99.0)
    predictor.learn("fast", "second", 1.0, 99.0)
    predictor.learn("fast", "first", 1.0, 99.0)
    for shape in range(NUM_SHAPES - 1):
        predictor.learn("fast", shape, 1.0, 1.0)
    assert predictor.predict("fast", "first", 1.0) == 99.0
    assert predictor.predict("fast", "second", 1.0) == pytest.approx(1.0)


def test_work_of_nothing_is_no_reason_to_divide_by_it():
    predictor = Predictor()
    predictor.learn("fast", "480p", 0.0, 2.0)
    assert (predictor.predict("fast", "480p", 0.0), predictor.predict("fast", "720p", 5.0)) == (2.0, 0.0)
