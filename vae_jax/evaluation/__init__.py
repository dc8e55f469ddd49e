"""Numbers about a trained model, each checked against a case where the answer is known."""
