"""`python -m actors` is `actors`."""

from actors.cli import main

main()
