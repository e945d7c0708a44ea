"""Looking at what inference found."""
