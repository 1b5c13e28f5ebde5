"""Training pairs: readers, augmentations, ground truth, samplers."""
