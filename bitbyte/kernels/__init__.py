"""Optional fast paths, chosen at call time and tested against the plain references."""
