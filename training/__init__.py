"""From videos to labels, and from labels and depth to weights."""
