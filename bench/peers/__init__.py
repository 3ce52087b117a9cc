"""What the benches need to serve and load another system beside this one."""
