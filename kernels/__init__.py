"""The operations of a decoder step, each once for the device and once in plain torch. Imports nothing of ours."""
