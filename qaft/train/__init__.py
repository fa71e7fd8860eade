"""Training: objective, engine, loop, checkpoints and logs; ``loop.fit`` is the place to start reading."""
