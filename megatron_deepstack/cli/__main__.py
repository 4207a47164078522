"""`python -m megatron_deepstack.cli`, as torchrun starts it."""

from megatron_deepstack.cli import main

if __name__ == "__main__":
    main()
