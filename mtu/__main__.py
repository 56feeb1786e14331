"""`python -m mtu` runs the command `mtu`."""

from mtu.cli import main

main()
