"""How KV blocks move between workers, behind one port."""
