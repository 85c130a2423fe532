"""`python -m hotdesk` is the `hotdesk` command."""

from .cli import main

main(prog_name="hotdesk")
