"""Cases as data, the acceptance rule and the detector of races: for the tests, `mumoe verify` and the benchmarks."""
