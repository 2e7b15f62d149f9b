"""Source text for child processes that are killed at a chosen step of what they do to files."""

from __future__ import annotations

# Before: `import os, shutil, signal` and an int `last`. After: step(function) counts two steps of each call, before and
# after it, and the process kills itself when `last` is reached.
STEPS = """
steps = 0

def step(real):
    def call(*args, **more):
        global steps
        for _ in range(2):  # before it and after it
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1
            done = real(*args, **more) if _ == 0 else done
        return done
    return call

shutil.rmtree = step(shutil.rmtree)
"""
