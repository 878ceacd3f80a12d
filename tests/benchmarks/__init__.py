"""What Payfold is measured beside."""
