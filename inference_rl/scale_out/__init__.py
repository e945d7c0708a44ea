"""Beyond one process: what workers do, on this machine or on a Ray cluster."""
