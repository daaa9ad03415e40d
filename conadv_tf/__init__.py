"""Large-batch training with Concurrent Adversarial Learning (arXiv 2106.00221) in TensorFlow 2 and tf_keras.

`python train.py` runs recipes; in a notebook build the same from the modules: `data.load`, `resnet.ResNet`,
`methods.conadv`, `trainer.ConAdvModel`, `lars.make_lars`, then `model.compile` and `model.fit`.
"""

from conadv_tf.version import __version__

__all__ = ["__version__"]
