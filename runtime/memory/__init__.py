"""GPU memory: the memory plan of a rank, readings of the device, processes that use it."""
