"""Large-batch training with Concurrent Adversarial Learning (arXiv 2106.00221) in TensorFlow 2 and tf_keras.

`python train.py` runs recipes; in a notebook build the same from the modules: `data.load`, `resnet.ResNet`,
`methods.conadv`, `trainer.ConAdvModel`, `lars.make_lars`, then `model.compile` and `model.fit`.
"""

import os

# tf-models and this package use tf_keras; without this TensorFlow loads Keras 3 too, a quarter of its start-up time.
# With it `tf.keras` is tf_keras, unless TensorFlow is there already.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

from conadv_tf.version import __version__

__all__ = ["__version__"]
