"""Ranks as Ray actors: connection, placement, actor group, sockets, executor."""
