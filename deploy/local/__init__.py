"""The servers and processes that run on this machine, for `payfold up`, `payfold demo`, the benchmark and the tests."""
