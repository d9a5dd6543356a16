"""`python -m splatedit` is `splatedit`."""

from splatedit.cli import main

if __name__ == "__main__":
    main()
