"""How a run survives: blind to what is trained."""
