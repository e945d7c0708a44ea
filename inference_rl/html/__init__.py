"""Pages that are one file and need nothing else: what they have in common."""
