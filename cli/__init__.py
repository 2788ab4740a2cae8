import sys

if sys.version_info < (3, 11):  # noqa: UP036 - an old Python says so before it stumbles over what it cannot read
    found = ".".join(map(str, sys.version_info[:2]))
    print("error: Python " + found + " is too old (3.11 or newer): `make setup` looks for one", file=sys.stderr)
    sys.exit(2)
