"""Measurements of a trained model, each tested on a case with a known answer."""
