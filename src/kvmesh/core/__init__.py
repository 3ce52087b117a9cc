"""The algorithms of the mesh, pure: no I/O, no clock, no randomness of their own, no logging; `now` and `rng` are arguments."""
