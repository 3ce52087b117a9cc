"""The gRPC services, one servicer per file: thin, no decisions; and what they share to call each other."""
