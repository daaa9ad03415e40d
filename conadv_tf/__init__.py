"""Large-batch training with Concurrent Adversarial Learning (arXiv 2106.00221) in TensorFlow 2 and tf_keras.

`python train.py` runs recipes; docs/library.md builds the same from these names in a notebook:

    from conadv_tf import Attack, ConAdvModel, ResNet, data, make_lars, methods, warmup_poly_decay

Importing conadv_tf loads no TensorFlow; the first use of a name does.
"""

import importlib
import os
from typing import Any

__version__ = "0.2.0"

# tf-models and this package use tf_keras; without this TensorFlow loads Keras 3 too, a quarter of its start-up time.
# With it `tf.keras` is tf_keras, unless TensorFlow is there already.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# TensorFlow's start-up chatter would bury what a person looks for. Set it yourself to see it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Public names, and the modules that have them; None: the module itself.
_HOMES = {
    "Attack": "methods.attack",
    "ConAdvModel": "training.trainer",
    "ResNet": "models.resnet",
    "attack_panel": "run.tensorboard",
    "data": None,
    "make_lars": "training.lars",
    "make_plan": "training.plan",
    "make_strategy": "run.strategy",
    "methods": None,
    "prepare_tpu": "run.tpu_runtime",
    "split": "models.keras_split",
    "warmup_poly_decay": "training.learning_rate",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
