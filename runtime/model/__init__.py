"""The one decoder, its layers, and the loader that fills them from a checkpoint."""
