"""Matchers as they are trained: a batch in, losses out."""
