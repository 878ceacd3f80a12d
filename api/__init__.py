"""Takes deliveries in and answers questions over HTTP."""
