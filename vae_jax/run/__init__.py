"""The machinery of a run: config, devices, checkpoints, logs. It does not know which model is trained."""
