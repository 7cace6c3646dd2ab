"""What a program needs on hardware that is not there: compiled for a TPU, looked at, never run."""
