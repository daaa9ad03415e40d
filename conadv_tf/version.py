"""The version of conadv_tf, also written into every result.json."""

__version__ = "0.1.0"
