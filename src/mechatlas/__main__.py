"""`python -m mechatlas` is the command `mechatlas`."""

from mechatlas.app.cli import main

main()
