"""Property inference: what activations tell of private samples beside what the model is trained for."""
