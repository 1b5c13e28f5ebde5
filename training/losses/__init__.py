"""Losses of the matchers, as pure functions of tensors."""
