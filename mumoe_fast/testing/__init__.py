"""Cases as data and the acceptance rule, shared by the tests, `mumoe verify` and the benchmarks."""
