"""`python -m xpnn`: the command line."""

from xpnn.cli import main

if __name__ == "__main__":
    main()
