"""The `unsafe` tier, for code that you trust as you trust yourself."""

from tools.sandbox.job_sandbox import JobSandbox
from tools.sandbox.keepers import Keepers


class UnsafeSandbox(JobSandbox):
    """The `unsafe` tier: a plain process, only by explicit choice. It isolates nothing.

    For code that you trust as you trust yourself. The environment is clean, the limits hold, and processes end with
    their call; files, network and other processes are the user's own.
    """

    tier = "unsafe"

    def __init__(self) -> None:
        super().__init__(Keepers(confined=False))
