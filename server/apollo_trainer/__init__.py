"""The training server: owns the Apollo state, runs and checkpoints of one served model."""
