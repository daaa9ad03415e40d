"""The preflight: a recipe's step compiled for a TPU without one, and what it costs.

It stays free of imports: the process that drives the TPU compiler must not load TensorFlow.
"""
