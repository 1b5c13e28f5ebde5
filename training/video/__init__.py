"""From videos to labels: frames, labelling rounds, propagation, pictures."""
