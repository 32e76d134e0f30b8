"""Property inference: what activations, or mere sizes of frames, tell of private samples beside the task."""
