"""What learned routines share: collection, the loop, checkpoints."""
