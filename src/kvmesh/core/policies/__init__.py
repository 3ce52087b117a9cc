"""Policies: how one worker is chosen among the candidates. `policy.py` has the port and the registry."""
