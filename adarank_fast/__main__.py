"""`python -m adarank_fast`, for `torchrun -m adarank_fast`."""

from adarank_fast.cli.main import main

if __name__ == "__main__":
    main()
