"""Where model-written code runs.

sandbox     the seam: code in, output and how it ended out
select      picks a tier and proves it with an attack on it, or refuses
ns          the `ns` tier: asyncio client of the fork server
zygote      the fork server: two forks and a private world for each call
root        its namespaces and read-only root
cell        runs one piece of code the way a notebook does
seccomp     the denied system calls
linux       calls that Python lacks
unsafe      the `unsafe` tier: a plain subprocess, only by explicit choice

This package, zygote, root, cell, seccomp and linux import the standard library only: they run in the fork server.
"""
