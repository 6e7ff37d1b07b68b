"""``python -m moescale``."""

from .launch.cli import main

if __name__ == "__main__":
    main()
