"""`python -m gossipml`."""

from gossipml.cli import main

if __name__ == "__main__":
    main()
