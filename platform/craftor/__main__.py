"""`python -m craftor`."""

from craftor.cli import main

main()
