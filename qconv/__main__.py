"""``python -m qconv``: the command line."""

from qconv.cli.main import main

main()
