"""What a worker of Ray imports before it becomes a rank; see WORKERS_AHEAD of ray_starter.py."""

import gc
from contextlib import suppress

gc.disable()  # modules live on: collections between them free nothing, and take a tenth of the time
try:
    with suppress(Exception):  # the rank imports it again, and reports the error; here it would end the worker
        from . import worker  # noqa: F401
finally:
    gc.enable()
