"""What a worker of Ray imports before it becomes a rank; see WORKERS_AHEAD of ray_starter.py."""

import gc

gc.disable()  # modules live on: collections between them free nothing, and take a tenth of the time
try:
    from . import worker  # noqa: F401
finally:
    gc.enable()
