"""How many sessions fit in the open files that this host allows a process: each takes some, at both of its ends."""

import resource

_OF_A_SESSION = 5
"""In the fork server; one less in its client."""
_BESIDE = 128


def make_room(sessions: int) -> int:
    """Let this process open as many files as they need, up to its hard limit; how many sessions that is enough for."""
    needed = _BESIDE + sessions * _OF_A_SESSION
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return max(0, needed - _BESIDE) // _OF_A_SESSION
