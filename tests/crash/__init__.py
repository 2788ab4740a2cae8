"""Faults of disks, power and clocks put under real processes: the layer (C), the server that forks them, the model."""
