"""Pair selection: functions that return sorted, duplicate-free lists of image name pairs."""
