"""What tests and users' own tests build on: naive twins, doubles and contract suites. Public."""
