"""The training methods: attack, schedules, and the choice between them. schedules.py is the page to read."""

from conadv_tf.methods.attack import Attack
from conadv_tf.methods.controls import Ascent
from conadv_tf.methods.interface import SCHEDULES, Batch, Requirement, Schedule, Update, carrying, register
from conadv_tf.methods.method import (
    Method,
    alternatives,
    conadv,
    disadv,
    make_method,
    method_names,
    noise,
    sam,
    schedules_of,
    vanilla,
)
from conadv_tf.methods.mixture import Mixture
from conadv_tf.methods.passes import Part, attack_images, parts_of, train_on, training_pass

__all__ = [
    "SCHEDULES",
    "Ascent",
    "Attack",
    "Batch",
    "Method",
    "Mixture",
    "Part",
    "Requirement",
    "Schedule",
    "Update",
    "alternatives",
    "attack_images",
    "carrying",
    "conadv",
    "disadv",
    "make_method",
    "method_names",
    "noise",
    "parts_of",
    "register",
    "sam",
    "schedules_of",
    "train_on",
    "training_pass",
    "vanilla",
]
