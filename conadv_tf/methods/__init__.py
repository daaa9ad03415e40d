"""The training methods: attack, schedules, and the choice between them. schedules.py is the page to read."""

from conadv_tf.methods.attack import Attack
from conadv_tf.methods.interface import SCHEDULES, Batch, Requirement, Schedule, Update, carrying, register
from conadv_tf.methods.method import (
    Method,
    alternatives,
    conadv,
    disadv,
    make_method,
    method_names,
    schedules_of,
    vanilla,
)
from conadv_tf.methods.mixture import Mixture

__all__ = [
    "SCHEDULES",
    "Attack",
    "Batch",
    "Method",
    "Mixture",
    "Requirement",
    "Schedule",
    "Update",
    "alternatives",
    "carrying",
    "conadv",
    "disadv",
    "make_method",
    "method_names",
    "register",
    "schedules_of",
    "vanilla",
]
