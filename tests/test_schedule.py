"""The learning rate against hand-worked numbers and MLPerf's curve."""

import numpy as np
import pytest
import tensorflow as tf

from conadv_tf.errors import ConfigError
from conadv_tf.training.learning_rate import warmup_poly_decay


def curve(schedule, steps) -> np.ndarray:
    return np.array([schedule(tf.constant(step, tf.int64)).numpy() for step in steps])


def mlperf(step: int, peak: float, warmup: int, total: int, end: float = 1e-4, power: float = 2.0) -> float:
    """PolynomialDecayWithWarmup of MLPerf's TF2 ResNet: warm-up, then decay over total − warmup + 1 steps."""
    if step <= warmup and warmup:
        return peak * step / warmup
    remaining = 1 - min(step - warmup, total - warmup + 1) / (total - warmup + 1)
    return (peak - end) * remaining**power + end


def test_hand_worked_numbers():
    # Warm-up of 2 · 10 = 20 updates to 10, then 10 · (1 − (t − 20)/81)², less the end rate's share.
    schedule = warmup_poly_decay(10, 100, peak_learning_rate=10.0, warmup_epochs=2)
    steps = [0, 1, 10, 19, 20, 21, 60, 100, 101, 500]
    expected = [0.0, 0.5, 5.0, 9.5, 10.0, 9.754612, 2.562186, 0.0016241, 1e-4, 1e-4]
    np.testing.assert_allclose(curve(schedule, steps), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("steps_per_epoch", "total", "peak", "warmup"),
    [(312, 12792, 13.0, 2), (39, 2355, 29.0, 18), (13, 1170, 43.0, 41), (19, 1722, 24.699, 31)],
)
def test_recipes_follow_mlperfs_curve(steps_per_epoch, total, peak, warmup):
    schedule = warmup_poly_decay(steps_per_epoch, total, peak, warmup)
    first = warmup * steps_per_epoch
    steps = [0, 1, first // 2, first - 1, first, first + 1, (first + total) // 2, total - 1, total]
    np.testing.assert_allclose(
        curve(schedule, steps), [mlperf(step, peak, first, total) for step in steps], rtol=1e-4, atol=1e-6
    )


def test_the_release_has_power_one_point_six_and_part_epochs_round():
    schedule = warmup_poly_decay(13, 1301, 43.0, 0.5, end_learning_rate=0.01, power=1.6)  # 6.5 updates: 6
    steps = [0, 3, 6, 7, 700, 1301]
    expected = [mlperf(step, 43.0, 6, 1301, 0.01, 1.6) for step in steps]
    np.testing.assert_allclose(curve(schedule, steps), expected, rtol=1e-4)


def test_without_warm_up_the_first_update_has_the_peak():
    schedule = warmup_poly_decay(10, 50, 4.0, 0)
    np.testing.assert_allclose(
        curve(schedule, [0, 1, 25, 50]), [mlperf(s, 4.0, 0, 50) for s in (0, 1, 25, 50)], rtol=1e-4
    )


def test_the_curve_rises_to_the_peak_once_and_then_falls():
    values = curve(warmup_poly_decay(7, 70, 5.0, 3), range(71))
    assert values.argmax() == 21
    assert (np.diff(values[:22]) > 0).all()
    assert (np.diff(values[21:]) < 0).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peak_learning_rate": 0.0}, "peak_learning_rate=0.0"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"warmup_epochs": 10}, "warmup_epochs=10"),
        ({"end_learning_rate": -0.1}, "end_learning_rate=-0.1"),
        ({"end_learning_rate": 11.0}, "end_learning_rate=11.0"),
        ({"power": 0.0}, "power=0.0"),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(settings, named):
    with pytest.raises(ConfigError, match=named):
        warmup_poly_decay(10, 100, **{"warmup_epochs": 2, **settings})
