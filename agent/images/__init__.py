"""Images: fetched, verified and inspected while they stream, and cached once per host."""
