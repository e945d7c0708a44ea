"""What is said of MaxEnt RL beside regular RL, measured on a model."""
