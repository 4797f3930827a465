"""What is minimized: an objective is a model, a per-example loss and a penalty."""
