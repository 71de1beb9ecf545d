"""`python -m personalize` is the command line."""

from personalize.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
