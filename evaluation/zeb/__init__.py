"""ZEB, the zero-shot evaluation benchmark for image matching: data, protocols, runs, results."""
