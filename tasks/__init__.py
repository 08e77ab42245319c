"""Prefect tasks: one thin function per step of `fedpipe`.

Tasks take and return paths, digests and numbers only; results are kept as JSON. Every step
may run again (see `fedpipe.steps`), so what fails for a passing reason is tried again; what
is the user's mistake is not.
"""
