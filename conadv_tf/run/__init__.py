"""A run from recipe to result: build, train, folder, checkpoints, callbacks, faults."""
