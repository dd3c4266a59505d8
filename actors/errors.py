"""What can go wrong for the person at the command line.

UserError        one line, with the key or the file and the fix; exit status 2
└── RecipeError  a recipe that cannot be run
"""


class UserError(Exception):
    """A mistake that its maker can mend; printed as one line."""


class RecipeError(UserError):
    """A recipe that cannot be run; names the file and the key."""

    def __init__(self, where: str, key: str, why: str) -> None:
        super().__init__(f"{where}: {key}: {why}" if key else f"{where}: {why}")
        self.key = key
