"""`python -m weightops`."""

from weightops.cli.main import main

main()
