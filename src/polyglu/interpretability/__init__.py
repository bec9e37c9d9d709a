"""Which activations the neurons choose."""
