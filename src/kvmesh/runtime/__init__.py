"""What makes a process of the roles: settings, servers, and the composition root that alone names implementations."""
