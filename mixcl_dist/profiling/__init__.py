"""How fast a pre-training is, part by part, and how fast it will be: measured here, predicted elsewhere."""
