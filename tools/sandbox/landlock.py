"""The `landlock` tier, for where there are no user namespaces."""

from tools.sandbox.job_sandbox import JobSandbox
from tools.sandbox.keepers import Keepers


class LandlockSandbox(JobSandbox):
    """The `landlock` tier: Landlock, seccomp and limits around a plain process of an ordinary user.

    What it lacks beside `ns`: limits of memory, processes and disk are looked at every 0.1 s; that a file exists, and
    its size, can be seen; sockets have no names; changes of a file's mode or time do nothing; every start is cold.
    """

    tier = "landlock"

    def __init__(self) -> None:
        super().__init__(Keepers(confined=True))
