"""Replays a Mooncake-format trace against a running mesh: read it, expand its prompts, drive the mesh, sum up."""
