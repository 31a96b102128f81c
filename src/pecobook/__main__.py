"""Entry point of `python -m pecobook`, so that `torchrun -m pecobook` works."""

from pecobook.cli import main

if __name__ == "__main__":
    main()
