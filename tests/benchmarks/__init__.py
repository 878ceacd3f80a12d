"""The alternative that Payfold's benchmark is compared with."""
