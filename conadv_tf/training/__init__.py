"""Training: the Keras model, one update inside a replica, optimizer, learning rate and the arithmetic of a run."""
