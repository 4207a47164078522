"""`python -m megatron_deepstack.cli`, which is how torchrun starts the command line."""

from megatron_deepstack.cli import main

if __name__ == "__main__":
    main()
