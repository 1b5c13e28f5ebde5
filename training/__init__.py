"""Training of matchers from videos (a later release fills this room)."""
