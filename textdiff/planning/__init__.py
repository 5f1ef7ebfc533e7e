"""What a run will need, worked out before it: memory per device, and operations."""
