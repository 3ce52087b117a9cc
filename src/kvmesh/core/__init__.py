"""The algorithms of the mesh, pure: no I/O, no clock, no logging; `now` and `rng` are arguments."""
