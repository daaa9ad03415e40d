"""Data: sources, decoding, augmentation, exact evaluation, and the importer of image folders."""

from conadv_tf.data.datasets import check_source, load
from conadv_tf.data.pipeline import ImageData

__all__ = ["ImageData", "check_source", "load"]
