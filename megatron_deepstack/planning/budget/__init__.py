"""What a run costs before it starts: floating-point operations, bytes, sizes of linear layers."""
