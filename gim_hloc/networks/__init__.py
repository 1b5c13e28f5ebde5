"""Network definitions that no library gives, one file a network."""
