"""Pure functions on pixels and tensors: frames, distances, suppression."""
