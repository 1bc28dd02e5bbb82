"""`python -m fedray.cli`."""

from fedray.cli import main

if __name__ == "__main__":
    main()
