"""`python -m electrax` is the command `electrax`."""

from electrax.cli import main

main()
