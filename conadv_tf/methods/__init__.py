"""The training methods: attack, schedules, and the choice between them. schedules.py is the page to read."""

from conadv_tf.methods.method import (
    METHODS,
    SCHEDULES,
    AdversarialHalf,
    Method,
    conadv,
    disadv,
    make_method,
    vanilla,
)

__all__ = ["METHODS", "SCHEDULES", "AdversarialHalf", "Method", "conadv", "disadv", "make_method", "vanilla"]
