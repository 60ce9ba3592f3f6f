"""The bundled demo model, as package data: a 1.3 M parameter Llama made by scripts/train_demo.py."""
