"""Who is alive and where: the port, and the stores behind it."""
